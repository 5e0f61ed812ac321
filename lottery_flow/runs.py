"""Run identity: which directory a run lives in, and what lies in it.

    <workdir>/<config name>-<8 hex of the config>/seed_<N>/[level_<N>/]
        config.json  metrics.jsonl  checkpoints/  summary.txt  figure.png  DONE

The hash covers the fields that differ from the default configuration, so that a new
option orphans no old run. Seeds, the place of the data, how things are computed
and what is only shown (`UNHASHED`) stay out of it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lottery_flow import files
from lottery_flow.errors import UserError

UNHASHED = (
    "name",
    "data.dir",
    "data.workers",
    "model.lowering",
    "tickets.level",
    "train.chunk_steps",
    "train.data_devices",
    "train.member_devices",
    "train.model_devices",
    "train.population",
    "train.seeds",
    "train.vary",
    "train.tensorboard",
    "train.figure",
)

ENVIRONMENT = "environment"  # of config.json: no field, and no part of the identity

Fields = Mapping[str, Any]  # flat: {'optim.learning_rate': 0.05, ...}


class RunPaths(NamedTuple):
    """The files of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def execution(self) -> Path:
        return self.root / "execution.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.txt"

    @property
    def figure(self) -> Path:
        return self.root / "figure.png"

    @property
    def done(self) -> Path:
        return self.root / "DONE"


def config_hash(fields: Fields, default: Fields) -> str:
    """Eight hex digits of the fields that make two runs different."""
    own = {
        k: v
        for k, v in fields.items()
        if k not in UNHASHED and (k not in default or default[k] != v)
    }
    text = json.dumps(own, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_paths(workdir: str, fields: Fields, default: Fields, seed: int) -> RunPaths:
    """Where the run of these fields and this seed lives; creates nothing."""
    name = f"{fields['name']}-{config_hash(fields, default)}"
    root = Path(workdir) / name / f"seed_{seed}"
    if fields["tickets.rounds"]:
        root /= f"level_{fields['tickets.level']}"
    return RunPaths(root)


def check(paths: RunPaths, record: Fields) -> None:
    """Checks that a run's directory, if there is one, is of this very run.

    Args:
      paths: of the run.
      record: what config.json says: the seed, all fields and the environment, which
        may be another one.

    Raises:
      UserError: the directory holds a run with other fields.
    """
    if not paths.config.exists():
        return
    try:
        found = read_object(paths.config)
    except ValueError as error:
        raise UserError(
            f"{paths.config} is not a readable configuration; restore it, or give "
            "another --workdir"
        ) from error
    for key, value in record.items():
        if key not in (*UNHASHED, ENVIRONMENT) and key in found and found[key] != value:
            raise UserError(
                f"{paths.root} holds a run of another configuration: {key} is "
                f"{found[key]!r} there and {value!r} here; give another --workdir"
            )


def claim(paths: RunPaths, record: Fields) -> None:
    """Creates the run's directory and its config.json, if they are not there.

    Raises:
      UserError: the directory can't be written.
    """
    if paths.config.exists():
        return
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        files.write(paths.config, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--workdir: cannot write to {paths.root} ({error.strerror}); give a "
            "directory that you may write to"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that anybody may have written.

    Raises:
      ValueError: it holds anything else.
      OSError: it cannot be opened.
    """
    try:
        found = json.loads(path.read_text())
    except RecursionError as error:  # brackets in brackets in brackets
        raise ValueError("it is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}, not an object")
    return found
