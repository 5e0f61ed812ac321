"""Gradient norm during training (the paper's figure 2, LeNet-5).

The L2 norm of the gradient of the mean cross-entropy over all active parameters, on
the first 1,000 training images, without weight decay; a "+" is the per-neuron
initialisation.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import paper, tables
from experiments.bands import band
from experiments.publish import Tables
from experiments.trainings import Setup, Training
from lottery_flow.analysis import figures

ABOUT = "gradient norm during training"
METHODS = ("lottery", "scratch", "set", "rigl")
# Of a method in both panels.
COLORS = {
    "lottery": "C0",
    "scratch": "C1",
    "set": "C2",
    "rigl": "C3",
    "small_dense": "C4",
    "dense": "C7",
    "prune": "C5",
}


def settings(setup: Setup) -> dict:
    """Nothing beside the trainings."""
    return {}


def runs(setup: Setup, data: str = "mnist") -> list[Training]:
    """LeNet-5 by all methods of the figure."""
    found = [
        Training("lenet5", method, data=data)
        for method in ("dense", "small_dense", "prune")
    ]
    found += [Training("lenet5", m, masks="pruned", data=data) for m in METHODS]
    found += [Training("lenet5", m, "per_neuron", "pruned", data) for m in METHODS[1:]]
    return found


def collect(setup: Setup, data: str = "mnist") -> Tables:
    """A row for each run and logged step."""
    return {"": tables.curves(runs(setup, data), setup, ["gradient_norm"])}


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column `curve`, the method with a + for the sparse init."""
    plus = np.where(rows["init"] == "per_neuron", "+", "")
    return rows.assign(curve=rows["method"] + plus)


def plot(found: Tables) -> dict[str, Figure]:
    """Mean and range over the seeds; the paper's curves as dots."""
    rows = named(found[""])
    published, names = set(rows["data"]) == {"mnist"}, set(rows["curve"])
    fig, axes = figures.new(1, 2, sharey=True)
    sparse = ["lottery", "scratch", "scratch+", "rigl+", "small_dense"]
    others = [c for c in dict.fromkeys(rows["curve"]) if c not in sparse]
    for ax, curves in zip(axes, (sparse, [*others, "rigl+"]), strict=True):
        for curve in curves:
            own = rows[(rows["curve"] == curve) & (rows["step"] > 0)]
            color = COLORS[curve.removesuffix("+")]
            dashed = f"{curve}+" in names  # the masked dense one of two initialisations
            band(ax, own, "step", "gradient_norm", color, curve, dashed=dashed)
            if ax is axes[0] and published:
                dots = paper.GRADIENT_NORM[curve]
                shape = {"mfc": "none"} if dashed else {}
                ax.plot(list(dots), list(dots.values()), f"{color}o", ms=3.5, **shape)
        ax.set(xscale="log", yscale="log", xlabel="step", ylabel="gradient norm")
        ax.legend(fontsize=8, loc="upper right")
    if published:
        axes[0].set_title("lines: ours, dots: the paper", fontsize=10)
    axes[0].set_ylim(top=2.5 * axes[0].get_ylim()[1])  # room for the legends
    axes[1].set_title("the other methods, and RigL+ again", fontsize=10)
    return {"": fig}


def beside(found: Tables) -> pd.DataFrame:
    """Means at some steps, ours and the paper's."""
    mean = (
        named(found[""]).groupby(["curve", "step"], sort=False)["gradient_norm"].mean()
    )
    lines = []
    for curve, theirs in paper.GRADIENT_NORM.items():
        for step in (100, 200, 600, 1000, 2000, 5000, 11719):
            if (curve, step) in mean.index:
                ours = mean[curve, step]
                lines.append((curve, step, f"{ours:.3f}", f"{theirs[step]:.3f}"))
    return pd.DataFrame(lines, columns=["curve", "step", "ours", "paper"])
