"""What trainings and analyses cost: `timings.csv`, beside the records of runs."""

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from experiments.trainings import Setup


@contextlib.contextmanager
def noted(
    setup: Setup, kind: str, work: str, *, members: int, steps: int
) -> Iterator[None]:
    """Appends a row for what is done inside, unless that fails.

    Args:
      setup: whose `records` it belongs to, or else `workdir`.
      kind: the network that is trained, or the analyses.
      work: what is done, for people.
      members: networks that are trained or asked.
      steps: that each is trained for.
    """
    began, used = time.monotonic(), _processor_seconds()
    yield
    row = {
        "kind": kind,
        "work": work,
        "members": members,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(_processor_seconds() - used, 1),
    }
    file_ = path(setup.records or setup.workdir)
    file_.parent.mkdir(parents=True, exist_ok=True)
    new = not file_.exists()
    pd.DataFrame([row]).to_csv(file_, mode="a", header=new, index=False)


def path(folder: str) -> Path:
    """The file of a folder of runs or of records."""
    return Path(folder) / "timings.csv"


def table(timings: Path) -> pd.DataFrame:
    """Sums of all rows of a `timings.csv`, by kind."""
    rows = pd.read_csv(timings)
    rows["member_steps"] = rows["members"] * rows["steps"]
    columns = ["members", "member_steps", "processor_seconds"]
    sums = rows.groupby("kind", sort=False)[columns].sum()
    lines = []
    for kind, (networks, steps, seconds) in [*sums.iterrows(), ("all", sums.sum())]:
        training = kind != "all" and steps
        lines.append(
            {
                "what": kind,
                "networks": int(networks),
                "their steps": f"{steps:,.0f}" if steps else "",
                "processor hours": f"{seconds / 3600:.2f}",
                "ms a step": f"{1000 * seconds / steps:.1f}" if training else "",
            }
        )
    return pd.DataFrame(lines)


def _processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, both))
