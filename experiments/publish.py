"""What an experiment leaves in `results/<name>/`, and how it is read again.

<name>.csv, <name>_<table>.csv   tidy tables, `config` naming the run directories
<name>.png, <name>_<figure>.png  figures
config.json                      command, settings, trainings, versions, checksums
"""

import hashlib
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pandas as pd

from experiments.trainings import Setup, Training, with_sources
from lottery_flow import _version, files, runs
from lottery_flow import config as config_lib
from lottery_flow.analysis import results
from lottery_flow.build import flat_fields

Tables = dict[str, pd.DataFrame]


def write(out: Path, name: str, module: ModuleType, setup: Setup) -> Tables:
    """Collects an experiment and writes its tables, figure and record.

    Args:
      out: directory of all results.
      name: of the experiment.
      module: with `runs`, `settings`, `collect` and `plot`.
      setup: where its runs are.

    Returns:
      The tables, as they are read again.
    """
    tables = module.collect(setup)
    folder = out / name
    paths = {key: folder / _file(name, key) for key in tables}
    for key, table in tables.items():
        folder.mkdir(parents=True, exist_ok=True)
        # The digits that single precision has; an empty text is a value of its own.
        text = table.to_csv(index=False, float_format="%.7g", na_rep="nan")
        files.write(paths[key], text)
    tables = read(out, name)
    for key, figure in module.plot(tables).items():
        results.save((folder / _file(name, key)).with_suffix(".png"), figure)
    smoke = " --smoke" if setup.smoke else ""
    record = {
        "about": module.ABOUT,
        "command": f"python -m experiments.run {name}{smoke}",
        **described(module, setup),
        "files": {path.name: _sha256(path) for path in paths.values()},
        "versions": {
            "lottery_flow": _version.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "backend": jax.default_backend(),
    }
    files.write(folder / "config.json", json.dumps(record, indent=1) + "\n")
    return tables


def described(module: ModuleType, setup: Setup) -> dict[str, Any]:
    """What the tree says now of an experiment: its settings and trainings."""
    return {
        "seeds": list(setup.seeds),
        "settings": json.loads(json.dumps(module.settings(setup))),
        "trainings": [_described(t, setup) for t in with_sources(module.runs(setup))],
    }


def _described(training: Training, setup: Setup) -> dict[str, Any]:
    default = flat_fields(config_lib.default())
    fields = flat_fields(training.config(setup.anywhere))
    own = {
        k: v
        for k, v in fields.items()
        if v != default[k] and k not in ("data.dir", *runs.UNHASHED)
    }
    return {
        "training": training.label,
        "config": training.digest(setup),
        "file": f"configs/{training.method}_{training.network}.py",
        "fields": own,
    }


def read(out: Path, name: str) -> Tables:
    """The tables of an experiment, "" being the main one."""
    found = sorted((out / name).glob(f"{name}*.csv"))
    return {
        path.stem.removeprefix(name).removeprefix("_"): pd.read_csv(
            path, keep_default_na=False, na_values=["nan"]
        )
        for path in found
    }


def _file(name: str, key: str) -> str:
    return f"{name}_{key}.csv" if key else f"{name}.csv"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
