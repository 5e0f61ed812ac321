"""Test accuracy of every method under every initialisation (the paper's table 1).

LeNet-5 at 95 % sparsity and the 300-100 MLP at 98 %. Sparse methods start from the
masks of the pruning run of the same seed; scratch from permuted and from random masks
too, which tells the worth of the layer sizes and of the positions apart.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import paper, tables
from experiments.publish import Tables
from experiments.trainings import INITS, Setup, Training
from lottery_flow.analysis import figures

ABOUT = "test accuracy of every method under every initialisation"
NETWORKS = ("lenet5", "mlp")
DYNAMIC = ("set", "rigl", "rigl_inverted")
BY = ["data", "network", "method", "masks", "init"]


def settings(setup: Setup) -> dict:
    """Nothing beside the trainings."""
    return {}


def runs(setup: Setup, data: str = "mnist") -> list[Training]:
    """All methods on both networks."""
    found = []
    for network in NETWORKS:
        found += [
            Training(network, method, data=data)
            for method in ("dense", "small_dense", "prune")
        ]
        found.append(Training(network, "lottery", masks="pruned", data=data))
        for masks in ("pruned", "shuffled", "random"):
            found += [Training(network, "scratch", init, masks, data) for init in INITS]
        for method in DYNAMIC:
            found += [Training(network, method, init, "pruned", data) for init in INITS]
    return found


def collect(setup: Setup, data: str = "mnist") -> Tables:
    """A row for each run; `summary` has one for each setting."""
    columns = ("test_accuracy", "test_loss", "gradient_norm", "density")
    rows = tables.ends(runs(setup, data), setup, columns)
    return {"": rows, "summary": summary(rows)}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of the accuracy in percent, and the seeds that never learned."""
    found = tables.mean_and_spread(rows, BY, "test_accuracy", 100.0)
    stuck = tables.at_chance(rows.set_index(BY)["test_accuracy"])
    stuck = stuck.groupby(level=BY, sort=False)
    return found.assign(at_chance=stuck.sum().to_numpy())


def plot(found: Tables) -> dict[str, Figure]:
    """Accuracy of every run, by method; colour is the initialisation."""
    rows = found[""]
    networks = list(dict.fromkeys(rows["network"]))
    fig, axes = figures.new(len(networks), 2, squeeze=False)
    fig.set_size_inches(12, 4.2 * len(networks))
    for line, network in zip(axes, networks, strict=True):
        own = rows[rows["network"] == network]
        names = _names(own)
        order = list(dict.fromkeys(names))
        best = np.floor(100 * own["test_accuracy"].max())
        for ax, limits in zip(line, ((0, 100.3), (best - 9, best + 1.3)), strict=True):
            for i, init in enumerate(INITS):
                part = own[own["init"] == init]
                place = [order.index(n) + 0.25 * (i - 1) for n in names[part.index]]
                ax.plot(place, 100 * part["test_accuracy"], f"C{i}.", label=init)
            ax.set_xticks(range(len(order)), order, rotation=40, ha="right", fontsize=8)
            ax.set(ylabel="test accuracy (%)", title=network, ylim=limits)
            ax.grid(axis="y", alpha=0.3)
        line[0].legend(fontsize=8)
    return {"": fig}


def beside(found: Tables) -> pd.DataFrame:
    """Ours for each setting, and the paper's where it gives a number."""
    theirs = {
        ("lenet5", "lottery"): paper.ENSEMBLE_ACCURACY["lottery"],
        ("lenet5", "prune"): paper.ENSEMBLE_ACCURACY["pruning solution"],
        ("lenet5", "scratch"): paper.ENSEMBLE_ACCURACY["scratch, other inits"],
    }
    lines = []
    for row in found["summary"].to_dict("records"):
        original = row["init"] == "masked_dense" and row["masks"] in ("", "pruned")
        known = None
        if original and row["data"] == "mnist":
            known = theirs.get((row["network"], row["method"]))
        lines.append(
            {
                **{k: row[k] for k in ("network", "method", "masks", "init")},
                "test accuracy (%)": tables.plus_minus(row["mean"], row["std"]),
                "lowest": f"{row['min']:.2f}",
                "at chance": f"{row['at_chance']} of {row['count']}",
                "paper": tables.plus_minus(*known) if known else "",
            }
        )
    return pd.DataFrame(lines)


def _names(rows: pd.DataFrame) -> pd.Series:
    other = rows["masks"].where(rows["masks"].isin(["shuffled", "random"]), "")
    return (rows["method"] + " " + other).str.strip()
