"""Criteria of lottery tickets: scores of a weight by its values before and after.

    large_final               |w_f|             small_final    -|w_f|
    large_init                |w_i|             small_init     -|w_i|
    large_init_large_final    min(a |w_f|, |w_i|)
    small_init_small_final    -max(a |w_f|, |w_i|)
    magnitude_increase        |w_f| - |w_i|     movement       |w_f - w_i|
    ..._same_sign             max(0, score) where w_i and w_f have one sign, else 0
    ..._diff_sign             max(0, score) where their signs differ, else 0
    random                    uniform

The highest are kept. a aligns the magnitudes of a layer before and after training: here
it equates the medians of the active weights. Source: Zhou et al. 2019, "Deconstructing
lottery tickets: zeros, signs, and the supermask", where signs matter to supermasks.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from lottery_flow.sparsity.masks import Masks, Params

Scores: TypeAlias = Float[Array, "..."]
Weights: TypeAlias = Float[Array, "..."]
Mask: TypeAlias = Bool[Array | np.ndarray, "..."]
TicketCriterion: TypeAlias = Callable[[Key[Array, ""], Weights, Weights, Mask], Scores]
"""`(key, initial, final, mask) -> scores` of one layer, all of one shape."""


def large_final(key, initial, final, mask) -> Scores:
    """|w_f|: magnitude pruning, and the lottery ticket of Frankle & Carbin."""
    del key, initial, mask
    return jnp.abs(final)


def small_final(key, initial, final, mask) -> Scores:
    """-|w_f|."""
    return -large_final(key, initial, final, mask)


def large_init(key, initial, final, mask) -> Scores:
    """|w_i|: known before training."""
    del key, final, mask
    return jnp.abs(initial)


def small_init(key, initial, final, mask) -> Scores:
    """-|w_i|."""
    return -large_init(key, initial, final, mask)


def large_init_large_final(key, initial, final, mask) -> Scores:
    """min(a |w_f|, |w_i|): large before and after."""
    del key
    return jnp.minimum(*_aligned(initial, final, mask))


def small_init_small_final(key, initial, final, mask) -> Scores:
    """-max(a |w_f|, |w_i|): small before and after."""
    del key
    return -jnp.maximum(*_aligned(initial, final, mask))


def magnitude_increase(key, initial, final, mask) -> Scores:
    """|w_f| - |w_i|."""
    del key, mask
    return jnp.abs(final) - jnp.abs(initial)


def movement(key, initial, final, mask) -> Scores:
    """|w_f - w_i|."""
    del key, mask
    return jnp.abs(final - initial)


def random(key, initial, final, mask) -> Scores:
    """Uniform in [0, 1)."""
    del final, mask
    # float32 whatever the weights: bfloat16 would make most scores tie.
    return jax.random.uniform(key, initial.shape, jnp.float32)


def _where_signs(criterion, is_chosen) -> TicketCriterion:
    def scores(key, initial, final, mask):
        key, other = jax.random.split(key)
        score = criterion(key, initial, final, mask)
        # Signs alone, so that small values do not underflow.
        chosen = is_chosen(jnp.sign(initial), jnp.sign(final)) & (score > 0)
        rest = jax.random.uniform(other, score.shape, score.dtype) - 1
        return jnp.where(chosen, score, rest)

    return scores


def same_sign(criterion: TicketCriterion) -> TicketCriterion:
    """The criterion where training kept the sign.

    Guarantees:
      - Weights that kept their sign and have a positive score keep the score.
      - All others come after these, in random order (a score of zero, ties broken
        at random, as in the source).
    """
    return _where_signs(criterion, lambda initial, final: initial * final > 0)


def diff_sign(criterion: TicketCriterion) -> TicketCriterion:
    """The criterion where training changed the sign; otherwise as `same_sign`."""
    return _where_signs(criterion, lambda initial, final: initial * final < 0)


TICKET_CRITERIA: dict[str, TicketCriterion] = {
    "large_final": large_final,
    "small_final": small_final,
    "large_init": large_init,
    "small_init": small_init,
    "large_init_large_final": large_init_large_final,
    "small_init_small_final": small_init_small_final,
    "magnitude_increase": magnitude_increase,
    "movement": movement,
    "random": random,
    "large_final_same_sign": same_sign(large_final),
    "large_final_diff_sign": diff_sign(large_final),
    "magnitude_increase_same_sign": same_sign(magnitude_increase),
    "magnitude_increase_diff_sign": diff_sign(magnitude_increase),
    "movement_same_sign": same_sign(movement),
    "movement_diff_sign": diff_sign(movement),
}


def ticket_scores(
    criterion: str | TicketCriterion,
    key: Key[Array, ""],
    masks: Masks,
    initial: Params,
    final: Params,
) -> PyTree[Scores | None]:
    """Scores of every masked layer, None at dense leaves.

    Args:
      criterion: a name of `TICKET_CRITERIA`, or a function of the same arguments.
      key: a typed key; layer i uses `fold_in(key, i)`.
      masks: the weights still active; `full` ones before the first round.
      initial: the weights before training.
      final: the weights after it.

    Raises:
      ValueError: an unknown name.
    """
    fn = named_criterion(criterion)

    def score(i, mask, first, last):
        if mask is None:
            return None
        own_key = jax.random.fold_in(key, i)
        # Differences of narrow numbers would tie.
        return fn(own_key, widened(first), widened(last), jnp.asarray(mask))

    leaves, treedef = jax.tree.flatten(masks, is_leaf=lambda x: x is None)
    pairs = zip(jax.tree.leaves(initial), jax.tree.leaves(final), strict=True)
    every = [
        score(i, mask, *pair)
        for i, (mask, pair) in enumerate(zip(leaves, pairs, strict=True))
    ]
    return jax.tree.unflatten(treedef, every)


def named_criterion(criterion: str | TicketCriterion) -> TicketCriterion:
    """The function of that name. Raises ValueError if there is none."""
    if not isinstance(criterion, str):
        return criterion
    if criterion not in TICKET_CRITERIA:
        raise ValueError(
            f"criterion={criterion!r}: give one of {', '.join(TICKET_CRITERIA)}"
        )
    return TICKET_CRITERIA[criterion]


def widened(leaf: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """The same numbers in float32, or in float64 if they are."""
    kind = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    return jnp.asarray(leaf, kind)


def _aligned(initial, final, mask):
    """a |w_f| and |w_i|, of equal medians over the active weights."""

    def median(x):
        return jnp.nanmedian(jnp.where(mask, x, jnp.nan))

    initial, final = jnp.abs(initial), jnp.abs(final)
    below = median(final)
    # Nothing to align where most weights are zero, or none is active.
    one = jnp.ones_like(below)
    a = jnp.where(below > 0, median(initial) / jnp.where(below > 0, below, one), one)
    return a * final, initial
