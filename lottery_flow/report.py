"""What a finished run tells: a summary in words, and a figure."""

from pathlib import Path

from lottery_flow import counting
from lottery_flow.files import replacing
from lottery_flow.metrics import Row
from lottery_flow.models import Model
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.state import TrainState


def summary(name: str, model: Model, state: TrainState, rows: list[Row]) -> str:
    """Accuracy, gradient norm first and last, and of each layer sparsity and FLOPs.

    The last column counts outputs that no active weight of the layer leads to.

    Args:
      name: of the run.
      model: gives the output positions that FLOPs are counted with.
      state: the last one.
      rows: all rows of metrics.
    """
    layers = masks_lib.layers(state.params)
    shapes = {k: v.shape for k, v in layers.items()}
    n_active = masks_lib.counts(state.masks, state.params)
    n_all = {k: v.size for k, v in layers.items()}
    sparse, dense = (
        counting.inference_flops(shapes, model.positions, n) for n in (n_active, n_all)
    )
    empty = masks_lib.count_empty_outputs(state.masks)
    first, last = rows[0], rows[-1]
    lines = [
        f"{name}, seed {last['seed']}, {last['step']} steps",
        f"  test accuracy   {100 * last['test_accuracy']:.2f} %",
        f"  test loss       {last['test_loss']:.4f}",
        f"  gradient norm   {first['gradient_norm']:.4f} at step {first['step']}, "
        f"{last['gradient_norm']:.4f} at step {last['step']}",
        f"  sparsity        {100 * (1 - last['density']):.2f} % of "
        f"{sum(n_all.values()):,} weights",
        f"  FLOPs kept      {100 * sum(sparse.values()) / sum(dense.values()):.2f} % "
        f"of {sum(dense.values()):,.0f} for one image",
        "",
        f"  {'layer':<12}{'weights':>10}{'active':>10}{'sparsity':>10}{'FLOPs':>10}"
        f"{'outputs without weights':>27}",
    ]
    lines += [
        f"  {k:<12}{n_all[k]:>10,}{n_active[k]:>10,}"
        f"{100 * (1 - n_active[k] / n_all[k]):>8.2f} %"
        f"{100 * sparse[k] / dense[k]:>8.2f} %"
        f"{f'{empty.get(k, 0):,} of {shapes[k][-1]:,}':>27}"
        for k in layers
    ]
    return "\n".join(lines) + "\n"


def figure(path: Path, title: str, rows: list[Row]) -> None:
    """Saves accuracy, gradient norm and the gain of each rewire over the steps."""
    # Not through pyplot, whose backend is the caller's.
    from matplotlib.figure import Figure

    def column(name):
        found = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        return [x for x, _ in found], [y for _, y in found]

    rewired = [r for r in rows if "gradient_norm_after" in r]
    fig = Figure(figsize=(7, 8), layout="constrained")
    axes = fig.subplots(3, 1, sharex=True)
    axes[0].plot(*column("probe_accuracy"), color="C0", label="training (fixed batch)")
    axes[0].plot(*column("test_accuracy"), "o-", color="C1", ms=3, label="test")
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="lower right")
    axes[1].plot(*column("gradient_norm"), color="C2")
    axes[1].set_ylabel("gradient norm")
    axes[1].set_yscale("log")
    gains = [r["gradient_norm_after"] - r["gradient_norm_before"] for r in rewired]
    if rewired:
        axes[2].vlines([r["step"] for r in rewired], 0, gains, color="C3")
    else:
        axes[2].text(0.5, 0.5, "no rewires", ha="center", transform=axes[2].transAxes)
    axes[2].axhline(0, color="0.5", lw=0.8)
    axes[2].set_ylabel("gain of gradient norm\nat each rewire")
    axes[2].set_xlabel("step")
    fig.suptitle(title)
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=120)
