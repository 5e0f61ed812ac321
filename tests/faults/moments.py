"""Moments to be killed at, drawn by a seed."""

import random
from collections.abc import Mapping
from typing import Any

NAMES = {
    "cpu": "SIGKILL at any time",
    "compile": "SIGKILL in compiling",
    "step": "SIGKILL in a step",
    "rewire": "SIGKILL in a rewire",
    "save": "SIGKILL while a checkpoint is written in the background",
    "file": "SIGKILL between two changes of files",
    "row": "SIGKILL in a row of metrics",
    "final": "SIGKILL in the last files of a run",
}
# Each chain has two moments at any time, two in compiling and, at its end, one in the
# last files.
_BETWEEN = "step", "rewire", "save", "file", "row"


def chain(seed: int, counts: Mapping[str, int], n: int) -> list[dict[str, Any]]:
    """Faults of `n` starts, one after another, of which each gets a bit further.

    Args:
      seed: of the draws.
      counts: how often each event comes in a run that nothing happens to.
      n: of starts, at least 5.
    """
    draw = random.Random(seed)
    between = [name for name in _BETWEEN if counts.get(name)]
    names = [between[(seed + i) % len(between)] for i in range(n - 5)]
    names += ["cpu", "compile"] * 2
    draw.shuffle(names)
    found = [moment(draw, name, counts, n) for name in names]
    return [*found, moment(draw, "final", counts, 1)]


def moment(
    draw: random.Random, name: str, counts: Mapping[str, int], n: int
) -> dict[str, Any]:
    """A kill at an event of that name, of those that come in a part 1 / n of a run."""
    found: dict[str, Any] = {"at": name, "signal": "SIGKILL"}
    if name == "cpu":  # seconds, most of which go before the first step
        return found | {"n": draw.uniform(0.2, 3.0)}
    # Every start compiles, or looks for, most programs.
    share = 2 if name == "compile" else n
    found["n"] = draw.randint(1, max(1, counts[name] // share))
    if name == "row":  # some of its bytes, or none, had reached the disk
        found["cut"] = draw.choice([0, 1, draw.randrange(400)])
    if name in ("compile", "step", "rewire", "save"):
        found["delay"] = draw.choice([0.0, draw.uniform(0.0, 0.05)])
    return found
