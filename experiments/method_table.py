"""Every method on LeNet-5 and MNIST at four sparsities, with equal steps.

Beyond the paper: what each method of `configs/` that trains once makes of the same
1,172 steps (a tenth of the paper's, all schedules in proportion). All start from the
per-neuron initialisation but for pruning before training: that keeps the weights that
it scored, as its sources do, and would choose the largest of those that are scaled up
after. Those that need masks of another run are in `accuracy_table`. Methods whose
sparsity follows from the data have one row, at the sparsity they came to.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import records, tables
from experiments.publish import Tables
from experiments.trainings import Setup, Training
from lottery_flow import build, counting
from lottery_flow.analysis import figures

ABOUT = "every method at four sparsities, with equal steps"
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
LENGTH = 0.1  # of the paper's 11,719 steps

# What the gradient of the weights costs, by method:
#   active   of active weights alone
#   rewire   of all weights at rewires
#   all      of all weights at every step
#   twice    of twice the active weights (Top-KAST)
#   dense    everything: the noise makes all weights take part
COSTS = {
    "scratch": "active",
    **dict.fromkeys(
        ("magnitude", "snip", "snip_iterative", "grasp", "synflow", "fisher"), "active"
    ),
    **dict.fromkeys(("set", "set_signed", "dsr", "prune", "prune_global"), "active"),
    **dict.fromkeys(("rigl", "rigl_inverted", "rigl_grad_sign"), "rewire"),
    **dict.fromkeys(("snfs", "dnw", "magnitude_ste", "edge_popup"), "all"),
    "top_kast": "twice",
}
# At a sparsity of their own.
FREE = {
    "dense": "active",
    "prune_retrain": "active",
    "rigl_channel": "rewire",
    "rigl_2_4": "rewire",
    "str": "all",
    "supermask": "all",
    "variational_dropout": "dense",
    "l0": "dense",
    "bayesian_compression": "dense",
}
FROM_RANDOM = {
    *("scratch", "set", "set_signed", "rigl", "rigl_inverted", "rigl_grad_sign"),
    *("rigl_channel", "rigl_2_4", "snfs", "dsr"),
}
# Their weights are those that were scored.
AT_INIT = {"magnitude", "snip", "snip_iterative", "grasp", "synflow", "fisher"}
# Beside the schedules what so few steps need: more frequent prunings, a threshold that
# is nearer, and rates that cross the distance to a weight's end.
_FAST = (("optim.learning_rate", 0.01),)
FIELDS = {
    "prune_retrain": (("sparsity.interval_steps", 150),),
    "str": (("sparsity.parameterization_options", "init=-2.5"),),
    **dict.fromkeys(("variational_dropout", "l0", "bayesian_compression"), _FAST),
}


def settings(setup: Setup) -> dict:
    """The sparsities and the length."""
    return {"sparsities": list(SPARSITIES), "length": LENGTH}


def runs(setup: Setup) -> list[Training]:
    """Every method at every sparsity."""

    def training(method: str, arg: str) -> Training:
        kept = method == "dense" or method in AT_INIT
        init = "masked_dense" if kept else "per_neuron"
        fields = FIELDS.get(method, ())
        masks = "random" if method in FROM_RANDOM else ""
        arg = f"{arg}length={LENGTH}"
        return Training("lenet5", method, init, masks, fields=fields, arg=arg)

    found = [training(method, "") for method in FREE]
    for sparsity in SPARSITIES:
        found += [training(method, f"sparsity={sparsity},") for method in COSTS]
    return found


def collect(setup: Setup) -> Tables:
    """A row for each run; `summary` has one for each method and sparsity."""
    layers = build.layers(Training("lenet5", "dense").config(setup))
    lines = []
    for training in runs(setup):
        asked = training.config(setup).sparsity.sparsity
        for seed in training.seeds(setup):
            rows = records.rows(training, seed, setup)
            if not rows:
                continue
            last = rows[-1]
            lines.append(
                {
                    **training.columns(setup),
                    "asked": np.nan if training.method in FREE else asked,
                    "seed": seed,
                    "step": last["step"],
                    "test_accuracy": last["test_accuracy"],
                    "gradient_norm_at_start": rows[0]["gradient_norm"],
                    "density": last["density"],
                    **{k: v for k, v in last.items() if k.startswith("density/")},
                    "training_flops": _cost(training, rows, layers, setup),
                }
            )
    rows = pd.DataFrame(lines)
    return {"": rows, "summary": summary(rows)}


def _cost(training: Training, rows: list[dict], layers, setup: Setup) -> float:
    """Operations of the training over those of a dense one of the same steps."""
    kind = (COSTS | FREE)[training.method]

    def share(row: dict, factor: float = 1.0) -> float:
        names = layers.shapes
        n = {k: factor * row[f"density/{k}"] * layers.n_active[k] for k in names}
        n = {k: min(v, float(layers.n_active[k])) for k, v in n.items()}
        flops = counting.inference_flops(layers.shapes, layers.positions, n)
        whole = counting.inference_flops(layers.shapes, layers.positions)
        return sum(flops.values()) / sum(whole.values())

    f = float(np.mean([share(row) for row in rows]))
    if kind == "active":
        return f
    if kind == "rewire":
        interval = training.config(setup).sparsity.interval_steps
        return counting.training_flops(f, interval)
    weights = {
        "all": lambda: 1.0,
        "twice": lambda: float(np.mean([share(row, 2.0) for row in rows])),
        "dense": lambda: 1.0,
    }[kind]()
    return (2 * f + weights) / 3 if kind != "dense" else 1.0


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds, the spread of the accuracy, and seeds at chance."""
    by = ["method", "asked"]
    grouped = rows.groupby(by, sort=False, dropna=False)
    found = grouped["test_accuracy"].agg(["mean", "std", "min", "count"]) * 100
    found["count"] = (found["count"] / 100).astype(int)
    found["at_chance"] = grouped["test_accuracy"].agg(
        lambda a: int(tables.at_chance(a).sum())
    )
    for column in ("density", "gradient_norm_at_start", "training_flops"):
        found[column] = grouped[column].mean()
    return found.reset_index()


def plot(found: Tables) -> dict[str, Figure]:
    """Accuracy over sparsity, a column for each kind; below, the upper end again."""
    table = found["summary"]
    kinds = {
        "before training": (
            *("scratch", "magnitude", "snip", "snip_iterative", "grasp", "synflow"),
            "fisher",
        ),
        "while training": (
            *("set", "set_signed", "rigl", "rigl_inverted", "rigl_grad_sign", "snfs"),
            *("dsr", "prune", "prune_global"),
        ),
        "parameterizations": ("dnw", "magnitude_ste", "top_kast", "edge_popup"),
    }
    fig, axes = figures.new(2, len(kinds) + 1, squeeze=False, sharey="row")
    for line in axes:
        for ax, (title, methods) in zip(line[:-1], kinds.items(), strict=True):
            _curves(ax, table, methods)
            ax.set(title=title)
        for i, row in enumerate(table[table["asked"].isna()].to_dict("records")):
            place = 100 * (1 - row["density"])
            line[-1].plot(place, row["mean"], "x", color=f"C{i}", label=row["method"])
        line[-1].set(title="at a sparsity of their own")
        line[0].set(ylabel="test accuracy (%)")
        for ax in line:
            ax.set(xlabel="sparsity (%)")
            ax.grid(alpha=0.3)
    axes[1, 0].set(ylim=(90, 99.5))  # the same, where most of them are
    for ax in axes[0]:
        ax.legend(fontsize=7, loc="lower left")
    return {"": fig}


def _curves(ax, table: pd.DataFrame, methods: tuple[str, ...]) -> None:
    """Mean and spread of each method over the sparsities."""
    for method in methods:
        own = table[table["method"] == method]
        ax.errorbar(
            100 * own["asked"],
            own["mean"],
            yerr=own["std"],
            fmt="o-",
            ms=3,
            lw=1,
            capsize=2,
            label=method,
        )


def beside(found: Tables) -> pd.DataFrame:
    """The summary, for people."""
    table = found["summary"]
    accuracy = map(tables.plus_minus, table["mean"], table["std"])
    return pd.DataFrame(
        {
            "method": table["method"],
            "sparsity (%)": (100 * (1 - table["density"])).map("{:.2f}".format),
            "test accuracy (%)": list(accuracy),
            "lowest": table["min"].map("{:.2f}".format),
            "at chance": [
                f"{n} of {m}"
                for n, m in zip(table["at_chance"], table["count"], strict=True)
            ],
            "gradient norm at start": table["gradient_norm_at_start"].map(
                "{:.3f}".format
            ),
            "training FLOPs": table["training_flops"].map("{:.3f}".format),
        }
    )
