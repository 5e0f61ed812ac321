"""Tidy tables from the rows of metrics, for every experiment."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from experiments import records
from experiments.trainings import Setup, Training


def curves(
    trainings: Iterable[Training], setup: Setup, columns: Iterable[str]
) -> pd.DataFrame:
    """A row for each training, seed and logged step that has all the columns."""
    columns, rows = ["step", *columns], []
    for training in trainings:
        about = training.columns(setup)
        for seed in training.seeds(setup):
            for row in records.rows(training, seed, setup):
                if all(row.get(c) is not None for c in columns):
                    rows.append({**about, "seed": seed, **{c: row[c] for c in columns}})
    return pd.DataFrame(rows, columns=[*_COLUMNS, "seed", *columns])


def ends(
    trainings: Iterable[Training], setup: Setup, columns: Iterable[str]
) -> pd.DataFrame:
    """The same for the last step alone."""
    found = curves(trainings, setup, columns)
    last = found.groupby(["config", "seed"], sort=False)["step"].transform("max")
    return found[found["step"] == last].reset_index(drop=True)


def at_chance(accuracy: Any) -> Any:
    """Whether networks never learned, by their accuracies: numbers, arrays or series.

    Guessing one class is right for 11.35 % of MNIST's test images, the most frequent,
    and for 10 % of Fashion-MNIST's.
    """
    return accuracy < 0.2


def mean_and_spread(
    frame: pd.DataFrame, by: list[str], value: str, scale: float = 1.0
) -> pd.DataFrame:
    """Mean, standard deviation (n - 1), extremes and number of seeds of each group."""
    grouped = (frame.set_index(by)[value] * scale).groupby(level=by, sort=False)
    found = grouped.agg(["mean", "std", "min", "max", "count"])
    return found.reset_index()


def plus_minus(mean: float, spread: float | None, digits: int = 2) -> str:
    """98.52 ± 0.02; without a spread where there is none."""
    text = f"{mean:.{digits}f}"
    return (
        text if spread is None or spread != spread else f"{text} ± {spread:.{digits}f}"
    )


def markdown(frame: pd.DataFrame) -> str:
    """A table for a page, texts as they are."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.values.tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


_COLUMNS = ("data", "network", "method", "init", "masks", "config")
