"""Loss on paths to the pruning solution (the paper's figure 5c), and barriers.

Straight lines from the starts and the ends of lottery, scratch and scratch+ (per-neuron
initialisation) to the pruning solution whose masks they have; the same after units are
permuted by weight matching; and a Bézier curve trained in the sparse space.
"""

from collections.abc import Collection, Iterable

import pandas as pd
from matplotlib.figure import Figure

from experiments import analyses, tables
from experiments.analyses import Question
from experiments.bands import band
from experiments.publish import Tables
from experiments.trainings import Setup, Training
from lottery_flow.analysis import figures
from lottery_flow.analysis import interpolation as paths

ABOUT = "loss from starts and ends to the pruning solution"
BY = ["curve", "kind"]
# Kind of a path -> the step that it begins at, and the study that finds it.
KINDS = {
    "start": (0, "interpolation"),
    "end": (-1, "interpolation"),
    "end, aligned": (-1, "alignment"),
    "end, curve": (-1, "curve"),
}


def settings(setup: Setup) -> dict:
    """Of lines and curves; 0 examples are all training images."""
    return {
        "examples": 100 if setup.smoke else 0,
        "train_steps": 10 if setup.smoke else 2000,
    }


def runs(setup: Setup, network: str = "lenet5", data: str = "mnist") -> list[Training]:
    """Those that share the masks of the pruning run of their seed."""
    return [
        Training(network, "lottery", masks="pruned", data=data),
        Training(network, "scratch", masks="pruned", data=data),
        Training(network, "scratch", "per_neuron", "pruned", data),
    ]


def collect(setup: Setup) -> Tables:
    """A row for each point of a path; `barriers` has one for each path."""
    rows = points(runs(setup), setup, KINDS)
    return {"": rows, "barriers": barriers(rows, BY)}


def points(
    trainings: Iterable[Training], setup: Setup, kinds: Collection[str]
) -> pd.DataFrame:
    """A row for each point of the paths of these kinds, for all seeds."""
    own, asked = settings(setup), []
    for training in trainings:
        name = training.method + ("+" if training.init == "per_neuron" else "")
        for seed in training.seeds(setup):
            assert training.source is not None
            run = training.run(setup, seed)
            target = ((training.source.run(setup, seed), -1),)
            examples = (("examples", own["examples"]),)
            trained = (*examples, ("train_steps", own["train_steps"]))
            for kind in kinds:
                step, what = KINDS[kind]
                options = trained if what == "curve" else examples
                about = training.columns(setup) | {"seed": seed}
                about |= {"curve": name, "kind": kind}
                asked.append((about, Question(what, run, step, target, options)))
    found = analyses.answers([question for _, question in asked], setup)
    frames = []
    for (about, _), answer in zip(asked, found, strict=True):
        frame = answer.table()
        if "path" in frame:  # beside the same without what was asked for
            frame = frame[frame["path"].isin(["aligned", "curve"])].drop(columns="path")
        frames.append(frame.assign(**about))
    rows = pd.concat(frames, ignore_index=True)
    return rows[[*asked[0][0], "alpha", "loss", "accuracy"]]


def barriers(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Barrier and instability of each path, which `by` and the seed tell apart."""
    lines = []
    for keys, part in rows.groupby([*by, "seed"], sort=False):
        path = paths.Path(*(part[c].to_numpy() for c in ("alpha", "loss", "accuracy")))
        lines.append((*keys, paths.barrier(path), paths.instability(path)))
    return pd.DataFrame(lines, columns=[*by, "seed", "barrier", "instability"])


def plot(found: Tables) -> dict[str, Figure]:
    """Mean and range over the seeds of the loss along each kind of path."""
    rows = found[""]
    kinds = list(dict.fromkeys(rows["kind"]))
    fig, axes = figures.new(1, len(kinds), sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        for i, curve in enumerate(dict.fromkeys(rows["curve"])):
            own = rows[(rows["kind"] == kind) & (rows["curve"] == curve)]
            band(ax, own, "alpha", "loss", f"C{i}", curve)
        ax.set(xlabel="alpha (1: the pruning solution)", title=f"from {kind}")
        ax.set(ylabel="training loss", yscale="log")
        ax.legend(fontsize=8)
    return {"": fig}


def beside(found: Tables, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """Barriers of each kind of path, and `by` what else they are told apart."""
    rows = found["barriers"]
    summary = tables.mean_and_spread(rows, [*by, *BY], "barrier")
    return pd.DataFrame(
        {
            **{k: summary[k] for k in by},
            "from": summary["curve"] + " " + summary["kind"],
            "barrier": map(tables.plus_minus, summary["mean"], summary["std"]),
            "lowest": summary["min"].map("{:.3f}".format),
            "highest": summary["max"].map("{:.3f}".format),
        }
    )
