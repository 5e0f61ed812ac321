"""What is timed: a function for each question, by name in `CASES`."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import pipeline
from benchmarks.measure import Ratio, again, compare
from benchmarks.networks import (
    SETTINGS,
    create_model,
    data,
    dense_step,
    sparse_steps,
    statistics_of,
)
from lottery_flow import population
from lottery_flow.analysis import batches, hutchinson, lanczos, objective
from lottery_flow.analysis import curvature as curvature_lib
from lottery_flow.parallel import Devices
from lottery_flow.population import less_memory
from lottery_flow.sparsity.active import active_space
from lottery_flow.sparsity.topk import topk_mask
from lottery_flow.steps import normalize


class Loop:
    """A step called again and again on the state that it returned."""

    def __init__(self, step: Callable, state, *args):
        self.step, self.state, self.args = step, state, args

    def __call__(self, n: int) -> None:
        for _ in range(n):
            self.state, *measured = self.step(self.state, *self.args)
        jax.block_until_ready((self.state, measured))


def steps(name: str, **limits: float) -> Iterator[Ratio]:
    """An ordinary sparse step, and one with a rewire, over the dense step."""
    setting = SETTINGS[name]
    model, images = create_model(setting), data(setting)
    indices = jnp.arange(setting.batch_size)
    state, step = dense_step(setting, model)
    dense = Loop(jax.jit(step, donate_argnums=0), state, images, indices)
    ways: dict[str, Callable] = {f"{name}: dense step": dense}
    for kind in ("step", "rewire"):
        state, own = sparse_steps(setting, model)
        fn = own.train if kind == "step" else partial(own.rewire, grow=None)
        options = less_memory() if kind == "rewire" else None
        compiled = jax.jit(fn, donate_argnums=0, compiler_options=options)
        ways[f"{name}: sparse {kind}"] = Loop(compiled, state, {}, images, indices)
    targets = {f"{name}: sparse {k}": v for k, v in limits.items()}
    yield from compare(ways, f"{name}: dense step", targets=targets)


def memory(name: str = "resnet50", target: float = 1.05) -> Iterator[Ratio]:
    """Temporary memory of the compiled steps over the dense step's (in MB, not ms)."""
    setting = SETTINGS[name]
    model, images = create_model(setting), data(setting, setting.batch_size)
    indices = jnp.arange(setting.batch_size)

    def temporary(fn, *args, options=None) -> float:
        jitted = jax.jit(fn, donate_argnums=0, compiler_options=options)
        compiled = jitted.lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    dense_state, dense_fn = dense_step(setting, model)
    dense = temporary(dense_fn, dense_state, images, indices)
    state, own = sparse_steps(setting, model)
    for kind, fn in (("step", own.train), ("rewire", partial(own.rewire, grow=None))):
        options = less_memory() if kind == "rewire" else None
        used = temporary(fn, state, {}, images, indices, options=options)
        ratio = used / dense
        label = f"{name}: temporary MB, sparse {kind}"
        yield Ratio(
            label, f"{name}: dense step", ratio, ratio, ratio, used, dense, target
        )


def topk(size: int, target: float | None = None) -> Iterator[Ratio]:
    """An exact mask of the tenth with the largest scores, over one by argsort."""
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (size,)))

    @jax.jit
    def by_argsort(scores):
        order = jnp.argsort(-scores)  # stable
        return jnp.zeros(size, bool).at[order[: size // 10]].set(True)

    selection = jax.jit(topk_mask)

    ways = {
        f"top-k of {size:.2g}": again(selection, scores, jnp.int32(size // 10)),
        "argsort": again(by_argsort, scores),
    }
    targets = {} if target is None else {f"top-k of {size:.2g}": target}
    yield from compare(ways, "argsort", targets=targets, rounds=5)


def convolution(target: float = 0.65, chunk_target: float = 1.02) -> Iterator[Ratio]:
    """LeNet-5 over the same network written with XLA's convolution and pooling."""
    loops = {}
    for name in ("lenet5", "plain_lenet5"):
        setting = SETTINGS["lenet5"]._replace(name=name)
        model, images = create_model(setting), data(setting)
        state, own = sparse_steps(setting, model)
        indices = jnp.arange(setting.batch_size)
        compiled = jax.jit(own.train, donate_argnums=0)
        loops[name] = Loop(compiled, state, {}, images, indices)
    ways = {
        "lenet5: step": loops["lenet5"],
        "lenet5: step with nn.Conv and nn.max_pool": loops["plain_lenet5"],
    }
    reference = "lenet5: step with nn.Conv and nn.max_pool"
    yield from compare(ways, reference, targets={"lenet5: step": target})
    yield from chunk("lenet5", chunk_target)


def chunk(name: str, target: float | None = None, n: int = 20) -> Iterator[Ratio]:
    """Steps as one program (`lax.scan`) over a loop of compiled steps."""
    setting = SETTINGS[name]
    model, images = create_model(setting), data(setting)
    state, own = sparse_steps(setting, model)
    other, _ = sparse_steps(setting, model)
    indices = jnp.arange(n * setting.batch_size).reshape(n, -1) % 1024
    scanned = jax.jit(
        lambda state, indices: lax.scan(
            lambda s, i: own.train(s, {}, images, i), state, indices
        ),
        donate_argnums=0,
    )
    compiled = jax.jit(own.train, donate_argnums=0)
    label = f"{name}: steps in one program"
    yield from compare(
        {
            label: Loop(scanned, state, indices),
            f"{name}: loop of steps": Loop(compiled, other, {}, images, indices[0]),
        },
        f"{name}: loop of steps",
        targets={} if target is None else {label: target},
        units={label: n},
    )


def members(name: str, own: float = 1.0, shared: float = 0.8) -> Iterator[Ratio]:
    """A step of one of S members trained together over one of a network alone.

    On CPUs members take turns unless one asks for one program; both are timed, and the
    targets are those of the way that the backend chooses.
    """
    on_cpu = jax.default_backend() == "cpu"
    setting = SETTINGS[name]
    model, images = create_model(setting), data(setting)
    rng = np.random.default_rng(0)
    state, steps_ = sparse_steps(setting, model)
    alone, batch = f"{name}: alone", setting.batch_size

    def loop(n: int, way: str, share: bool) -> Loop:
        states = [jax.tree.map(jnp.copy, state) for _ in range(n)]
        pop = population.make(
            steps_, n, way=way, devices=Devices(), batch_size=batch, shared=share
        )
        shape = (setting.batch_size,) if share else (n, setting.batch_size)
        indices = rng.integers(0, 1024, shape).astype(np.int32)
        args = pop.join([{}] * n), jax.device_put(images), indices
        return Loop(pop.train, pop.join(states), *args)

    for way, share, sizes, target in (
        ("one_by_one", False, (1, 2, 5, 10, 20), 1.1 if on_cpu else None),
        ("together", False, (5, 10), None if on_cpu else own),
        ("together", True, (5, 10, 20), None if on_cpu else shared),
    ):
        what = {"one_by_one": "", "together": " in one program"}[way]
        what += ", shared batches" if share else ""
        units = {f"{name}: member of {n}{what}": n for n in sizes}
        ways = {label: loop(n, way, share) for label, n in units.items()}
        targets = {k: target for k, n in units.items() if n in (5, 10) and target}
        ways[alone] = loop(1, "one_by_one", False)
        yield from compare(ways, alone, targets=targets, units=units, rounds=7)


def curvature(n_images: int = 1024, microbatch: int = 64) -> Iterator[Ratio]:
    """Hessian-vector products of the active parameters, over the gradient.

    LeNet-5 at 95 %. `trace` takes the probes of a block, `Lanczos` steps of ten chains,
    each with full reorthogonalisation against a hundred vectors; both per product.
    """
    setting = SETTINGS["lenet5"]._replace(batch_size=microbatch)
    model, images = create_model(setting), data(setting, n_images)
    state, _ = sparse_steps(setting, model, sparsity=0.95)
    mean, std = statistics_of(setting)
    loss = objective.classification(
        model.apply, {}, preprocess=lambda x: normalize(x, mean, std)
    )
    cut = batches.split(images, microbatch)
    args = state.params, state.masks, cut
    space = active_space(state.params, state.masks)
    grad = jax.jit(lambda p, b: space.flatten(jax.grad(loss)(p, b)))
    hessian = curvature_lib.hessian(loss, *args)
    key, probes = jax.random.key(0), 10
    vectors = jax.random.normal(key, (probes, space.n))

    def chains():
        return lanczos.advance(hessian, lanczos.start(vectors, 100), key).basis

    ways = {
        "curvature: gradient": again(
            lambda: batches.mean(lambda b: grad(state.params, b), cut)
        ),
        "curvature: product": again(lambda: hessian.product(vectors[:1])),
        "curvature: product of ten": again(lambda: hessian.product(vectors)),
        "curvature: trace": again(
            lambda: hutchinson.trace(hessian, key, n_probes=probes).samples
        ),
        "curvature: Lanczos": again(chains),
    }
    ten = dict.fromkeys(list(ways)[2:], probes)
    targets = dict.fromkeys(list(ways)[1:], 3.0)
    reference = "curvature: gradient"
    yield from compare(ways, reference, targets=targets, units=ten, rounds=7)


CASES: dict[str, Callable[[], Iterator[Ratio]]] = {
    "mlp": partial(steps, "mlp", step=1.02, rewire=3.0),
    "lenet5": partial(steps, "lenet5", step=1.02),
    "wrn22_2": partial(steps, "wrn22_2"),
    "resnet50": partial(steps, "resnet50", step=1.03, rewire=1.5),
    "memory": memory,
    "topk_1e5": partial(topk, 100_000),
    "topk_2e6": partial(topk, 2_360_000, 1 / 50),
    "topk_3e7": partial(topk, 25_600_000, 1 / 15),
    "convolution": convolution,
    "chunk_mlp": partial(chunk, "mlp"),
    "members_lenet5": partial(members, "lenet5"),
    "members_mlp": partial(members, "mlp", own=1.1),
    "curvature": curvature,
    "decoding": pipeline.decoding,
    "waiting": pipeline.waiting,
}
