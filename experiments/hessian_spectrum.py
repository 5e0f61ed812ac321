"""Exact Hessian spectra along training, before and after rewires (section 3.6).

All eigenvalues of the Hessian of the mean cross-entropy, without weight decay, over
the active parameters of LeNet-5, for RigL, SET and RigL inverted from the per-neuron
initialisation: at the first rewire after each of some checkpoints.

Most negative eigenvalues are tiny, and how many there are depends on what counts as
zero. New directions of descent are those of some size, so these are counted too.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import analyses
from experiments.analyses import Question
from experiments.publish import Tables
from experiments.trainings import Setup, Training
from lottery_flow.analysis import figures, results, spectrum

ABOUT = "exact spectra before and after rewires along training"
METHODS = ("rigl", "set", "rigl_inverted")
WHEN = ("before", "after")
THRESHOLDS = (-0.01, -0.1)
# What of a spectrum is compared before and after: how it is called, and its digits.
QUANTITIES = {
    "negative": ("negative", 1),
    **{f"below_{t}": (f"below {t}", 1) for t in THRESHOLDS},
    "negative_mass": ("negative share of the magnitude", 3),
    "smallest": ("smallest", 3),
    "largest": ("largest", 3),
    "dead": ("parameters without effect", 1),
}


def settings(setup: Setup) -> dict:
    """Where, on how many images, and what counts as negative."""
    return {
        "checkpoints": [0, 6] if setup.smoke else [0, 500, 1000, 2000, 5000],
        "examples": 20 if setup.smoke else 2000,
        # Relative to the largest eigenvalue; rounding stays below it.
        "tolerance": 1e-6,
    }


def runs(setup: Setup) -> list[Training]:
    """The three rules on LeNet-5."""
    return [Training("lenet5", m, "per_neuron", "pruned") for m in METHODS]


def collect(setup: Setup) -> Tables:
    """A row for each spectrum; `eigenvalues` has all those of the first seed."""
    own, lines, values = settings(setup), [], []
    options = (("examples", own["examples"]),)
    asked = [
        (
            t,
            seed,
            step,
            Question("rewire_spectra", t.run(setup, seed), step, (), options),
        )
        for t in runs(setup)
        for seed in t.seeds(setup)
        for step in own["checkpoints"]
    ]
    found = analyses.answers([question for *_, question in asked], setup)
    for (training, seed, step, _), answer in zip(asked, found, strict=True):
        about = training.columns(setup) | {"seed": seed, "checkpoint": step}
        for when in WHEN:
            one = results.load(f"{answer.stem}_{when}.npz", spectrum.Spectrum)
            counts = one.counts(own["tolerance"])
            lines.append(
                about
                | {"when": when}
                | counts
                | {f"below_{t}": int(np.sum(one.eigenvalues < t)) for t in THRESHOLDS}
                | {
                    "negative_mass": one.negative_mass(),
                    "smallest": one.eigenvalues[0],
                    "largest": one.eigenvalues[-1],
                }
            )
            if seed == setup.seeds[0]:
                frame = pd.DataFrame({"eigenvalue": one.eigenvalues})
                values.append(
                    frame.assign(method=training.method, checkpoint=step, when=when)
                )
    rows = pd.DataFrame(lines)
    return {"": rows, "eigenvalues": pd.concat(values), "change": _change(rows)}


def _change(rows: pd.DataFrame) -> pd.DataFrame:
    """Means before and after, and the extremes of the change, over the seeds."""
    by = ["method", "checkpoint"]
    found = []
    for quantity in QUANTITIES:
        table = rows.pivot(index=[*by, "seed"], columns="when", values=quantity)
        table = table.assign(change=table["after"] - table["before"])
        groups = table.groupby(level=by, sort=False)
        means = groups[["before", "after", "change"]].mean()
        extremes = groups["change"].agg(["min", "max"])
        found.append(means.join(extremes).reset_index().assign(quantity=quantity))
    return pd.concat(found, ignore_index=True)


def plot(found: Tables) -> dict[str, Figure]:
    """Negative eigenvalues along training, and the spectra of the first seed."""
    rows, eigenvalues = found[""], found["eigenvalues"]
    shown = ("negative", "below_-0.01", "smallest")
    fig, axes = figures.new(1, len(shown))
    for ax, column in zip(axes, shown, strict=True):
        for i, method in enumerate(METHODS):
            for when, style in zip(WHEN, ("o--", "s-"), strict=True):
                own = rows[(rows["method"] == method) & (rows["when"] == when)]
                mean = own.groupby("checkpoint")[column].mean()
                ax.plot(
                    mean.index, mean, f"C{i}{style}", label=f"{method}, {when}", ms=4
                )
        # Linear up to the second checkpoint.
        ax.set_xscale("symlog", linthresh=sorted(set(rows["checkpoint"]))[1])
        ax.set(xlabel="rewire after step")
    axes[0].set(ylabel="negative eigenvalues")
    axes[1].set(ylabel="eigenvalues below -0.01")
    axes[2].set(ylabel="smallest eigenvalue")
    axes[0].legend(fontsize=7)
    steps = sorted(set(eigenvalues["checkpoint"]))
    spectra, grid = figures.new(len(METHODS), len(steps), squeeze=False, sharex=True)
    for line, method in zip(grid, METHODS, strict=True):
        for ax, step in zip(line, steps, strict=True):
            for when in WHEN:
                own = eigenvalues[
                    (eigenvalues["method"] == method)
                    & (eigenvalues["checkpoint"] == step)
                    & (eigenvalues["when"] == when)
                ]["eigenvalue"]
                values = np.sort(own)
                ax.plot(values, np.arange(len(values)), label=when, lw=1)
            ax.set_xscale("symlog", linthresh=1e-4)
            ax.set(title=f"{method}, after step {step}")
            ax.set_xticks([-1, -1e-2, 0, 1e-2, 1, 100])
    grid[0, 0].legend(fontsize=9)
    for ax in grid[-1]:
        ax.set(xlabel="eigenvalue")
    for ax in grid[:, 0]:
        ax.set(ylabel="eigenvalues up to there")
    return {"": fig, "eigenvalues": spectra}


def beside(found: Tables) -> pd.DataFrame:
    """What rewires do to the negative eigenvalues: means over the seeds."""
    change = found["change"].set_index(["method", "checkpoint"])
    lines = []
    for (method, checkpoint), own in change.groupby(level=[0, 1], sort=False):
        rows = own.set_index("quantity")
        line: dict[str, object] = {"rule": method, "checkpoint": checkpoint}
        for quantity, (name, digits) in QUANTITIES.items():
            row = rows.loc[quantity]
            line[name] = f"{row['before']:.{digits}f} {row['change']:+.{digits}f}"
        lines.append(line)
    return pd.DataFrame(lines)
