"""Trains what is missing, as populations.

Networks that one program can train together are one population: those with the same
batches first, since they share the work on them, otherwise all seeds of a setting. On
a CPU, every core trains a population of its own; what stopped goes on from its newest
checkpoints, and a finished run is not repeated.
"""

import collections
import functools
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import costs, pool, records
from experiments.trainings import Member, Setup, Training, members
from lottery_flow import main, runs

# Members of one program at most: more gain nothing and take memory.
_MOST = 20


class Population(NamedTuple):
    """What is trained by one program: `(training, seed)` of each member."""

    members: tuple[Member, ...]

    @property
    def label(self) -> str:
        """For people: the settings, or how many, and their seeds."""
        settings = list(dict.fromkeys(t for t, _ in self.members))
        seeds = ", ".join(str(s) for s in sorted({s for _, s in self.members}))
        what = settings[0].label
        if len(settings) > 1:
            kinds = dict.fromkeys(t.kind for t in settings)
            what = f"{len(settings)} settings of {', '.join(kinds)}"
        return f"{what}, seed {seeds}"


def missing(
    trainings: Iterable[Training], setup: Setup, of_rows: Collection[Training] = ()
) -> list[Member]:
    """Those that are not finished, with the seeds that they need.

    Of those in `of_rows` kept rows are enough.
    """
    # By directory: on the bundled data two data sets are one.
    wanted: dict[Path, Member] = {}
    kept = {t: records.seeds(t, setup) for t in of_rows}
    for training, seed in members(trainings, setup):
        if seed in kept.get(training, ()):
            continue
        source = training.source
        if source is not None:
            own = seed if training.source_seed is None else training.source_seed
            wanted.setdefault(source.run(setup, own), (source, own))
        wanted.setdefault(training.run(setup, seed), (training, seed))
    return [m for path, m in wanted.items() if not runs.RunPaths(path).done.exists()]


def populations(wanted: Sequence[Member], setup: Setup) -> list[Population]:
    """Cuts the members into populations."""
    settings = collections.defaultdict(lambda: collections.defaultdict(list))
    for training, seed in wanted:
        config = training.config(setup)
        run = main.open_(config, seed, setup.workdir)
        # Whether there are masks at all is part of the program too.
        kind = (run.job.setting, config.sparsity.sparsity > 0)
        # In smoke runs compiling costs most: one program for all of a setting.
        order = 0 if setup.smoke else run.job.data_seed
        settings[json.dumps(kind, sort_keys=True)][order].append((training, seed))
    found = []
    for orders in settings.values():
        alone = [m for group in orders.values() if len(group) == 1 for m in group]
        groups = [group for group in orders.values() if len(group) > 1]
        for group in [alone, *groups]:
            parts = range(0, len(group), _MOST)
            found += [Population(tuple(group[i : i + _MOST])) for i in parts]
    return found


def spread(found: Sequence[Population], n_jobs: int) -> list[Population]:
    """The populations in the order in which `n_jobs` processes end soonest.

    The largest come first, and are halved where there are fewer than processes.
    """
    parts = sorted(found, key=lambda p: -len(p.members))
    while parts and len(parts) < n_jobs and len(parts[0].members) > 1:
        (members,), rest = parts[0], parts[1:]
        half = len(members) // 2
        rest += [Population(members[half:]), Population(members[:half])]
        parts = sorted(rest, key=lambda p: -len(p.members))
    return parts


def launch(
    trainings: Iterable[Training], setup: Setup, of_rows: Collection[Training] = ()
) -> None:
    """Trains whatever of the trainings, and of their sources, is not finished.

    Args:
      trainings: what to train.
      setup: where, and how large.
      of_rows: those of them of which only the rows are wanted.

    Raises:
      UserError: a field makes no sense, or runs failed; all others are finished.
    """
    todo = missing(trainings, setup, of_rows)
    # Sources are among those that need none; the others fill the cores beside them.
    first = [m for m in todo if m[0].source is None]
    second = [m for m in todo if m[0].source is not None]
    try:
        for wave in (first, second):
            pool.run(
                functools.partial(_train, setup=setup),
                spread(populations(wave, setup), pool.n_jobs(setup.jobs)),
                jobs=setup.jobs,
                programs=setup.programs,
                label=lambda population: population.label,
                progress=functools.partial(_progress, setup=setup),
            )
    finally:
        records.keep((t for t, _ in todo), setup)


def _train(population: Population, setup: Setup) -> None:
    started = []
    for training, seed in population.members:
        config = training.config(setup)
        started.append((config, main.open_(config, seed, setup.workdir)))
    first = min(_last_step(run.paths.metrics) for _, run in started)
    n, steps = len(started), started[0][1].job.total_steps - first
    networks = ", ".join(dict.fromkeys(t.network for t, _ in population.members))
    with costs.noted(setup, networks, population.label, members=n, steps=steps):
        main.train_all(started)


def _progress(population: Population, setup: Setup) -> str:
    training, seed = population.members[-1]
    total = training.config(setup).train.total_steps
    step = _last_step(runs.RunPaths(training.run(setup, seed)).metrics)
    return f"step {step}/{total}"


def _last_step(path: Path) -> int:
    try:
        last = path.read_text().splitlines()[-1]
        return json.loads(last)["step"]
    except (OSError, IndexError, ValueError):
        return 0
