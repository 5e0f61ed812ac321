"""python -m lottery_flow.analyze spectrum --run=runs/rigl_lenet5-.../seed_0 --step=500

Writes `<run>/analysis/step_<N>/<what>.csv` and `.png` (`<run>/analysis/<what>` for what
looks at all checkpoints), with arrays as `.npz`, and `.json`, which says what it was
made with; where that stands, nothing is done. Options beside their defaults give the
files a name of their own.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from absl import flags

from lottery_flow import _version, command, files, runs
from lottery_flow.analysis import results
from lottery_flow.errors import UserError
from lottery_flow.studies import STUDIES, Findings, Options
from lottery_flow.study import Study, open_run

_LOG = logging.getLogger("lottery_flow")
PATHS = ("interpolation", "alignment", "curve", "autoneb")
# Flags that are fields of `Options` of the same names.
OPTIONS = (
    "examples",
    "batch_size",
    "norms",
    "weight_decay",
    "mask",
    "train_steps",
    "seed",
)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    own: Any = {"flag_values": values}
    flags.DEFINE_string("run", "", "Directory (seed_N) of a run.", **own)
    flags.DEFINE_integer("step", -1, "Of the checkpoint; -1: the newest.", **own)
    flags.DEFINE_list(
        "against", [], "Other runs, DIR or DIR@STEP, with commas between them.", **own
    )
    flags.DEFINE_integer(
        "examples", -1, "First training images to use; 0: all; -1: as usual.", **own
    )
    flags.DEFINE_integer("batch_size", 0, "Examples at once; 0: as usual.", **own)
    flags.DEFINE_enum(
        "norms",
        "",
        ["", "frozen", "batch", "recomputed"],
        "Statistics of norms: running, of the batch, recomputed along a path; '': as "
        "usual.",
        **own,
    )
    flags.DEFINE_float("weight_decay", 0.0, "Of a penalty in the loss.", **own)
    flags.DEFINE_enum(
        "mask",
        "start",
        ["start", "end", "own", "none"],
        "Whose masks both ends of a path get.",
        **own,
    )
    flags.DEFINE_integer("train_steps", 2000, "Of curve and autoneb.", **own)
    flags.DEFINE_integer("seed", 0, "Of what is drawn.", **own)
    flags.DEFINE_string("data_dir", "", "Of TFDS; '': as the run had it.", **own)


def main(argv: Sequence[str]) -> None:
    """Asks one question of one run."""
    what = _what(argv)
    _check_flags(what)
    study = open_run(flags.FLAGS.run, flags.FLAGS.step, flags.FLAGS.data_dir)
    against = tuple(_open(text) for text in flags.FLAGS.against)
    for other in against:
        study.check_same_model(other)
    chosen: dict[str, Any] = {k: flags.FLAGS[k].value for k in OPTIONS}
    found = answer(what, study, Options(against=against, **chosen))
    if not found.new:
        print(f"{found.stem}.json is there; nothing to do.")
    print(f"{study.name}, step {study.step}: {found.text}")
    print(f"{found.stem}*")


class Answer(NamedTuple):
    """What a study found.

    Attributes:
      text: a few words.
      stem: path of its files, without what each is called and its ending.
      new: whether it was found now.
    """

    text: str
    stem: Path
    new: bool

    def table(self, name: str = "") -> pd.DataFrame:
        """One of its tables, "" being the main one."""
        return pd.read_csv(_path(self.stem, name).with_suffix(".csv"))


def answer(what: str, study: Study, options: Options) -> Answer:
    """Asks a question, unless its answer lies beside the checkpoint already.

    Args:
      what: one of `studies.STUDIES`.
      study: the opened run.
      options: what was chosen; where long work keeps its state is filled in here.

    Raises:
      UserError: the question makes no sense, or the answer cannot be written.
    """
    record = _record(what, study, options)
    stem = _place(study, record)
    if _done(stem, record):
        return _kept(stem)
    folder = stem.parent
    options = options._replace(
        state_file=stem.with_suffix(".partial.npz"),
        tag=_hash(record),
        progress=_progress(),
    )
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise UserError(_unwritable(folder, "no permission"))
    try:
        found = STUDIES[what].ask(study, options)
        _write(stem, found, record)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    except OSError as error:
        raise UserError(_unwritable(folder, error.strerror)) from error
    return Answer(found.text, stem, new=True)


def find(what: str, study: Study, options: Options) -> Answer | None:
    """The answer that lies beside the checkpoint already, if there is one."""
    record = _record(what, study, options)
    stem = _place(study, record)
    return _kept(stem) if _done(stem, record) else None


def _kept(stem: Path) -> Answer:
    text = runs.read_object(stem.with_suffix(".json"))["text"]
    return Answer(str(text), stem, new=False)


def _place(study: Study, record: dict[str, Any]) -> Path:
    folder = study.run.paths.root / "analysis"
    if not STUDIES[record["what"]].whole_run:
        folder = folder / f"step_{study.step}"
    return folder / _stem(record["what"], record)


def _unwritable(folder: Path, why: str | None) -> str:
    return (
        f"cannot write to {folder} ({why}); analyse a copy of the run in a directory "
        "that you may write to"
    )


def _what(argv: Sequence[str]) -> str:
    names = "\n".join(f"  {k:<16}{q.about}" for k, q in STUDIES.items())
    if len(argv) != 2 or argv[1] not in STUDIES:
        given = " ".join(argv[1:]) or "nothing"
        raise UserError(f"say what to analyse ({given} is given), one of\n{names}")
    return argv[1]


def _check_flags(what: str) -> None:
    question, default = STUDIES[what], Options()
    least = {"step": -1, "examples": -1, "batch_size": 0, "train_steps": 0, "seed": 0}
    for name, low in (least | {"weight_decay": 0.0}).items():
        value: Any = flags.FLAGS[name].value
        if value < low:
            raise UserError(f"--{name}={value} must be at least {low}")
    for name in OPTIONS:
        value = flags.FLAGS[name].value
        if name not in question.uses and value != getattr(default, name):
            heeded = ", ".join(f"--{k}" for k in question.uses) or "none of them"
            raise UserError(
                f"--{name}={value} does nothing for {what}; leave it out ({heeded} "
                "would)"
            )
    if question.whole_run and flags.FLAGS.step != -1:
        raise UserError(
            f"--step={flags.FLAGS.step} does nothing for {what}, which looks at all "
            "checkpoints; leave it out"
        )
    if not flags.FLAGS.run:
        raise UserError("--run is missing; give the seed_N directory of a run")
    if flags.FLAGS.norms == "recomputed" and what not in PATHS:
        raise UserError(
            f"--norms=recomputed is for {', '.join(PATHS)}; write frozen or batch"
        )
    low, high = question.n_against
    n = len(flags.FLAGS.against)
    if not low <= n <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}"
        raise UserError(f"--against names {n} runs; {what} needs {wanted}")


def _open(text: str) -> Study:
    directory, at, step = text.rpartition("@")
    if not at or "/" in step:  # an @ of the directory's name
        directory, step = text, ""
    if step and not step.isdigit():
        raise UserError(f"--against={text}: {step!r} is no step; write DIR@500")
    return open_run(directory, int(step or -1), flags.FLAGS.data_dir)


def _record(what: str, study: Study, options: Options) -> dict[str, Any]:
    """What the findings depend on, as JSON."""
    networks = [study, *options.against]
    own = {k: getattr(options, k) for k in OPTIONS}
    return {
        "what": what,
        "lottery_flow": _version.__version__,
        "steps": study.steps() if STUDIES[what].whole_run else [study.step],
        "against": [f"{s.run.paths.root.resolve()}@{s.step}" for s in options.against],
        "networks": [_digest(s) for s in networks],
        **own,
    }


def _digest(study: Study) -> str:
    """Of the parameters, masks and statistics of a network."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tuple(study.network)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _stem(what: str, record: dict[str, Any]) -> str:
    """The study's name, with a hash of the options that are not its defaults."""
    default = Options()
    own = {k: record[k] for k in OPTIONS if record[k] != getattr(default, k)}
    if record["against"]:
        own["against"] = record["against"]
    if not own:
        return what
    return f"{what}-{_hash(own)[:8]}"


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _done(stem: Path, record: dict[str, Any]) -> bool:
    """Whether the same was found before, of the same networks."""
    path = stem.with_suffix(".json")
    if not path.exists():
        return False
    try:
        found = runs.read_object(path)
    except ValueError:  # what is damaged is found again
        return False
    return "text" in found and all(found.get(k) == v for k, v in record.items())


def _write(stem: Path, found: Findings, record: dict[str, Any]) -> None:
    for name, table in found.tables.items():
        path = _path(stem, name)
        results.save(path.with_suffix(".csv"), table)
        if hasattr(table, "_fields"):
            results.save(path.with_suffix(".npz"), table)
    for name, figure in found.figures.items():
        results.save(_path(stem, name).with_suffix(".png"), figure)
    about = {
        "text": found.text,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }
    text = json.dumps(record | about, indent=2) + "\n"
    files.write(stem.with_suffix(".json"), text)


def _path(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}_{name}") if name else stem


def _progress():
    """A line now and then, on a terminal one that is written over."""
    began = last = time.monotonic()
    live = sys.stderr.isatty()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if live else 30) and (done < total or not live):
            return
        last = now
        text = f"{done}/{total}, {now - began:.0f} s"
        if live:
            sys.stderr.write(f"\r{text}" + ("\n" if done == total else ""))
        else:
            _LOG.info("%s", text)

    return report


def cli() -> None:
    """The command, from the shell."""
    define_flags(flags.FLAGS)
    command.run(main)


if __name__ == "__main__":
    cli()
