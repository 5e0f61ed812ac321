"""Bounds of single fields: one sentence with the field, the value and the remedy."""

import math
from collections.abc import Collection

from lottery_flow.errors import UserError

INT32 = 2**31 - 1  # the largest step or count


def known(field: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise UserError(f"{field}={value!r} is unknown; give one of {names}")


def at_least(field: str, value: float | int, bound: float | int) -> None:
    if not value >= bound or not _is_finite(value):
        raise UserError(f"{field}={value}: give a finite number of at least {bound}")


def at_most(field: str, value: float | int, bound: float | int) -> None:
    if not value <= bound:
        raise UserError(f"{field}={value}: give at most {bound}")


def above(field: str, value: float | int, bound: float | int) -> None:
    if not value > bound or not _is_finite(value):
        raise UserError(f"{field}={value}: give a finite number above {bound}")


def fraction(field: str, value: float | int) -> None:
    if not 0.0 <= value < 1.0:
        raise UserError(f"{field}={value}: give a fraction from 0 to below 1")


def _is_finite(value: float | int) -> bool:
    return isinstance(value, int) or math.isfinite(value)
