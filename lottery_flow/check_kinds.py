"""What kind of value each field may have: that of its default, in a range that exists.

Steps and counts are int32 on the devices and all other numbers float32, so a number
beyond these is a mistake that would only show as another number, or as infinity.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lottery_flow import config as config_lib
from lottery_flow.errors import UserError
from lottery_flow.limits import INT32

_FLOAT32 = np.finfo(np.float32)
_SMALLEST, _LARGEST = float(_FLOAT32.tiny), float(_FLOAT32.max)
# Longer than any of ours; names of directories have an end, too.
_LONGEST = 20_000


def fields(config: Any) -> None:
    """Raises UserError at the first field that is missing or of another kind."""
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config: get_config returned {type(config).__name__}, not a ConfigDict; "
            "start from lottery_flow.config.default()"
        )
    _group("", config, config_lib.default())


def value(field: str, given: Any, like: Any) -> None:
    """Raises UserError where a value is not of the kind of another one."""
    kind, fits = _KINDS[type(like)]
    if not fits(given):
        text = repr(given)
        shown = text if len(text) <= 100 else f"{text[:100]}..."
        raise UserError(f"{field}={shown}: give {kind}")


def _group(prefix: str, own: ConfigDict, default: ConfigDict) -> None:
    for name in sorted(set(own) - set(default)):
        known = ", ".join(prefix + k for k in default)
        raise UserError(f"{prefix}{name} is not a field; there are {known}")
    for name, like in default.items():
        field = prefix + name
        if name not in own:
            raise UserError(
                f"{field} is missing; start from lottery_flow.config.default(), which "
                "has all fields"
            )
        try:
            found = own[name]
        except ValueError as error:  # a placeholder that nobody has filled
            raise UserError(f"{field} has no value; give it one") from error
        if not isinstance(like, ConfigDict):
            value(field, found, like)
        elif isinstance(found, ConfigDict):
            _group(f"{field}.", found, like)
        else:
            raise UserError(
                f"{field}={found!r} is a group of fields; give "
                f"{field}.{next(iter(like))} and the others"
            )


def _is_int(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _is_count(given: Any) -> bool:
    return _is_int(given) and abs(given) <= INT32


def _is_listed(given: Any) -> bool:
    """A seed is the largest of what stands in brackets."""
    return _is_int(given) and 0 <= given < 2**32


def _is_float(given: Any) -> bool:
    return isinstance(given, float) and (
        given == 0 or _SMALLEST <= abs(given) <= _LARGEST
    )


def _is_text(given: Any) -> bool:
    """Such as can be written down and be part of a path."""
    return isinstance(given, str) and len(given) <= _LONGEST and given.isprintable()


_KINDS = {
    bool: ("True or False", lambda given: isinstance(given, bool)),
    int: (f"a whole number of at most {INT32:,} in size", _is_count),
    float: (
        f"a finite number, 0 or from {_SMALLEST:.2g} to {_LARGEST:.2g} in size",
        _is_float,
    ),
    str: (f"a text of at most {_LONGEST:,} printable characters", _is_text),
    tuple: (
        "whole numbers from 0 to 2^32 - 1 in brackets, such as (1, 2) or (1,)",
        lambda given: isinstance(given, tuple | list) and all(map(_is_listed, given)),
    ),
}
