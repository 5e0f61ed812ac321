"""Questions to finished runs, spread over the cores; answers stay beside the runs."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import costs, pool
from experiments.trainings import Setup
from lottery_flow import analyze
from lottery_flow.studies import Options
from lottery_flow.study import open_run


class Question(NamedTuple):
    """One call of `lottery_flow.analyze`.

    Attributes:
      what: one of its studies.
      run: directory of the run.
      step: of the checkpoint, -1 being the newest.
      against: directories and steps of other runs.
      options: fields of `studies.Options`.
    """

    what: str
    run: Path
    step: int = -1
    against: tuple[tuple[Path, int], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def answers(questions: Sequence[Question], setup: Setup) -> list[analyze.Answer]:
    """Asks what was not asked before; the answers in the order of the questions."""
    known = {q: analyze.find(*_opened(q, setup)) for q in questions}
    groups: dict[Path, list[Question]] = {}
    for question in (q for q, answer in known.items() if answer is None):
        groups.setdefault(question.run, []).append(question)
    if groups:
        what = ", ".join(sorted({q.what for group in groups.values() for q in group}))
        n = sum(map(len, groups.values()))
        with costs.noted(setup, what, f"{n} questions", members=len(groups), steps=0):
            pool.run(
                functools.partial(_ask, setup=setup),
                list(groups.values()),
                jobs=setup.jobs,
                programs=setup.programs,
                label=_label,
            )
    return [known[q] or analyze.answer(*_opened(q, setup)) for q in questions]


def _label(group: list[Question]) -> str:
    run = group[0].run
    return f"{run.parent.name}/{run.name}: {len(group)} x {group[0].what}"


def _ask(group: list[Question], setup: Setup) -> None:
    for question in group:
        analyze.answer(*_opened(question, setup))


def _opened(question: Question, setup: Setup):
    study = open_run(question.run, question.step, setup.data_dir)
    against = tuple(
        open_run(run, step, setup.data_dir) for run, step in question.against
    )
    return question.what, study, Options(against=against, **dict(question.options))
