"""Which product each layer uses: the fastest of those measured on this machine.

    time(path) = least over rounds of forward + backward of one layer on its own
    path = the fastest sparse one where it is at least 3 % below dense, else dense

    layers = {"fc1": Layer(linear, (784, 300), (784,)), ...}
    paths = choose(layers, n_active, batch=128, without_dx=("fc1",))
    y = linear(x, kernel, plan, grad=GRAD_OF[paths["fc1"]])       # plan None if dense

Where compressed rows overtake the dense product depends on the shape, the batch, the
number of active weights and the machine; a table of another machine would be wrong.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow.sparsity.execution import compress
from lottery_flow.sparsity.execution_structure import Structure, structure_on_host

PATHS = ("dense", "csr", "csr_gathered")
GRAD_OF = {"dense": "dense", "csr": "dense", "csr_gathered": "active"}

# A path has to win by this share of the dense time: noise must not make steps slower.
MARGIN = 0.03
# Of a second choice: layers alone that save half of their time.
CLEARLY = 0.5
_ROUNDS, _SECONDS = 5, 0.003


class Layer(NamedTuple):
    """What a layer computes, but for its bias; hashable.

    Attributes:
      product: as `execution.linear`, `(x, kernel, plan, grad=...)`; hashable, and
        dense without a plan.
      kernel_shape: [..., out]; a plan sees all leading dimensions as inputs.
      input_shape: of one example.
      turned: whether the dense product too has the batch innermost.
      dtype: of inputs and kernel.
    """

    product: Callable
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    turned: bool = False
    dtype: str = "float32"


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
    layers: Mapping[str, Layer],
    n_active: Mapping[str, int],
    batch: int,
    *,
    without_dx: Collection[str] = (),
    dense_grads: bool = False,
    override: Mapping[str, str] | None = None,
    margin: float = MARGIN,
) -> dict[str, str]:
    """A path for each layer, measured once in a process.

    A layer takes some milliseconds to measure, and a second or two to compile.

    Args:
      layers: by name.
      n_active: active weights of each masked layer; layers without one are dense.
      batch: number of examples.
      without_dx: layers whose input needs no gradient, as the first one's.
      dense_grads: for rules that look at the dense gradient at every step: the path
        without it is left out.
      override: paths by layer that are taken as they are.
      margin: share of the dense time that a path has to save.

    Raises:
      ValueError: a layer or path that does not exist.

    Guarantees:
      - A layer is dense where no other path was measured faster by the margin.
      - The same arguments give the same paths within a process.
    """
    override = {} if override is None else dict(override)
    for name, path in override.items():
        if name not in layers or path not in PATHS:
            raise ValueError(
                f"override={{{name!r}: {path!r}}}: give one of {', '.join(PATHS)} "
                f"for one of {', '.join(layers)}"
            )

    def path_of(name):
        if name in override:
            return override[name]
        if name not in n_active:
            return "dense"
        size = layers[name], n_active[name], batch
        return fastest(measure(*size, name not in without_dx), dense_grads, margin)

    return {name: path_of(name) for name in layers}


def fastest(times: Times, dense_grads: bool = False, margin: float = MARGIN) -> str:
    """The path to take by its times; see `choose`."""
    paths = ("csr",) if dense_grads else ("csr", "csr_gathered")
    best = min(paths, key=lambda path: getattr(times, path))
    wins = getattr(times, best) <= (1 - margin) * times.dense
    return best if wins else "dense"


@cache
def measure(
    layer: Layer,
    n_active: int,
    batch: int,
    with_dx: bool = True,
) -> Times:
    """Times of one layer with a random mask on the present backend.

    Args:
      layer: without its bias.
      n_active: active weights.
      batch: number of examples.
      with_dx: whether the gradient of x is computed as well.
    """
    rng = np.random.default_rng(0)
    plan = structure_on_host(random_mask(rng, layer, n_active))

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), layer.dtype)

    x, kernel = draw((batch, *layer.input_shape)), draw(layer.kernel_shape)
    dy = draw(jax.eval_shape(partial(layer.product), x, kernel, None).shape)

    def pass_of(path):
        # Between two layers activations lie as the products want them, for compressed
        # rows with the batch innermost; the first layer's input lies as the data do.
        sparse = path != "dense"
        turn_y = sparse or layer.turned
        turn_x = turn_y and with_dx

        def both(x, kernel, plan: Structure | None, dy):
            def product(kernel, x):
                own = _back(x, turn_x), kernel, plan
                return turned(layer.product(*own, grad=GRAD_OF[path]), turn_y)

            if with_dx:
                y, pull = jax.vjp(product, kernel, x)
            else:
                y, pull = jax.vjp(lambda kernel: product(kernel, x), kernel)
            return y, pull(dy)

        args = turned(x, turn_x), kernel, plan if sparse else None, turned(dy, turn_y)
        return repeatable(both, args)

    return Times(*least([pass_of(path) for path in PATHS]))


@cache
def measure_forward(layer: Layer, n_active: int, batch: int) -> tuple[float, float]:
    """Seconds of the forward pass of one layer: dense, and with a `Compressed` kernel.

    For the arguments see `measure`.
    """
    rng = np.random.default_rng(0)
    mask = random_mask(rng, layer, n_active)
    x = jnp.asarray(rng.normal(size=(batch, *layer.input_shape)), layer.dtype)
    kernel = jnp.asarray(rng.normal(size=layer.kernel_shape), layer.dtype)
    passes = []
    for own in (kernel, compress(kernel, mask)):
        turn = layer.turned or own is not kernel

        def forward(x, kernel, turn=turn):
            return turned(layer.product(_back(x, turn), kernel, None), turn)

        passes.append(repeatable(forward, (turned(x, turn), own)))
    dense, compressed = least(passes)
    return dense, compressed


def random_mask(rng, layer: Layer, n_active: int):
    """A mask of the kernel as a matrix."""
    mask = np.zeros(math.prod(layer.kernel_shape), bool)
    mask[rng.choice(mask.size, n_active, replace=False)] = True
    return mask.reshape(-1, layer.kernel_shape[-1])


def best_of(fn: Callable, arguments: Sequence[tuple]) -> tuple[int, float]:
    """For which arguments a whole program takes the least time.

    Args:
      fn: of all of them.
      arguments: the first ones compute everything densely.

    Returns:
      The index, 0 unless another one saves `MARGIN`; its time over that of the first.
    """
    if len(arguments) == 1:
        return 0, 1.0
    times = least([repeatable(fn, args) for args in arguments])
    found = min(range(len(times)), key=times.__getitem__)
    found = found if times[found] <= (1 - MARGIN) * times[0] else 0
    return found, times[found] / times[0]


def table(
    layers: Mapping[str, Layer],
    n_active: Mapping[str, int],
    batch: int,
    paths: Mapping[str, str],
    *,
    without_dx: Collection[str] = (),
) -> str:
    """The choice as lines to print: milliseconds of each path, and the one taken."""
    line = "{:<24}{:>16}{:>9}{:>9}{:>9}{:>14}  {}"
    rows: list[tuple] = [("layer", "shape", "active", *PATHS, "path")]
    for name, layer in layers.items():
        times = ("-",) * 3
        if name in n_active:
            size = layer, n_active[name], batch
            found = measure(*size, name not in without_dx)
            times = tuple(f"{1e3 * t:.3f}" for t in found)
        n = n_active.get(name, math.prod(layer.kernel_shape))
        shape = "x".join(map(str, layer.kernel_shape))
        rows.append((name, shape, n, *times, paths[name]))
    return "\n".join(line.format(*row) for row in rows)


def turned(x, turn):
    """[b ... c] with the batch innermost and the features outermost, or as it is."""
    return x.transpose(-1, *range(1, x.ndim - 1), 0) if turn else x


_back = turned  # its own inverse


def repeatable(fn: Callable, args: tuple) -> Callable[[], Any]:
    """A call of the compiled function that waits for its end."""
    compiled = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def least(passes: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of each: the least disturbed of some rounds, taking turns."""

    def turn(fn, n):
        start = time.perf_counter()
        for _ in range(n):
            fn()
        return (time.perf_counter() - start) / n

    for fn in passes:
        fn()
    repeats = [max(1, round(_SECONDS / max(turn(fn, 1), 1e-6))) for fn in passes]
    times = [
        [turn(fn, n) for fn, n in zip(passes, repeats, strict=True)]
        for _ in range(_ROUNDS)
    ]
    return [min(own) for own in zip(*times, strict=True)]
