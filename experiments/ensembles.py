"""Ensembles and disagreement on MNIST (the paper's table 2).

Five networks of each kind around one pruning solution: their accuracy, that of their
ensemble (mean of the predicted probabilities), on how many test images two of them
differ, and on how many each differs from the pruning solution. Other pruning solutions
are compared with it without itself. Where some of a kind never leave chance, there is a
second row without them.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import paper, tables
from experiments.publish import Tables
from experiments.trainings import (
    TICKET_SEED,
    Setup,
    Training,
    members,
    tickets,
)
from lottery_flow.analysis import ensembles as ensembles_lib
from lottery_flow.analysis import figures
from lottery_flow.studies.common import device
from lottery_flow.study import open_run

ABOUT = "accuracy of ensembles, and disagreement"
# What is added to the name of a kind for those of its networks that learned.
LEARNED = ", those that learned"


def settings(setup: Setup) -> dict:
    """Of the combination."""
    return {"combined_by": "probability", "ticket_seed": TICKET_SEED}


def runs(setup: Setup) -> list[Training]:
    """Every row's networks."""
    return [t for trainings in tickets(setup).values() for t in trainings]


def collect(setup: Setup) -> Tables:
    """A row for each network; `summary` has one for each kind."""
    solution = _logits(Training("lenet5", "prune"), TICKET_SEED, setup)[0]
    lines, summaries = [], {}
    for name, trainings in tickets(setup).items():
        own = members(trainings, setup)
        both = [_logits(training, seed, setup) for training, seed in own]
        logits, labels = np.stack([logits for logits, _ in both]), both[0][1]
        found = ensembles_lib.summary(logits, labels, solution)
        apart = found.reference_disagreement
        itself = np.array([t.method == "prune" and s == TICKET_SEED for t, s in own])
        summaries[name] = found._replace(reference_disagreement=apart[~itself])
        learned = ~tables.at_chance(found.accuracy)
        if 1 < learned.sum() < len(learned):
            part = ensembles_lib.summary(logits[learned], labels, solution)
            summaries[name + LEARNED] = part
        for i, (training, seed) in enumerate(own):
            about = {"kind": name, "seed": seed, "config": training.digest(setup)}
            values = {
                "accuracy": found.accuracy[i],
                "loss": found.loss[i],
                "disagreement_with_solution": np.nan if itself[i] else apart[i],
            }
            lines.append(about | values)
    table = ensembles_lib.table(summaries).rename(columns={"method": "kind"})
    table.insert(1, "networks", [len(s.accuracy) for s in summaries.values()])
    return {"": pd.DataFrame(lines), "summary": table}


def _logits(training: Training, seed: int, setup: Setup):
    study = open_run(training.run(setup, seed), -1, setup.data_dir)
    batches = study.test_batches(1000)
    params = device(study.network.params)
    logits = ensembles_lib.logits_of(study.objective("frozen"), params, batches)
    return logits, np.concatenate([batch["label"] for batch in batches])


def plot(found: Tables) -> dict[str, Figure]:
    """Accuracies alone and together, and disagreement."""
    table = found["summary"]
    # Of a kind with a second row, that one: the first says how many never learned.
    stuck = (table["kind"] + LEARNED).isin(table["kind"])
    table = table[~stuck]
    place = np.arange(len(table))
    fig, axes = figures.new(1, 2, sharey=True)
    axes[0].errorbar(
        100 * table["accuracy_mean"],
        place,
        xerr=100 * table["accuracy_std"],
        fmt="o",
        label="alone",
    )
    axes[0].plot(100 * table["ensemble_accuracy"], place, "s", label="ensemble")
    axes[0].set(xlabel="test accuracy (%)", yticks=place, yticklabels=table["kind"])
    for column, marker in (("disagreement", "o"), ("reference_disagreement", "s")):
        label = "of two" if column == "disagreement" else "with the pruning solution"
        axes[1].plot(100 * table[f"{column}_mean"], place, marker, label=label)
    axes[1].set(xlabel="disagreement (% of the test images)")
    for ax in axes:
        ax.legend(fontsize=8)
        ax.grid(axis="x", alpha=0.3)
    return {"": fig}


def beside(found: Tables) -> pd.DataFrame:
    """The table, and the paper's accuracies."""
    lines = []
    for row in found["summary"].to_dict("records"):
        theirs = paper.ENSEMBLE_ACCURACY.get(row["kind"].removesuffix(LEARNED))
        lines.append(
            {
                "kind": row["kind"],
                "networks": row["networks"],
                "test accuracy (%)": _percent(row, "accuracy"),
                "ensemble (%)": f"{100 * row['ensemble_accuracy']:.2f}",
                "gain": f"{100 * row['gain']:.2f}",
                "disagreement (%)": _percent(row, "disagreement"),
                "with the solution (%)": _percent(row, "reference_disagreement"),
                "paper: accuracy": tables.plus_minus(*theirs) if theirs else "",
            }
        )
    return pd.DataFrame(lines)


def _percent(row: dict, name: str) -> str:
    return tables.plus_minus(100 * row[f"{name}_mean"], 100 * row[f"{name}_std"])
