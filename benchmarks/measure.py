"""Ratios of times: in one process, alternating, medians.

Machines are shared and clocks drift, so nothing is timed on its own: the ways to do a
thing take turns, round after round, and what is reported is the median over the rounds
of each one's time over the reference's in the same round. On CPUs the time is that of
the process's own processor seconds, which other processes disturb less than the clock.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Ratio(NamedTuple):
    """One line of the table.

    Attributes:
      name: what was measured.
      reference: over what.
      ratio: median over the rounds.
      low: lower quartile.
      high: upper quartile.
      milliseconds: median time of one call.
      reference_milliseconds: the same of the reference.
      target: what the ratio should not exceed, None without one.
    """

    name: str
    reference: str
    ratio: float
    low: float
    high: float
    milliseconds: float
    reference_milliseconds: float
    target: float | None = None


def clock() -> float:
    """Seconds: of the process on CPUs, of the wall elsewhere."""
    on_cpu = jax.default_backend() == "cpu"
    return time.process_time() if on_cpu else time.perf_counter()


def compare(
    ways: dict[str, Callable[[int], None]],
    reference: str,
    *,
    targets: dict[str, float] | None = None,
    rounds: int = 9,
    seconds: float = 0.2,
    units: dict[str, int] | None = None,
) -> list[Ratio]:
    """Times each way against the reference.

    Args:
      ways: by name, functions of how often to do it, which return when it is done.
      reference: the name of one of them.
      targets: by name.
      rounds: turns that each way takes.
      seconds: that a turn lasts at least.
      units: by name, how many units of work one call does, if not one.
    """
    units = units or {}
    repeats = {}
    for name, way in ways.items():
        way(1)  # compiles
        start = clock()
        way(1)
        repeats[name] = max(1, round(seconds / max(clock() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way(repeats[name])
            elapsed = clock() - start
            times[name].append(elapsed / repeats[name] / units.get(name, 1))
    base = times[reference]
    found = []
    for name, own in times.items():
        if name == reference:
            continue
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        target = (targets or {}).get(name)
        medians = [1e3 * statistics.median(t) for t in (own, base)]
        found.append(Ratio(name, reference, middle, low, high, *medians, target))
    return found


def again(fn: Callable, *args: Any) -> Callable[[int], None]:
    """A way for `compare`: the same call so many times, which consumes nothing."""

    def way(n: int) -> None:
        result = None
        for _ in range(n):
            result = fn(*args)
        jax.block_until_ready(result)

    return way
