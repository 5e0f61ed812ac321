"""Where the members of a population go on: together, from what all of them have whole.

Members whose newest checkpoints are at most an interval apart, as a crash leaves them,
were trained together and go on together, from the newest step that each of them has an
undamaged checkpoint of. One that is damaged is passed over with a warning: the steps
after the one before it are computed again, with the same bits. Where none is left a run
does not start over by itself.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lottery_flow import checkpoint, metrics
from lottery_flow.errors import UserError
from lottery_flow.loop import Run

_LOG = logging.getLogger(__name__)


class Restart(NamedTuple):
    """Members that go on together.

    Attributes:
      members: by their numbers.
      step: that they go on from.
      damaged: steps of each member whose checkpoints were found damaged.
    """

    members: list[int]
    step: int
    damaged: list[list[int]]


def find(started: Sequence[Run]) -> list[Restart]:
    """Which runs go on together, and from which step.

    Raises:
      UserError: a run has checkpoints, but none that is undamaged; processes that do
        not see the same ones.
    """
    directories = [run.paths.checkpoints for run in started]
    kept = [checkpoint.steps_in(directory) for directory in directories]
    newest = [steps[-1] if steps else 0 for steps in kept]
    for run, steps in zip(started, kept, strict=True):
        if not steps:
            _tell_lost_rows(run)
    reasons: list[dict[int, str | None]] = [{} for _ in started]

    def is_sound(i: int, step: int) -> bool:
        if kept[i] and step not in reasons[i]:
            reasons[i][step] = checkpoint.damage(directories[i], step)
        return reasons[i].get(step) is None

    def common(members: list[int]) -> int | None:
        """The newest step that all have an undamaged checkpoint of."""
        steps = set.intersection(*(set(kept[i] or [0]) for i in members))
        down = sorted(steps, reverse=True)
        return next((s for s in down if all(is_sound(i, s) for i in members)), None)

    every = started[0].job.checkpoint_every
    groups: list[tuple[list[int], int]] = []
    for i in sorted(range(len(started)), key=newest.__getitem__):
        if groups:
            group, _ = groups[-1]
            first = newest[group[0]]
            near = first in (kept[i] or [0]) and newest[i] - first <= every
            step = common([*group, i]) if near else None
            if step is not None:
                groups[-1] = [*group, i], step
                continue
        step = common([i])
        if step is None:
            raise _none_left(directories[i], reasons[i])
        groups.append(([i], step))
    damaged = [[s for s, r in own.items() if r is not None] for own in reasons]
    found = [Restart(g, step, [damaged[i] for i in g]) for g, step in groups]
    _tell_damage(started, found, reasons)
    _agree(started, found)
    return found


def _none_left(directory, reasons: dict[int, str | None]) -> UserError:
    told = [f"that of step {step} {reason}" for step, reason in reasons.items()]
    more = f", and {len(told) - 2} more" if len(told) > 2 else ""
    return UserError(
        f"{directory} has no undamaged checkpoint ({', '.join(told[:2])}{more}); bring "
        "one back from a copy, or move that directory away to start over"
    )


def _tell_damage(started, found: list[Restart], reasons) -> None:
    for group in found:
        for i in group.members:
            for step, reason in reasons[i].items():
                if reason is not None:
                    _LOG.warning(
                        "the checkpoint of step %d in %s %s; going on from that of "
                        "step %d, and keeping it as %d.damaged",
                        *(step, started[i].paths.checkpoints, reason),
                        *(group.step, step),
                    )


def _tell_lost_rows(run: Run) -> None:
    """Starting over is never silent."""
    last = max((row["step"] for row in metrics.read(run.paths.metrics)), default=0)
    if last > 0:
        _LOG.warning(
            "%s has rows up to step %d but no checkpoint; starting over",
            *(run.paths.root, last),
        )


def _agree(started: Sequence[Run], found: list[Restart]) -> None:
    """Many processes must go on from the same steps."""
    if jax.process_count() == 1:
        return
    steps = np.zeros(len(started), np.int32)
    for group in found:
        steps[group.members] = group.step
    everywhere = np.asarray(multihost_utils.process_allgather(steps))
    for i, own in enumerate(everywhere.reshape(-1, len(started)).T):
        if len(set(own.tolist())) > 1:
            raise UserError(
                f"the processes go on from different steps of {started[i].paths.root} "
                f"({', '.join(map(str, own))}); give a --workdir that all of them see"
            )
