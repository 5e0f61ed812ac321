"""Trains what a configuration says, or once more what a run was.

python -m lottery_flow.main --config=configs/rigl_lenet5.py --workdir=runs
python -m lottery_flow.main --rerun=runs/rigl_lenet5-0a1b2c3d/seed_0 --workdir=again
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from lottery_flow import (
    command,
    environment,
    files,
    levels,
    members,
    parallel,
    recorded,
    report,
    runs,
)
from lottery_flow import config as config_lib
from lottery_flow.build import build, flat_fields
from lottery_flow.errors import UserError
from lottery_flow.loop import Result, Run
from lottery_flow.train import train

_LOG = logging.getLogger("lottery_flow")


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    command.define_config(values)
    flags.DEFINE_string(
        "workdir",
        "runs",
        "Where run directories are made; with many processes one that all of them see.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "rerun",
        "",
        "Instead of --config: the seed_N directory of a run, to be trained once more "
        "in another --workdir, from what its config.json says.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Whether this is one of many processes, as on a pod. Cloud TPU, Slurm and Open "
        "MPI say which; elsewhere give the three flags below.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator", "", "host:port of the first process.", flag_values=values
    )
    flags.DEFINE_integer(
        "n_processes", None, "How many processes there are.", flag_values=values
    )
    flags.DEFINE_integer(
        "process", None, "Which process this is, from 0.", flag_values=values
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; flags begin with --")
    given = flags.FLAGS.coordinator, flags.FLAGS.n_processes, flags.FLAGS.process
    if flags.FLAGS.distributed or given != ("", None, None):
        parallel.start(*given)
    config = _rerun(flags.FLAGS.rerun) if flags.FLAGS.rerun else command.load_config()
    run(config, flags.FLAGS.workdir)


def run(config: ConfigDict, workdir: str = "runs") -> list[Path]:
    """Trains all that a configuration says and that is not finished.

    What the command does, for scripts and notebooks.

    Args:
      config: of `configs/` or of `lottery_flow.config.default`.
      workdir: where run directories are made.

    Returns:
      The directory of each network; of one that is pruned in rounds, that of its last.

    Raises:
      UserError: a field makes no sense, or a directory holds another run.
    """
    # Everything is checked for all members before the first is trained.
    found = members.members(config)
    directories = []
    for level in range(config.tickets.rounds + 1):
        started = [(levels.at(own, level), seed) for own, seed in found]
        directories = _train_level(started, workdir)
    return directories


def _rerun(directory: str) -> ConfigDict:
    """The configuration of a run, which is to be trained again elsewhere."""
    if flags.FLAGS.config is not None:
        raise UserError(
            f"--rerun={directory} takes the configuration of that run; leave --config "
            "out"
        )
    given, workdir = Path(directory), flags.FLAGS.workdir
    # Of a run of iterative pruning all levels are trained again.
    root = given / "level_0" if (given / "level_0").exists() else given
    found = recorded.read(root)
    config, others = levels.at(found.config, 0), len(found.config.train.seeds) - 1
    with config.unlocked():
        config.train.seeds = (found.seed,)
    fields, default = flat_fields(config), flat_fields(config_lib.default())
    target = runs.run_paths(workdir, fields, default, found.seed).root
    if config.tickets.rounds:
        root, target = root.parent, target.parent
    if root.resolve() == target.resolve():
        raise UserError(
            f"--rerun={directory}: --workdir={workdir} is where that run is; give "
            "another --workdir"
        )
    there, here = found.environment, environment.describe()
    other = environment.difference(there, here)
    told = f"{directory} was trained in the same environment"
    if not there:
        told = f"{directory} does not say in which environment it was trained"
    elif other:
        told = f"{directory} was trained in another environment: {other}"
    if others and config.train.population != "one_by_one":
        told += (
            f"; and with {others} other seeds, maybe in one program, whose sums differ"
        )
    if parallel.is_first():
        print(told)
    return config


def _train_level(found: list[tuple[ConfigDict, int]], workdir: str) -> list[Path]:
    """Trains all members at once, and tells what became of them."""
    started = [(own, open_(own, s, workdir)) for own, s in found]
    unfinished = [(own, run) for own, run in started if not run.paths.done.exists()]
    if unfinished:
        train_all(unfinished)
    parallel.barrier("finished")
    if parallel.is_first():
        for own, run in started:
            if (own, run) not in unfinished:
                print(f"{run.paths.root} is finished; nothing to do.")
            print(run.paths.summary.read_text())
    return [run.paths.root for _, run in started]


def open_(config: ConfigDict, seed: int, workdir: str) -> Run:
    """The run of a configuration and a seed, checked; nothing is written.

    Raises:
      UserError: a field makes no sense, or the directory holds another run.
    """
    fields, default = flat_fields(config), flat_fields(config_lib.default())
    job = build(config, seed)
    paths = runs.run_paths(workdir, fields, default, seed)
    record = {"seed": seed, **fields, runs.ENVIRONMENT: environment.describe()}
    runs.check(paths, record)
    return Run(levels.with_ticket(config, job, paths), paths, record)


def train_all(started: list[tuple[ConfigDict, Run]]) -> None:
    """Trains the runs, then writes their summaries, figures and, last, DONE."""
    for _, run in started:
        _LOG.info("run directory %s", run.paths.root)
    tensorboard = started[0][0].train.tensorboard
    configs = {run.paths: config for config, run in started}

    def finish(run: Run, result: Result) -> None:
        job, paths, rows = run.job, run.paths, result.rows
        config = configs[paths]
        text = report.summary(config.name, job.model, result.state, rows)
        if not parallel.is_first():
            return
        files.write(paths.summary, text)
        if config.train.figure:
            report.figure(paths.figure, f"{config.name}, seed {job.seed}", rows)
        files.write(paths.done, json.dumps(rows[-1], indent=2) + "\n")

    train([run for _, run in started], tensorboard=tensorboard, on_done=finish)


def cli() -> None:
    """The command, from the shell."""
    define_flags(flags.FLAGS)
    command.run(main)


if __name__ == "__main__":
    cli()
