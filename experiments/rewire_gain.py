"""What a rewire does to the gradient norm (the paper's figure 3, LeNet-5).

Norm after minus norm before, on the same first 1,000 training images, at every rewire
of RigL, SET and RigL inverted, from the dense initialisation and from the per-neuron
one (+).
"""

import pandas as pd
from matplotlib.figure import Figure

from experiments import tables
from experiments.bands import band
from experiments.gradient_flow_training import named
from experiments.publish import Tables
from experiments.trainings import Setup, Training
from lottery_flow.analysis import figures

ABOUT = "change of the gradient norm at every rewire"
METHODS = ("rigl", "set", "rigl_inverted")
# Ends of the windows, in steps, over which the table averages.
WINDOWS = (500, 1000, 2000, 5000, 12_000)


def settings(setup: Setup) -> dict:
    """Nothing beside the trainings."""
    return {}


def runs(setup: Setup) -> list[Training]:
    """LeNet-5 by the three rules from both initialisations."""
    return [
        Training("lenet5", method, init, "pruned")
        for method in METHODS
        for init in ("masked_dense", "per_neuron")
    ]


def collect(setup: Setup) -> Tables:
    """A row for each run and rewire; `windows` has means over some of them."""
    columns = ["gradient_norm_before", "gradient_norm_after"]
    rows = tables.curves(runs(setup), setup, columns)
    gain = rows["gradient_norm_after"] - rows["gradient_norm_before"]
    rows = rows.assign(gain=gain)
    return {"": rows, "windows": _windows(rows)}


def _windows(rows: pd.DataFrame) -> pd.DataFrame:
    end = pd.cut(rows["step"], [0, *WINDOWS], labels=WINDOWS).astype(int)
    by = ["method", "init", "up_to_step"]
    found = rows.assign(up_to_step=end).groupby(by, sort=False)["gain"]
    table = found.agg(["mean", "min", "max", "count"]).reset_index()
    up = found.agg(lambda gain: (gain > 0).mean()).to_numpy()
    return table.assign(share_positive=up)


def plot(found: Tables) -> dict[str, Figure]:
    """Mean and range over the seeds at every rewire."""
    rows = named(found[""])
    fig, axes = figures.new(1, 2, sharey=True)
    for ax, plus in zip(axes, ("+", ""), strict=True):
        for i, method in enumerate(METHODS):
            own = rows[rows["curve"] == method + plus]
            band(ax, own, "step", "gain", f"C{i}", method + plus)
        ax.set(xscale="log", xlabel="step", ylabel="change of the gradient norm")
        ax.axhline(0, color="black", lw=0.6)
        ax.legend(fontsize=8)
    return {"": fig}


def beside(found: Tables) -> pd.DataFrame:
    """Our means by window."""
    windows = found["windows"]
    return windows.assign(
        mean=windows["mean"].map("{:+.3f}".format),
        share_positive=windows["share_positive"].map("{:.0%}".format),
    )[["method", "init", "up_to_step", "mean", "share_positive"]]
