"""The gradient of a batch in parts, one after another, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree


def mean(
    gradient: Callable,
    trained: PyTree,
    batch_stats: PyTree,
    batch: dict[str, Any],
    key: Key[Array, ""],
    n: int,
    *rest: Any,
) -> tuple:
    """The mean gradient of n parts of a batch: that of the batch, but for norms.

    Args:
      gradient: `(trained, batch_stats, batch, key, *rest) -> ((loss, (batch_stats,
        accuracy)), grads)`.
      trained: what it is taken of.
      batch_stats: of norms; they take in one part after another.
      batch: arrays of a multiple of n examples.
      key: each part folds its number into it.
      n: parts; one is the batch as it is.
      *rest: see `gradient`.

    Returns:
      As `gradient`.
    """
    if n == 1:
        return gradient(trained, batch_stats, batch, key, *rest)

    def add(carry, part):
        stats, sums = carry
        own, i = part
        own_key = jax.random.fold_in(key, i)
        (loss, (stats, accuracy)), grads = gradient(trained, stats, own, own_key, *rest)
        return (stats, jax.tree.map(jnp.add, sums, (loss, accuracy, grads))), None

    # Each device computes a part of every part: no image leaves where it is.
    cut = jax.tree.map(lambda v: v.reshape(-1, n, *v.shape[1:]).swapaxes(0, 1), batch)
    zero = jnp.zeros((), jnp.float32)
    zeros = zero, zero, jax.tree.map(jnp.zeros_like, trained)
    (stats, sums), _ = jax.lax.scan(add, (batch_stats, zeros), (cut, jnp.arange(n)))
    loss, accuracy, grads = jax.tree.map(lambda v: v / n, sums)
    return (loss, (stats, accuracy)), grads


def fewest(n_examples: int, at_least: int) -> int:
    """The fewest equal parts, that many or more; at most one for each example."""
    low = min(at_least, n_examples)
    return next(n for n in range(low, n_examples + 1) if n_examples % n == 0)
