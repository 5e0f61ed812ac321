"""A whole run of RigL, rewires and structures included, over the masked dense one."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Ratio, clock
from lottery_flow.data import find
from lottery_flow.data.arrays import Arrays
from lottery_flow.sparsity import distributions, execution, rules, schedules
from lottery_flow.sparsity import execution_choice as choice
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.execution_structure import Structure, structure_on_host
from lottery_flow.sparsity.transform import sparsify

RATE, MOMENTUM, BATCH = 0.05, 0.9, 128
EVERY, FRACTION = 100, 0.3  # of RigL's rewires


class Net(NamedTuple):
    """A network ready to train, and what its steps need.

    Attributes:
      params: masked, named as in `models.mlp`.
      state: SparseState of `tx`.
      tx: sparsify around momentum, under RigL.
      n_active: of the masked layers.
    """

    params: Any
    state: Any
    tx: optax.GradientTransformationExtraArgs
    n_active: dict[str, int]


def start(widths, sparsity, seed: int = 0) -> Net:
    """A multi-layer perceptron, masked by Erdos-Renyi, and its optimizer."""
    key = jax.random.key(seed)
    params = {}
    for n, (i, o) in enumerate(itertools.pairwise(widths), start=1):
        draw = jax.random.normal(jax.random.fold_in(key, n), (i, o))
        params[f"fc{n}"] = {"kernel": draw * (2 / i) ** 0.5, "bias": jnp.zeros(o)}
    shapes = {k: v.shape for k, v in masks_lib.layers(params).items()}
    n_active = distributions.erdos_renyi_kernel(shapes, sparsity)
    masks = masks_lib.random(key, params, n_active)
    rule = rules.rigl(schedules.every(EVERY), schedules.constant(FRACTION))
    tx = sparsify(optax.sgd(RATE, momentum=MOMENTUM), masks, rule, key=key)
    params = masks_lib.apply(masks, params)
    masked = {k: int(m.sum()) for k, m in named_masks(masks).items()}
    return Net(params, tx.init(params), tx, masked)


def named_masks(masks) -> dict[str, Any]:
    """The masks of the sparse layers, by name."""
    named = masks_lib.named_leaves(masks).items()
    return {k: m for k, m in named if m is not None}


def choose(net: Net, widths) -> dict[str, str]:
    """The measured paths, printed."""
    layers = {
        f"fc{n}": choice.Layer(execution.linear, pair, pair[:1])
        for n, pair in enumerate(itertools.pairwise(widths), start=1)
    }
    paths = choice.choose(layers, net.n_active, BATCH, without_dx=("fc1",))
    lines = choice.table(layers, net.n_active, BATCH, paths, without_dx=("fc1",))
    print(lines, flush=True)
    return paths


def plans_of(masks, paths) -> dict[str, Structure]:
    """Structures of the layers whose path is not dense."""
    return {
        name: structure_on_host(mask)
        for name, mask in named_masks(masks).items()
        if paths.get(name, "dense") != "dense"
    }


def apply(params, x, plans, paths):
    """Logits. A layer without a plan takes the dense product."""
    for n, (name, layer) in enumerate(params.items(), start=1):
        grad = choice.GRAD_OF[paths.get(name, "dense")]
        y = execution.linear(x, layer["kernel"], plans.get(name), grad=grad)
        x = y + layer["bias"].reshape(1, -1)
        if n < len(params):
            x = jax.nn.relu(x)
    return x


def make_step(tx, paths, rewire: bool) -> Callable:
    """One compiled update; a rewire needs the dense gradients, as `csr` gives them."""
    if rewire:
        paths = {k: "csr" if p == "csr_gathered" else p for k, p in paths.items()}

    def step(carry, plans, images, labels):
        params, state = carry

        def loss_fn(params):
            logits = apply(params, images, plans, paths)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, rewire=rewire)
        return (optax.apply_updates(params, updates), state), loss

    return jax.jit(step, donate_argnums=0)


def _copy(tree):
    """Buffers of its own, to be donated."""

    def own(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.clone(leaf) if is_key else jnp.copy(leaf)

    return jax.tree.map(own, tree)


def whole_run(data_dir: str, n_steps: int) -> Iterator[Ratio]:
    """RigL on MNIST with rewires, sparse and masked dense by turns of 100 steps.

    The structures are built anew after each rewire; that is part of the time.
    """
    widths, sparsity = (784, 1024, 1024, 10), 0.98
    arrays = find("mnist", data_dir).load(data_dir)
    if not isinstance(arrays, Arrays):
        raise TypeError("MNIST is no longer read as arrays")
    images = arrays.train_images.reshape(-1, 784)
    test = jnp.asarray(arrays.test_images.reshape(-1, 784), jnp.float32) / 255
    net = start(widths, sparsity)
    ways = {"masked dense": {}, "sparse": choose(net, widths)}
    order = np.random.default_rng(0).permutation(len(images))

    def batches(first):
        for step in range(first, min(first + EVERY, n_steps)):
            start = step * BATCH % (len(images) - BATCH)
            rows = order[start : start + BATCH]
            yield images[rows].astype(np.float32) / 255, arrays.train_labels[rows]

    programs = {
        name: {r: make_step(net.tx, paths, r) for r in (False, True)}
        for name, paths in ways.items()
    }
    carries = {name: _copy((net.params, net.state)) for name in ways}
    for name, paths in ways.items():  # compiles
        for step in programs[name].values():
            plans = plans_of(net.state.masks, paths)
            jax.block_until_ready(step(_copy(carries[name]), plans, *next(batches(0))))
    times: dict[str, list[float]] = {name: [] for name in ways}
    building = 0.0
    for first in range(0, n_steps, EVERY):
        for name, paths in ways.items():
            begin, carry = clock(), carries[name]
            plans = plans_of(carry[1].masks, paths)
            building += (clock() - begin) * (name == "sparse")
            for i, batch in enumerate(batches(first), start=1):
                # The last of each hundred rewires, the very last of the run does not.
                rewire = i == EVERY and first + EVERY < n_steps
                carry, _loss = programs[name][rewire](carry, plans, *batch)
            jax.block_until_ready(carry[0])
            times[name].append(clock() - begin)
            carries[name] = carry
        print(first + EVERY, {k: round(v[-1], 3) for k, v in times.items()}, flush=True)
    for name, (params, state) in carries.items():
        logits = apply(params, test, {}, {})
        accuracy = float(jnp.mean(jnp.argmax(logits, -1) == arrays.test_labels))
        n_active = [int(m.sum()) for m in named_masks(state.masks).values()]
        print(
            f"{name}: {sum(times[name]):.2f} s, test accuracy {accuracy:.4f}, "
            f"active {n_active}",
            flush=True,
        )
    same = [
        float(jnp.mean(a == b))
        for a, b in zip(
            *(named_masks(carries[n][1].masks).values() for n in ways), strict=True
        )
    ]
    print(f"structures: {building:.2f} s; masks agree at {same} of the positions")
    sums = {name: sum(own) for name, own in times.items()}
    ratios = np.array(times["sparse"]) / np.array(times["masked dense"])
    low, high = np.quantile(ratios, (0.25, 0.75))
    total = sums["sparse"] / sums["masked dense"]
    per_step = [1e3 * sums[k] / n_steps for k in ("sparse", "masked dense")]
    label = f"RigL, {'-'.join(map(str, widths))}, 98 %, {n_steps} steps"
    yield Ratio(label, "masked dense", total, float(low), float(high), *per_step)
    print(f"{label}: {total:.3f} of the time", flush=True)
