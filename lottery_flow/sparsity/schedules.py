"""When a topology changes, and by how much.

    due(t)      = begin <= t <= end and (t - begin) mod interval = 0
    cosine(t)   = f0/2 (1 + cos(pi min(t, T)/T))
    lr(t)       = f0 lr(t)/lr(0)
    sparsity(t) = s_f + (s_i - s_f) (1 - clip((t - t0)/(t1 - t0), 0, 1))^3

Sources: Evci et al. 2020 (cosine) and the paper's released code (the rate); Zhu &
Gupta 2017 (cubic sparsity). Steps count optimizer updates.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

Due = Callable[[Int[Array, ""]], Bool[Array, ""]]


def every(interval: int, begin: int = 0, end: int | None = None) -> Due:
    """Due at begin, begin + interval, ... up to and including `end`.

    Args:
      interval: steps between two rewires.
      begin: first due step.
      end: last step that may be due; None means forever.

    Raises:
      ValueError: interval below 1, begin below 0, or end before begin.
    """
    if interval < 1:
        raise ValueError(f"interval={interval}: give 1 step or more between rewires")
    if begin < 0:
        raise ValueError(f"begin={begin}: the first step is 0")
    if end is not None and end < begin:
        raise ValueError(f"end={end} is before begin={begin}: give a later end")

    def due(step):
        inside = step >= begin if end is None else (step >= begin) & (step <= end)
        return inside & ((step - begin) % interval == 0)

    return due


def constant(fraction: float) -> optax.Schedule:
    """The same drop fraction at every rewire."""
    _check_fraction(fraction)
    return lambda step: jnp.full(jnp.shape(step), fraction, jnp.float32)


def cosine(fraction: float, end: int) -> optax.Schedule:
    """From `fraction` at step 0 to zero at step `end`, and zero after it."""
    _check_fraction(fraction)
    if end < 1:
        raise ValueError(f"end={end}: a cosine needs 1 step or more")

    def schedule(step):
        progress = jnp.minimum(step, end) / end
        return fraction * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return schedule


def follow_learning_rate(
    fraction: float, learning_rate: optax.Schedule
) -> optax.Schedule:
    """`fraction` scaled by lr(step)/lr(0): the default of the paper's MNIST code."""
    _check_fraction(fraction)
    first = float(np.asarray(learning_rate(0)))
    if first <= 0:
        raise ValueError(
            f"learning_rate(0)={first}: a drop fraction that follows the learning "
            "rate needs a positive first rate; take the cosine one with a warm-up"
        )
    return lambda step: fraction * (learning_rate(step) / first)


def cubic_sparsity(
    initial: float, final: float, begin: int, end: int
) -> Callable[[int], float]:
    """Sparsity rising from `initial` at `begin` to `final` at `end`.

    A function of the host, in float64: counts of kept weights must be exact
    integers, which float32 products don't give for large layers.
    """
    if end <= begin:
        raise ValueError(f"end={end} is not after begin={begin}: give a later end")

    def schedule(step):
        left = 1.0 - np.clip((step - begin) / (end - begin), 0.0, 1.0)
        return final + (initial - final) * left**3

    return schedule


def _check_fraction(fraction: float) -> None:
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction={fraction}: give a fraction from 0 to 1")
