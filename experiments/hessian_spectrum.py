"""Exact Hessian spectra along training, before and after rewires (section 3.6).

All eigenvalues of the Hessian of the mean cross-entropy, without weight decay, over
the active parameters of LeNet-5, for RigL, SET and RigL inverted from the per-neuron
initialisation: at the first rewire after each of some checkpoints.
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
    """After less before, mean and extremes over the seeds."""
    by = ["method", "checkpoint"]
    table = rows.pivot(index=[*by, "seed"], columns="when", values="negative")
    mass = rows.pivot(index=[*by, "seed"], columns="when", values="negative_mass")
    change = (table["after"] - table["before"]).groupby(level=by, sort=False)
    found = change.agg(["mean", "min", "max"]).reset_index()
    more = (mass["after"] - mass["before"]).groupby(level=by, sort=False).mean()
    before = table["before"].groupby(level=by, sort=False).mean()
    return found.assign(
        negative_before=before.to_numpy(), negative_mass=more.to_numpy()
    )


def plot(found: Tables) -> dict[str, Figure]:
    """Negative eigenvalues along training, and the spectra of the first seed."""
    rows, eigenvalues = found[""], found["eigenvalues"]
    fig, axes = figures.new(1, 2)
    for ax, column in zip(axes, ("negative", "negative_mass"), strict=True):
        for i, method in enumerate(METHODS):
            for when, style in zip(WHEN, ("o--", "s-"), strict=True):
                own = rows[(rows["method"] == method) & (rows["when"] == when)]
                mean = own.groupby("checkpoint")[column].mean()
                ax.plot(
                    mean.index, mean, f"C{i}{style}", label=f"{method}, {when}", ms=4
                )
        ax.set(xlabel="rewire after step", xscale="symlog")
    axes[0].set(ylabel="negative eigenvalues")
    axes[1].set(ylabel="share of the magnitude that is negative")
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
            ax.set(xscale="symlog", title=f"{method}, after step {step}")
            ax.set_xscale("symlog", linthresh=1e-4)
            ax.legend(fontsize=7)
    return {"": fig, "eigenvalues": spectra}


def beside(found: Tables) -> pd.DataFrame:
    """What rewires do to the negative eigenvalues, means over the seeds."""
    change = found["change"]
    return pd.DataFrame(
        {
            "rule": change["method"],
            "checkpoint": change["checkpoint"],
            "negative before": change["negative_before"].map("{:.1f}".format),
            "change": change["mean"].map("{:+.1f}".format),
            "from": change["min"],
            "to": change["max"],
            "change of their mass": change["negative_mass"].map("{:+.4f}".format),
        }
    )
