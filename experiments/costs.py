"""What trainings and analyses cost: `timings.csv`, beside the records of runs."""

import contextlib
import csv
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.trainings import Setup


@contextlib.contextmanager
def noted(setup: Setup, work: str, *, members: int, steps: int) -> Iterator[None]:
    """Appends a row for what is done inside, unless that fails.

    Args:
      setup: whose `records` it belongs to, or else `workdir`.
      work: what is done, for people.
      members: networks that are trained or asked.
      steps: that each is trained for.
    """
    began, used = time.monotonic(), _processor_seconds()
    yield
    row = {
        "work": work,
        "members": members,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(_processor_seconds() - used, 1),
    }
    path = Path(setup.records or setup.workdir) / "timings.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, both))
