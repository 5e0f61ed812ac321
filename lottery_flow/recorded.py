"""What config.json of a run says: its configuration, its seed, its environment."""

from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lottery_flow import check_kinds, runs
from lottery_flow import config as config_lib
from lottery_flow.build import flat_fields
from lottery_flow.errors import UserError


class Recorded(NamedTuple):
    """What a run says of itself.

    Attributes:
      config: all fields; those that the version of the run did not have yet are at
        their defaults.
      seed: of the run.
      environment: see `environment`; {} where the run is older than that.
      record: all of config.json.
    """

    config: ConfigDict
    seed: int
    environment: dict[str, Any]
    record: dict[str, Any]


def read(directory: Path) -> Recorded:
    """The configuration of a run, from its seed_N directory.

    Raises:
      UserError: there is none, or one of another version.
    """
    path = directory / "config.json"
    try:
        record = runs.read_object(path)
        seed, environment = record["seed"], record.get(runs.ENVIRONMENT, {})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read; give the seed_N directory of a run"
        ) from error
    if type(seed) is not int or not isinstance(environment, dict):
        raise UserError(f"{path} is damaged; give the seed_N directory of a run")
    config = config_lib.default()
    known = flat_fields(config)
    for name, value in record.items():
        if name in ("seed", runs.ENVIRONMENT):
            continue
        if name not in known:
            raise UserError(f"{path}: {name} is not a field of this version")
        group, _, field = name.rpartition(".")
        values = config[group] if group else config
        if isinstance(value, list):
            value = tuple(value)
        try:
            check_kinds.value(name, value, values[field])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        values[field] = value
    return Recorded(config.lock(), seed, environment, record)
