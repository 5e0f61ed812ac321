"""Metrics of a run: one JSON object a line, and TensorBoard if asked.

A row describes the network after `step` updates. Rows hold nothing that depends on
the clock, so that an interrupted run ends with the same file as one that was not.
"""

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lottery_flow import files
from lottery_flow.errors import UserError

_LOG = logging.getLogger(__name__)

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The complete rows of a metrics file; [] without one.

    A last line that was cut short by a crash is left out.

    Raises:
      UserError: another line is not a row with a step.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise ValueError("the step is no number")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged in line {number}; mend that line, or bring the "
                "file back from a copy"
            ) from error
        rows.append(row)
    return rows


def check_whole(path: Path, wanted: Iterable[int]) -> None:
    """Checks that no row was lost that no step would write again.

    Args:
      path: of the file.
      wanted: the steps that must have a row.

    Raises:
      UserError: naming the first that is missing.
    """
    found = [row["step"] for row in read(path)]
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise UserError(
            f"{path} has rows twice or out of order; bring it back from a copy"
        )
    missing = sorted(set(wanted) - set(found))
    if missing:
        step = missing[0]
        raise UserError(
            f"{path} has no row of step {step}, though the run is beyond it; bring the "
            f"file back from a copy, or move the checkpoints from step {step} on away "
            "to have it made again"
        )


class Writer:
    """Appends rows to `metrics.jsonl`, each on the disk before the next step.

    Attributes:
      rows: all rows so far, those of earlier starts included.
    """

    def __init__(
        self, path: Path | None, last_step: int, tensorboard: Path | None = None
    ):
        """Opens the file and forgets rows after `last_step`, the restored step.

        Without a path the rows are only kept in memory, in a process that is not the
        one that writes.
        """
        self._file = self._board = None
        self.rows: list[Row] = []
        if path is None:
            return
        found = read(path)
        self.rows = [row for row in found if row["step"] <= last_step]
        if len(self.rows) != len(found):
            _LOG.info(
                "forgot %d rows after step %d", len(found) - len(self.rows), last_step
            )
        files.write(path, "".join(map(_line, self.rows)))
        self._file = open(path, "a")
        if tensorboard is not None:
            self._board = _board(tensorboard, last_step)

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if self._file is None:
            return
        self._file.write(_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "seed") and isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["step"])

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def check_finite(
    name: str,
    value: float,
    step: int,
    last_saved: int | None,
    broken_fn: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Stops a run whose loss is not a number any more.

    Args:
      name, value: of what was measured.
      step: after which it was.
      last_saved: the step of the newest checkpoint.
      broken_fn: finds the parameters that are not finite; only asked if the value is
        not.

    Raises:
      UserError: naming the step and what is still there to go on from.
    """
    if math.isfinite(value):
        return
    where = ""
    if broken_fn is not None:
        broken = broken_fn()
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        where = f", with weights that are not finite in {', '.join(broken[:5])}{more}"
        where = where if broken else ", though all weights are finite"
    kept = (
        "no checkpoint was written yet"
        if last_saved is None
        else f"the checkpoint of step {last_saved} is kept"
    )
    raise UserError(
        f"{name} is {value} at step {step}: the run has diverged{where}; lower "
        f"optim.learning_rate ({kept})"
    )


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _board(directory: Path, last_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "train.tensorboard=True needs tensorboardX: "
            "pip install 'lottery_flow[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=last_step + 1)
