"""python -m lottery_flow.main --config=configs/rigl_lenet5.py --workdir=runs"""

import json
import logging
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from lottery_flow import command, levels, members, parallel, report, runs
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
    config = command.load_config()
    # Everything is checked for all members before the first is trained.
    found = members.members(config)
    for level in range(config.tickets.rounds + 1):
        _train_level(level, [(levels.at(own, level), s) for own, s in found])


def _train_level(level: int, found: list[tuple[ConfigDict, int]]) -> None:
    """Trains all members at once, and tells what became of them."""
    workdir = flags.FLAGS.workdir
    started = [(own, open_(own, s, workdir)) for own, s in found]
    unfinished = [(own, run) for own, run in started if not run.paths.done.exists()]
    if unfinished:
        train_all(unfinished)
    parallel.barrier("finished")
    if not parallel.is_first():
        return
    for own, run in started:
        if (own, run) not in unfinished:
            print(f"{run.paths.root} is finished; nothing to do.")
        print(run.paths.summary.read_text())


def open_(config: ConfigDict, seed: int, workdir: str) -> Run:
    """The run of a configuration and a seed, checked; nothing is written.

    Raises:
      UserError: a field makes no sense, or the directory holds another run.
    """
    fields, default = flat_fields(config), flat_fields(config_lib.default())
    job = build(config, seed)
    paths = runs.run_paths(workdir, fields, default, seed)
    record = {"seed": seed, **fields}
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
        runs.write_atomically(paths.summary, text)
        if config.train.figure:
            report.figure(paths.figure, f"{config.name}, seed {job.seed}", rows)
        runs.write_atomically(paths.done, json.dumps(rows[-1], indent=2) + "\n")

    train([run for _, run in started], tensorboard=tensorboard, on_done=finish)


def cli() -> None:
    """The command, from the shell."""
    define_flags(flags.FLAGS)
    command.run(main, command.unknown_field)


if __name__ == "__main__":
    cli()
