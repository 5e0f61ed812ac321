"""Progress of long work: one live line on a terminal, plain log lines elsewhere."""

import logging
import statistics
import sys
import time

from rich import progress as rich_progress
from rich.console import Console

_LOG = logging.getLogger(__name__)


class Progress:
    """Shows step, rate and time left; a context manager.

    On a terminal it is one line that is drawn again and again. Elsewhere each
    report becomes a log line.
    """

    def __init__(self, total_steps: int, start: int = 0):
        self._total, self._start, self._step = total_steps, start, start
        self._began = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("step"),
                rich_progress.MofNCompleteColumn(),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.description}"),
                rich_progress.TextColumn("{task.fields[rate]:.0f} steps/s"),
                rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self):
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "starting", total=self._total, completed=self._start, rate=0.0
            )
        return self

    def __exit__(self, *exception):
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """`step` updates are done (dispatched, at least)."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=self._rate())

    def report(self, rows: list[dict]) -> None:
        """Shows a row of metrics, or the means over those of all members."""
        text = _describe(rows)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            return
        rate = self._rate()
        left = (self._total - self._step) / rate if rate else float("nan")
        _LOG.info(
            "step %d/%d  %s  %.0f steps/s  %s left",
            rows[0]["step"],
            self._total,
            text,
            rate,
            _duration(left),
        )

    def _rate(self) -> float:
        seconds = time.monotonic() - self._began
        return (self._step - self._start) / seconds if seconds > 0 else 0.0


def _describe(rows: list[dict]) -> str:
    shown = {
        "loss": "probe_loss",
        "gradient": "gradient_norm",
        "density": "density",
        "test": "test_accuracy",
    }
    parts = [
        f"{k} {statistics.fmean(row[v] for row in rows):.4g}"
        for k, v in shown.items()
        if rows[0].get(v) is not None
    ]
    return "  ".join(parts + [f"(mean of {len(rows)})"] * (len(rows) > 1))


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
