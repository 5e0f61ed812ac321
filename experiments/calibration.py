"""What the sources leave open, settled against the published gradient norms.

The first 2,000 steps of LeNet-5 on MNIST (on the learning-rate schedule of the whole
run) under the settings that the paper's equation, its post and the released code give
differently: gain and distribution of the per-neuron initialisation, the images on
which growth is scored, the step that a ticket goes back to, and the learning rate. A
candidate's distance to a published curve is the root mean square of log10(ours /
theirs) over the steps that the curve gives, of the mean over the seeds.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import paper, tables
from experiments.publish import Tables
from experiments.trainings import Setup, Training
from lottery_flow.analysis import figures

ABOUT = "choices that the sources leave open, against the published curves"
FULL_STEPS = 11_719
_GAIN_1 = (("model.init_gain", 1.0),)
_FAN_AVERAGE = (
    ("model.init_fan", "fan_avg"),
    ("model.init_distribution", "uniform"),
    ("model.init_gain", 1.0),
)
LATE = ("sparsity.weights_step", 500)
_RATE = (("optim.learning_rate", 0.1),)

# Curve of the paper -> candidate -> the training, the first being what we take.
_PLUS = ("per_neuron", "pruned")
CANDIDATES = {
    "scratch+": {
        "gain 2, fan-in, normal": Training("lenet5", "scratch", *_PLUS),
        "gain 1, fan-in, normal": Training("lenet5", "scratch", *_PLUS, fields=_GAIN_1),
        "gain 1, fan average, uniform": Training(
            "lenet5", "scratch", *_PLUS, fields=_FAN_AVERAGE
        ),
        "gain 2, learning rate 0.1": Training(
            "lenet5", "scratch", *_PLUS, fields=_RATE
        ),
    },
    "rigl+": {
        "grown on 1,000 other images": Training("lenet5", "rigl", *_PLUS),
        "grown on the training batch": Training(
            "lenet5", "rigl", *_PLUS, fields=(("sparsity.grow_examples", 0),)
        ),
        "gain 1": Training("lenet5", "rigl", *_PLUS, fields=_GAIN_1),
    },
    "lottery": {
        "weights of step 0": Training("lenet5", "lottery", masks="pruned"),
        "weights of step 500": Training(
            "lenet5",
            "lottery",
            masks="pruned",
            fields=(LATE,),
        ),
        "learning rate 0.1": Training(
            "lenet5", "lottery", masks="pruned", fields=_RATE
        ),
    },
    "scratch": {
        "learning rate 0.05": Training("lenet5", "scratch", masks="pruned"),
        "learning rate 0.1": Training(
            "lenet5", "scratch", masks="pruned", fields=_RATE
        ),
    },
    "small_dense": {
        "learning rate 0.05": Training("lenet5", "small_dense"),
        "learning rate 0.1": Training("lenet5", "small_dense", fields=_RATE),
    },
}


def settings(setup: Setup) -> dict:
    """How much of a run is looked at."""
    return {"steps": 12 if setup.smoke else 2000}


def runs(setup: Setup) -> list[Training]:
    """Every candidate."""
    return [t for own in _candidates(setup).values() for t in own.values()]


def _candidates(setup: Setup) -> dict[str, dict[str, Training]]:
    first: tuple = (
        ("train.total_steps", settings(setup)["steps"]),
        ("optim.schedule_steps", FULL_STEPS),
    )
    # A smoke run has another checkpoint to go back to.
    late = {LATE: ("sparsity.weights_step", 6)} if setup.smoke else {}
    return {
        curve: {
            name: t._replace(fields=(*first, *(late.get(f, f) for f in t.fields)))
            for name, t in own.items()
        }
        for curve, own in CANDIDATES.items()
    }


def collect(setup: Setup) -> Tables:
    """A row for each candidate, seed and logged step."""
    frames = []
    for curve, own in _candidates(setup).items():
        for name, training in own.items():
            frame = tables.curves([training], setup, ["gradient_norm"])
            frames.append(frame.assign(curve=curve, candidate=name))
    rows = pd.concat(frames, ignore_index=True)
    return {"": rows[["curve", "candidate", *rows.columns[:-2]]]}


def _mean(found: Tables) -> pd.Series:
    by = ["curve", "candidate", "step"]
    return found[""].groupby(by)["gradient_norm"].mean()


def plot(found: Tables) -> dict[str, Figure]:
    """Each candidate's mean, and the published curve as dots."""
    mean = _mean(found)
    fig, axes = figures.new(2, 3, sharex=True, sharey=True)
    for ax, (curve, own) in zip(axes.flat, CANDIDATES.items(), strict=False):
        for name in own:
            line = mean[curve, name]
            ax.plot(line.index[1:], line[1:], label=name, lw=1.2)
        ax.plot(
            *_published(curve, int(max(mean[curve].index.get_level_values(1)))),
            "ko",
            ms=4,
        )
        ax.set(xscale="log", yscale="log", title=f"{curve}; dots: the paper")
        ax.set(xlabel="step", ylabel="gradient norm")
        ax.legend(fontsize=7)
    axes.flat[-1].axis("off")
    return {"": fig}


def beside(found: Tables) -> pd.DataFrame:
    """The distance of every candidate to the published curve."""
    mean, lines = _mean(found), []
    for curve, own in CANDIDATES.items():
        for name in own:
            ours = mean[curve, name]
            steps, theirs = _published(curve, int(ours.index.max()))
            common = [s in ours.index for s in steps]
            ratio = np.log10(ours[np.array(steps)[common]].to_numpy() / theirs[common])
            distance = np.sqrt(np.mean(ratio**2)) if len(ratio) else np.nan
            at = {s: f"{ours[s]:.3f}" for s in (100, 300, 1000) if s in ours.index}
            lines.append(
                {"curve": curve, "candidate": name, **at, "distance": f"{distance:.3f}"}
            )
    return pd.DataFrame(lines).fillna("")


def _published(curve: str, last: int) -> tuple[list[int], np.ndarray]:
    points = {s: v for s, v in paper.GRADIENT_NORM[curve].items() if s <= last}
    return list(points), np.array(list(points.values()))
