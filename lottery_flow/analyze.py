"""python -m lottery_flow.analyze spectrum --run=runs/rigl_lenet5-.../seed_0 --step=500

Writes `<run>/analysis/step_<N>/<what>.csv` and `.png` (`<run>/analysis/<what>` for what
looks at all checkpoints), with arrays as `.npz`, and `.json`, which says what it was
made with; where that stands, nothing is done. Options beside their defaults give the
files a name of their own.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from lottery_flow import _version, command, runs
from lottery_flow.analysis import results
from lottery_flow.errors import UserError
from lottery_flow.studies import STUDIES, Findings, Options
from lottery_flow.study import Study, open_run

_LOG = logging.getLogger("lottery_flow")


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
    question = STUDIES[what]
    least = {"step": -1, "examples": -1, "batch_size": 0, "train_steps": 0, "seed": 0}
    for name, low in (least | {"weight_decay": 0.0}).items():
        value: Any = flags.FLAGS[name].value
        if value < low:
            raise UserError(f"--{name}={value} must be at least {low}")
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
    study = open_run(flags.FLAGS.run, flags.FLAGS.step, flags.FLAGS.data_dir)
    against = tuple(_open(text) for text in flags.FLAGS.against)
    for other in against:
        study.check_same_model(other)
    folder = study.run.paths.root / "analysis"
    if not question.whole_run:
        folder = folder / f"step_{study.step}"
    options = _options(what, against)
    record = _record(what, study, options)
    stem = folder / _stem(what, record)
    if _done(stem, record):
        print(f"{stem}.json is there; nothing to do.")
        print(json.loads(stem.with_suffix(".json").read_text())["text"])
        return
    options = options._replace(
        state_file=stem.with_suffix(".partial.npz"), progress=_progress()
    )
    try:
        found = question.ask(study, options)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    _write(stem, found, record)
    print(f"{study.name}, step {study.step}: {found.text}")
    print(f"{stem}*")


PATHS = ("interpolation", "alignment", "curve", "autoneb")


def _what(argv: Sequence[str]) -> str:
    names = "\n".join(f"  {k:<16}{q.about}" for k, q in STUDIES.items())
    if len(argv) != 2 or argv[1] not in STUDIES:
        given = " ".join(argv[1:]) or "nothing"
        raise UserError(f"say what to analyse ({given} is given), one of\n{names}")
    return argv[1]


def _open(text: str) -> Study:
    directory, _, step = text.partition("@")
    if step and not step.isdigit():
        raise UserError(f"--against={text}: {step!r} is no step; write DIR@500")
    return open_run(directory, int(step or -1), flags.FLAGS.data_dir)


def _options(what: str, against: tuple[Study, ...]) -> Options:
    names = ("examples", "batch_size", "norms", "weight_decay", "mask", "train_steps")
    chosen: dict[str, Any] = {
        name: flags.FLAGS[name].value for name in (*names, "seed")
    }
    return Options(against=against, **chosen)


def _record(what: str, study: Study, options: Options) -> dict[str, Any]:
    """What the findings depend on, as JSON."""
    own = options._asdict() | {
        "against": [f"{s.run.paths.root.resolve()}@{s.step}" for s in options.against]
    }
    for name in ("state_file", "progress"):
        del own[name]
    return {"what": what, "step": study.step, **own}


def _stem(what: str, record: dict[str, Any]) -> str:
    """The study's name, with a hash of the options that are not its defaults."""
    default = Options()._asdict()
    own = {k: v for k, v in record.items() if k in default and v != default[k]}
    own = {k: v for k, v in own.items() if v not in ((), [])}
    if not own:
        return what
    text = json.dumps(own, sort_keys=True)
    return f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _done(stem: Path, record: dict[str, Any]) -> bool:
    """Whether the same was found before; what looks at all checkpoints, up to now."""
    path = stem.with_suffix(".json")
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    return all(found.get(k) == v for k, v in record.items())


def _write(stem: Path, found: Findings, record: dict[str, Any]) -> None:
    try:
        for name, table in found.tables.items():
            path = _path(stem, name)
            results.save(path.with_suffix(".csv"), table)
            if hasattr(table, "_fields"):
                results.save(path.with_suffix(".npz"), table)
        for name, figure in found.figures.items():
            results.save(_path(stem, name).with_suffix(".png"), figure)
        about = {
            "text": found.text,
            "lottery_flow": _version.__version__,
            "jax": jax.__version__,
            "backend": jax.default_backend(),
        }
        text = json.dumps(record | about, indent=2) + "\n"
        runs.write_atomically(stem.with_suffix(".json"), text)
    except OSError as error:
        raise UserError(
            f"cannot write to {stem.parent} ({error.strerror}); analyse a copy of the "
            "run in a directory that you may write to"
        ) from error


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
