"""One start of the program with an input of `bad_input`, judged.

An input goes through `main` to where training would begin; there one that is accepted
is traced: its network, its state, its steps and its schedules, by their shapes alone.

A fault is anything but that or one sentence: an exception, a message that names no
field or no remedy or has more than a line, a file that a rejected start leaves behind.
"""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import bad_input
import jax
import run_cli

from lottery_flow import checkpoint, main, population
from lottery_flow.errors import UserError
from lottery_flow.loop import Run
from lottery_flow.sparsity.rules import is_rewire
from lottery_flow.train import creation, table

# Fields whose networks are made from more than their shapes.
_NEEDED = ("masks_from", "weights_from", "at_init")
LONGEST = 2000  # characters of a sentence
REMEDY = (
    r"\b(give|write|leave|take|run|set|make|move|needs?|there (are|is)|vary|choose|"
    r"remove|free|lower|warm up|go back|add|start|mend|restore|train)\b"
)
_CONFIG = """
from lottery_flow.config import default, finish
nan, inf = float("nan"), float("inf")
def get_config(arg=""):
    config = default()
    for name, value in [*{first!r}.items(), *{then!r}.items()]:
        group, _, field = name.rpartition(".")
        (config[group] if group else config)[field] = value
    return finish(config, arg)
"""


class Fault(Exception):
    """Not one sentence."""


class _Accepted(BaseException):
    """Everything was checked; holds the runs."""


def try_one(example: bad_input.Input, directory: Path) -> list[Run] | None:
    """The runs of an input that is accepted; None for one that is told.

    Raises:
      Fault: what should not be.
    """
    workdir = directory / "cwd" / "runs"
    arguments = _arguments(example, directory, workdir)

    def stop(started):
        raise _Accepted([run for _, run in started])

    trains, main.train_all = main.train_all, stop
    try:
        outcome = run_cli.in_process(*arguments)
    except _Accepted as accepted:
        (runs,) = accepted.args
        try:
            _trace(runs)
        except UserError as error:
            judge(run_cli.Outcome(2, "", f"error: {error}\n"), example)
            return None
        return runs
    finally:
        main.train_all = trains
        left = sorted(str(p) for p in workdir.parent.rglob("*"))
        shutil.rmtree(workdir, ignore_errors=True)
        if left:
            raise Fault(f"left behind: {left[:3]}")
    judge(outcome, example)
    return None


def train_one(example: bad_input.Input, directory: Path) -> bool:
    """Whether an accepted input ends well; False for one sentence.

    Raises:
      Fault: what should not be.
    """
    workdir = directory / "cwd" / "runs"
    try:
        outcome = run_cli.in_process(*_arguments(example, directory, workdir))
        if outcome.status == 0:
            if not list(workdir.rglob("DONE")):
                raise Fault("ended without DONE")
            return True
        judge(outcome, example)
        diverged = "not finite" in outcome.stderr
        if workdir.exists() and not diverged:
            raise Fault(f"a failed start left {workdir} behind: {outcome.stderr}")
        return False
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def is_small(runs: list[Run]) -> bool:
    """Whether training takes seconds."""
    job = runs[0].job
    sizes = jax.tree.leaves(jax.eval_shape(job.model.init, jax.random.key(0)))
    weights = sum(leaf.size for leaf in sizes)
    examples = job.batch_size + job.probe_examples + job.grow_examples
    return (
        job.total_steps <= 20
        and len(runs) <= 3
        and weights <= 10**5
        and examples * max(job.spec.image_shape) ** 2 < 10**7
        and job.eval_batch_size <= 10**4
        and job.workers == 0
    )


def _arguments(example: bad_input.Input, directory: Path, workdir: Path) -> list[str]:
    path = directory / "config.py"
    small = {k: v for k, v in run_cli.SMALL.items() if k != "sparsity.sparsity"}
    first = {**small, "sparsity.sparsity": 0.8, **example.base}
    text = _CONFIG.format(first=first, then=example.values)
    path.write_text(text, errors="surrogatepass")
    config = f"{path}:{example.argument}" if example.argument else str(path)
    flags = [f"--config.{name}={text}" for name, text in example.texts]
    return [f"--config={config}", *flags, f"--workdir={workdir}"]


def judge(outcome: run_cli.Outcome, example: bad_input.Input) -> None:
    """Raises Fault unless an outcome is one clear sentence about what was spoilt."""
    if outcome.status != 2:
        raise Fault(f"status {outcome.status}: {outcome.stderr[-500:]}")
    told = [k for k in outcome.stderr.split("\n") if not re.match(r"\d\d:\d\d:", k)]
    if len(told) != 2 or told[1] or not told[0].startswith("error: "):
        raise Fault(f"not one line: {outcome.stderr[:1500]!r}")
    (line, _) = told
    if not line.isprintable() or len(line) > LONGEST:
        raise Fault(f"a strange sentence: {line[:1500]!r}")
    spoilt = [*example.values.items(), *example.texts]
    names = [k if k in bad_input.FIELDS else "--config." for k, _ in spoilt]
    # Of what the argument sets; or a conflict, which may be told by the other field.
    names += ["after the colon", *bad_input.FIELDS] if example.argument else []
    names += [v for _, v in spoilt if isinstance(v, str) and len(v) > 3]
    if not any(name in line for name in [*names, "--config=", "--config:"]):
        raise Fault(f"names none of {names}: {line}")
    if not re.search(REMEDY, line):
        raise Fault(f"names no remedy: {line}")


def _trace(runs: list[Run]) -> None:
    """What training would do first, by shapes alone."""
    job = runs[0].job
    population.make(
        job.make_steps(),
        len(runs),
        way=job.population,
        devices=job.devices,
        batch_size=job.batch_size,
        shared=len({run.job.data_seed for run in runs}) == 1,
    )
    if any(run.record[f"sparsity.{k}"] for run in runs for k in _NEEDED):
        return  # training examples, or files of another run
    with jax.numpy_dtype_promotion("standard"):
        _trace_steps(job)


def _trace_steps(job: Any) -> None:
    network = checkpoint.Network(*jax.eval_shape(lambda: tuple(job.make_network())))
    state = jax.eval_shape(
        creation(job), network, job.rewire_key, job.step_key, job.knobs
    )
    steps, spec, b = job.make_steps(), job.spec, job.batch_size

    def batch(n):
        return {
            "image": jax.ShapeDtypeStruct((n, *spec.image_shape), "uint8"),
            "label": jax.ShapeDtypeStruct((n,), "int32"),
        }

    few = job._replace(total_steps=min(job.total_steps, 100))
    jax.eval_shape(steps.train, state, job.knobs, batch(b), None)
    if table(partial(is_rewire, job.rule), few).any():
        grow = batch(job.grow_examples) if job.grow_examples else None
        jax.eval_shape(steps.rewire, state, job.knobs, batch(b), None, grow)
    for schedule in (job.learning_rate, job.drop_fraction):
        if schedule is not None:
            table(schedule, few)
