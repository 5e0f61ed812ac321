"""Dropping and growing: one change of the masks, as the rules put it together.

    n_drop = int(n * fraction)          n the active weights of a layer
    kept   = the n - n_drop active weights of the highest drop score
    grown  = the n_drop others of the highest growth score

Source: Evci et al. 2020, "Rigging the Lottery", algorithm 1, and its released code.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from lottery_flow.sparsity import criteria
from lottery_flow.sparsity import granularity as granularity_lib
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.granularity import Granularity
from lottery_flow.sparsity.topk import topk_mask

MaskTree = PyTree[Bool[Array, "..."]]
ScoreTree = PyTree[Float[Array, "..."]]


def drop_grow(
    masks: PyTree[Bool[Array, "..."]],
    drop_scores: PyTree[Float[Array, "..."]],
    grow_scores: PyTree[Float[Array, "..."]],
    fraction: float | Float[Array, ""],
    granularity: Granularity | None = None,
) -> PyTree[Bool[Array, "..."]]:
    """Drops a fraction of the active weights of each layer and grows as many.

    Args:
      masks: active weights, an array for each layer (or a single one).
      drop_scores: the lowest of the active ones are dropped.
      grow_scores: the highest of all positions not kept are grown.
      fraction: of a layer's active weights, from 0 to 1; n_drop is truncated.
      granularity: whole groups are dropped and grown like weights; with n_of_m
        each group grows as many weights as it lost.

    An active weight of zero competes with active weights alone; in the reference code
    an inactive one may take its place.

    Guarantees (for each layer):
      - The result has exactly as many active weights as the mask.
      - Ties are broken by the lower flat index, for dropping and for growing.
      - Whole groups stay whole; n of m weights stay n of m.
    """
    if granularity is not None and granularity.n_active is None:
        pool = functools.partial(granularity_lib.pool, granularity)
        trees = masks, drop_scores, grow_scores
        pooled, drops, grows = (jax.tree.map(pool, tree) for tree in trees)
        groups = drop_grow(pooled, drops, grows, fraction)
        return jax.tree.map(
            lambda flags, m: granularity_lib.expand(granularity, flags, m.shape),
            groups,
            masks,
        )
    kept, n_drop = drop(masks, drop_scores, fraction)
    if granularity is not None:
        refill = functools.partial(granularity_lib.refill, granularity)
        return jax.tree.map(refill, masks, kept, grow_scores)
    return grow(kept, grow_scores, n_drop)


def n_dropped(n_active: Int[Array, "..."], fraction: Any) -> Int[Array, "..."]:
    """How many weights a fraction of the active ones is: truncated, in float32."""
    product = n_active.astype(jnp.float32) * jnp.asarray(fraction, jnp.float32)
    return jnp.clip(jnp.floor(product).astype(jnp.int32), 0, n_active)


def drop(
    masks: MaskTree, scores: ScoreTree, fraction: float | Float[Array, ""]
) -> tuple[MaskTree, PyTree[Int[Array, ""]]]:
    """The active weights but for the lowest scores, and how many are dropped.

    Args: see `drop_grow`.
    """
    n_active = jax.tree.map(masks_lib.count_true, masks)
    n_drop = jax.tree.map(lambda n: n_dropped(n, fraction), n_active)
    n_keep = jax.tree.map(jnp.subtract, n_active, n_drop)
    return topk_mask(scores, n_keep, where=masks), n_drop


def drop_by_sign(
    masks: MaskTree,
    scores: ScoreTree,
    fraction: float | Float[Array, ""],
    weights: ScoreTree,
) -> tuple[MaskTree, PyTree[Int[Array, ""]]]:
    """`drop` of the negative weights, and of the others, each for themselves."""
    negative = jax.tree.map(lambda m, w: m & (w < 0), masks, weights)
    others = jax.tree.map(lambda m, n: m & ~n, masks, negative)
    parts = [drop(part, scores, fraction) for part in (negative, others)]
    (kept, n_drop), (more_kept, n_more) = parts
    kept = jax.tree.map(jnp.logical_or, kept, more_kept)
    return kept, jax.tree.map(jnp.add, n_drop, n_more)


def grow(kept: MaskTree, scores: ScoreTree, n_grow: PyTree[Int[Array, ""]]) -> MaskTree:
    """The kept weights and the `n_grow` highest scores of the other positions."""
    grown = topk_mask(scores, n_grow, where=jax.tree.map(jnp.logical_not, kept))
    return jax.tree.map(jnp.logical_or, kept, grown)


def mean_active(mask: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean of the active entries, float32 or wider; 0 where there are none."""
    x = criteria.widen(x)
    n = jnp.maximum(masks_lib.count_true(mask), 1).astype(x.dtype)
    return jnp.sum(jnp.where(mask, x, jnp.zeros_like(x))) / n


def deviation(mask: Bool[Array, "..."], w: Float[Array, "..."]) -> Float[Array, ""]:
    """The standard deviation of the active entries (divided by n, not n - 1)."""
    w = criteria.widen(w)
    return jnp.sqrt(mean_active(mask, jnp.square(w - mean_active(mask, w))))
