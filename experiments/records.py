"""The rows of finished runs, kept beside the results that were made of them.

<out>/runs/<config>-<hash>.jsonl.gz    metrics.jsonl of every seed, one after another

What needs rows alone is made of them without training again, for instance on another
machine; what needs weights trains.
"""

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from experiments.trainings import Setup, Training
from lottery_flow import files, metrics
from lottery_flow.errors import UserError
from lottery_flow.metrics import Row
from lottery_flow.runs import RunPaths


def rows(training: Training, seed: int, setup: Setup) -> list[Row]:
    """The rows of a run: its own, or if it is not finished those kept of it."""
    paths = RunPaths(training.run(setup, seed))
    if not paths.done.exists():
        kept = _read(_path(training, setup))
        if seed in kept:
            return kept[seed]
    return metrics.read(paths.metrics)


def seeds(training: Training, setup: Setup) -> set[int]:
    """The seeds of which rows are kept."""
    return set(_read(_path(training, setup)))


def keep(trainings: Iterable[Training], setup: Setup) -> None:
    """Keeps the rows of every finished run, and what was kept of others."""
    for training in dict.fromkeys(trainings):
        path = _path(training, setup)
        if path is None:
            return
        runs = {s: RunPaths(training.run(setup, s)) for s in training.seeds(setup)}
        done = {s: metrics.read(r.metrics) for s, r in runs.items() if r.done.exists()}
        if not done:
            continue
        found = sorted((_read(path) | done).items())
        text = "".join(json.dumps(row) + "\n" for _, own in found for row in own)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the time, so that the same rows are the same file.
        files.write(path, gzip.compress(text.encode(), mtime=0))


def _read(path: Path | None) -> dict[int, list[Row]]:
    """The rows that were kept, by seed."""
    found: dict[int, list[Row]] = {}
    if path is None or not path.exists():
        return found
    try:
        with gzip.open(path, "rt") as file:
            for row in map(json.loads, file):
                found.setdefault(row["seed"], []).append(row)
    except (EOFError, KeyError, OSError, TypeError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged; bring it back from a copy, or delete it to train anew"
        ) from error
    return found


def _path(training: Training, setup: Setup) -> Path | None:
    if not setup.records:
        return None
    return Path(setup.records) / f"{training.directory(setup.anywhere).name}.jsonl.gz"
