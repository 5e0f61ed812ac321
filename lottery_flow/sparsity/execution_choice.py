"""Which product each layer uses: the fastest of those measured on this machine.

    time(path) = median over rounds of forward + backward of one layer on its own
    path = the fastest sparse one where it is at least 3 % below dense, else dense

    paths = choose(shapes, n_active, batch=128, without_dx=("fc1",))
    y = linear(x, kernel, plan, grad=GRAD_OF[paths["fc1"]])       # plan None if dense

Where compressed rows overtake the dense product depends on the shape, the batch, the
number of active weights and the machine; a table of another machine would be wrong.
"""

import statistics
import time
from collections.abc import Collection, Mapping
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow.sparsity.execution import linear
from lottery_flow.sparsity.execution_structure import Structure, structure_on_host

PATHS = ("dense", "csr", "csr_gathered")
GRAD_OF = {"dense": "dense", "csr": "dense", "csr_gathered": "active"}

# A path has to win by this share of the dense time: noise must not make steps slower.
MARGIN = 0.03
_ROUNDS, _SECONDS = 5, 0.003


class Times(NamedTuple):
    """Seconds of one layer, forward and backward, by path.

    Attributes:
      dense: the dense products.
      csr: compressed rows, the kernel's gradient by a dense product.
      csr_gathered: compressed rows, the gradient of the active weights alone.
    """

    dense: float
    csr: float
    csr_gathered: float


def choose(
    shapes: Mapping[str, tuple[int, int]],
    n_active: Mapping[str, int],
    batch: int,
    *,
    dtype: str = "float32",
    without_dx: Collection[str] = (),
    dense_grads: bool = False,
    override: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """A path for each layer, measured once in a process.

    A layer takes some milliseconds to measure, and a second or two to compile.

    Args:
      shapes: of the kernels [in, out], by layer.
      n_active: active weights of each masked layer; layers without one are dense.
      batch: rows of x.
      dtype: of x and the kernels.
      without_dx: layers whose input needs no gradient, as the first one's.
      dense_grads: for rules that look at the dense gradient at every step: the path
        without it is left out.
      override: paths by layer that are taken as they are.

    Raises:
      ValueError: a layer or path that does not exist.

    Guarantees:
      - A layer is dense where no other path was measured at least 3 % faster.
      - The same arguments give the same paths within a process.
    """
    override = {} if override is None else dict(override)
    for name, path in override.items():
        if name not in shapes or path not in PATHS:
            raise ValueError(
                f"override={{{name!r}: {path!r}}}: give one of {', '.join(PATHS)} "
                f"for one of {', '.join(shapes)}"
            )

    def path_of(name):
        if name in override:
            return override[name]
        if name not in n_active:
            return "dense"
        size = shapes[name], n_active[name], batch
        return fastest(measure(*size, dtype, name not in without_dx), dense_grads)

    return {name: path_of(name) for name in shapes}


def fastest(times: Times, dense_grads: bool = False) -> str:
    """The path to take by its times; see `choose`."""
    paths = ("csr",) if dense_grads else ("csr", "csr_gathered")
    best = min(paths, key=lambda path: getattr(times, path))
    wins = getattr(times, best) <= (1 - MARGIN) * times.dense
    return best if wins else "dense"


@cache
def measure(
    shape: tuple[int, int],
    n_active: int,
    batch: int,
    dtype: str = "float32",
    with_dx: bool = True,
) -> Times:
    """Times of one layer with a random mask on the present backend.

    Args:
      shape: [in, out] of the kernel.
      n_active: active weights.
      batch: rows of x.
      dtype: of x and the kernel.
      with_dx: whether the gradient of x is computed as well.
    """
    rng = np.random.default_rng(0)
    mask = np.zeros(shape[0] * shape[1], bool)
    mask[rng.choice(mask.size, n_active, replace=False)] = True
    plan = structure_on_host(mask.reshape(shape))
    sizes = (batch, shape[0]), (batch, shape[1]), shape
    x, dy, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in sizes)

    def pass_of(path):
        # Between two layers activations lie as the products want them, for compressed
        # rows with the batch innermost; the first layer's input lies as the data do.
        sparse = path != "dense"
        turn_x, turn_y = sparse and with_dx, sparse

        def both(x, kernel, plan: Structure | None, dy):
            def layer(kernel, x):
                y = linear(_turned(x, turn_x), kernel, plan, grad=GRAD_OF[path])
                return _turned(y, turn_y)

            if with_dx:
                y, pull = jax.vjp(layer, kernel, x)
            else:
                y, pull = jax.vjp(lambda kernel: layer(kernel, x), kernel)
            return y, pull(dy)

        args = _turned(x, turn_x), kernel, plan if sparse else None, _turned(dy, turn_y)
        compiled = jax.jit(both).lower(*args).compile()
        return lambda: jax.block_until_ready(compiled(*args))

    passes = [pass_of(path) for path in PATHS]
    return Times(*_medians(passes))


def table(
    shapes: Mapping[str, tuple[int, int]],
    n_active: Mapping[str, int],
    batch: int,
    paths: Mapping[str, str],
    *,
    dtype: str = "float32",
    without_dx: Collection[str] = (),
) -> str:
    """The choice as lines to print: milliseconds of each path, and the one taken."""
    line = "{:<16}{:>12}{:>9}{:>9}{:>9}{:>14}  {}"
    rows: list[tuple] = [("layer", "shape", "active", *PATHS, "path")]
    for name, (n_in, n_out) in shapes.items():
        times = ("-",) * 3
        if name in n_active:
            size = (n_in, n_out), n_active[name], batch
            found = measure(*size, dtype, name not in without_dx)
            times = tuple(f"{1e3 * t:.3f}" for t in found)
        n = n_active.get(name, n_in * n_out)
        rows.append((name, f"{n_in}x{n_out}", n, *times, paths[name]))
    return "\n".join(line.format(*row) for row in rows)


def _turned(x, turn):
    """The transpose, or x."""
    return x.T if turn else x


def _medians(passes) -> list[float]:
    """Seconds of each, taking turns."""
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter

    def turn(fn, n):
        start = clock()
        for _ in range(n):
            fn()
        return (clock() - start) / n

    for fn in passes:
        fn()
    repeats = [max(1, round(_SECONDS / max(turn(fn, 1), 1e-6))) for fn in passes]
    times = [
        [turn(fn, n) for fn, n in zip(passes, repeats, strict=True)]
        for _ in range(_ROUNDS)
    ]
    return [statistics.median(own) for own in zip(*times, strict=True)]
