"""One layer on its own: its time over the dense time, by sparsity."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Ratio, again, compare
from lottery_flow.analysis import figures
from lottery_flow.models.execution import Convolution
from lottery_flow.sparsity import execution
from lottery_flow.sparsity.execution_choice import Layer, random_mask, turned
from lottery_flow.sparsity.execution_structure import structure_on_host

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def _dense(n_in, n_out, batch):
    layer = Layer(execution.linear, (n_in, n_out), (n_in,))
    return f"{n_in}x{n_out}, batch {batch}", layer, batch


def _conv(size, n_in, n_out, side, batch, lowering="convolution"):
    pad = ((size // 2,) * 2,) * 2
    product = Convolution((size, size), (1, 1), pad, lowering)
    name = f"{size}x{size}x{n_in}x{n_out} on {side}x{side}, batch {batch}"
    kernel = size, size, n_in, n_out
    innermost = lowering == "patches"
    return name, Layer(product, kernel, (side, side, n_in), innermost), batch


# Layers of the MLPs, LeNet-5, WRN-22-2 and ResNet-50, with the lowering of the dense
# convolution that is taken on a CPU.
PANELS = [
    *(_dense(784, 300, batch) for batch in (16, 128, 512)),
    *(_dense(300, 100, batch) for batch in (16, 128, 512)),
    *(_dense(1024, 1024, batch) for batch in (16, 128, 512)),
    _conv(5, 6, 16, 12, 128, "patches"),
    _conv(3, 64, 64, 16, 32),
    _conv(3, 128, 128, 8, 32),
    _conv(1, 256, 64, 28, 8),
    _conv(1, 1024, 256, 14, 8),
    _conv(3, 512, 512, 7, 8),
]
# Of the forward pass of one of them.
TARGETS = {("1024x1024, batch 128", 0.95): 0.30, ("1024x1024, batch 128", 0.98): 0.15}
FORWARD, BOTH = "forward, compressed", "forward + backward"


def curves(rounds: int) -> Iterator[Ratio]:
    """One layer on its own: forward, and forward with both gradients."""
    for panel in PANELS:
        yield from _layer(*panel, rounds)


def _layer(label, layer: Layer, batch, rounds):
    """Every sparsity and path of one layer over its dense products.

    The compressed rows get and give activations as they lie between two such layers,
    with the batch innermost; XLA's dense products with the features innermost.
    """
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), "float32")

    x, kernel = draw((batch, *layer.input_shape)), draw(layer.kernel_shape)
    dy = draw(jax.eval_shape(functools.partial(layer.product), x, kernel, None).shape)

    def forward(x, kernel, plan, turn, grad="dense"):
        return turned(layer.product(turned(x, turn), kernel, plan, grad=grad), turn)

    def both(x, kernel, plan, dy, turn, grad):
        own = functools.partial(forward, plan=plan, turn=turn, grad=grad)
        y, pull = jax.vjp(lambda x, k: own(x, k), x, kernel)
        return y, pull(dy)

    groups: dict[str, dict[str, Callable]] = {FORWARD: {}, BOTH: {}}
    targets = {}

    def add(group, name, fn, *args, **own):
        compiled = jax.jit(functools.partial(fn, **own)).lower(*args).compile()
        groups[group][f"{label}: {group}, {name}"] = again(compiled, *args)

    own = turned(x, layer.turned), kernel, None
    add(FORWARD, "dense", forward, *own, turn=layer.turned)
    own = *own, turned(dy, layer.turned)
    add(BOTH, "dense", both, *own, turn=layer.turned, grad="dense")
    for sparsity in SPARSITIES:
        amount = f"{100 * sparsity:g} %"
        mask = random_mask(rng, layer, round((1 - sparsity) * kernel.size))
        compressed = execution.compress(kernel, mask)
        add(FORWARD, amount, forward, turned(x, True), compressed, None, turn=True)
        if (label, sparsity) in TARGETS:
            name = f"{label}: {FORWARD}, {amount}"
            targets[name] = TARGETS[label, sparsity]
        own = turned(x, True), kernel, structure_on_host(mask), turned(dy, True)
        for grad in execution.GRADS:
            name = f"{amount}, {grad} gradient"
            add(BOTH, name, both, *own, turn=True, grad=grad)
    for group, ways in groups.items():
        reference = f"{label}: {group}, dense"
        yield from compare(
            ways, reference, targets=targets, rounds=rounds, seconds=0.02
        )


def plot(rows: list[Ratio]):
    """Ratios against sparsity, a panel for each layer."""
    figure, axes = figures.new(
        len(PANELS) // 3, 3, sharex=True, sharey=True, squeeze=False
    )
    figure.set_size_inches(10, 12)
    series = {
        "forward": (FORWARD, ""),
        "with gradients": (BOTH, ", dense gradient"),
        "at active weights": (BOTH, ", active gradient"),
    }
    by_name = {r.name: r for r in rows}
    positions = [str(round(100 * s)) for s in SPARSITIES]
    for ax, (title, *_) in zip(axes.flat, PANELS, strict=True):
        for label, (group, suffix) in series.items():
            names = [f"{title}: {group}, {100 * s:g} %{suffix}" for s in SPARSITIES]
            found = [by_name[n] for n in names]
            ax.plot(positions, [r.ratio for r in found], marker="o", label=label)
            low, high = ([getattr(r, q) for r in found] for q in ("low", "high"))
            ax.fill_between(positions, low, high, alpha=0.2)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set_yscale("log")
        ax.set_title(title, fontsize=8)
        ax.grid(alpha=0.3, which="both")
    for ax in axes[-1]:
        ax.set_xlabel("sparsity (%)")
    for row in axes:
        row[0].set_ylabel("time / dense time")
    axes[0][0].legend(fontsize=7)
    return figure
