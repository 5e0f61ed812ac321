"""Rules that move weights between layers: SNFS and DSR.

SNFS keeps m, a moving average of the dense gradient. One rewire drops in each layer
the smallest weights, and shares what all layers dropped among them:

    n_drop[l] = int(n[l] f(t))
    n_grow[l] ~ sum(n_drop) mean|m|[l] / sum(mean|m|)    the mean over active weights
    grow the n_grow[l] largest |m| of all positions not kept

DSR has one threshold H for all layers, which follows a target N:

    drop     |w| < H; K weights fall
    n_grow[l] ~ K n[l] / sum(n)     n the weights left; uniformly at random, at places
                                    that were inactive before
    H       <- 2 H if K < 0.9 N, H/2 if K > 1.1 N, else H

Sources: Dettmers & Zettlemoyer 2019, "Sparse networks from scratch", and its code
(99 % cap, residual, rule of near-dense layers); without redistribution, the variant
in the code of Evci et al. 2020. Mostafa & Wang 2019, "Parameter efficient training of
deep convolutional neural networks by dynamic sparse reparameterization".
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from lottery_flow.sparsity import criteria, schedules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.rules import Rule
from lottery_flow.sparsity.rules_drop_grow import (
    drop_grow,
    grow,
    mean_active,
    n_dropped,
)
from lottery_flow.sparsity.topk import topk_mask


def allocate(
    total: Int[Array, ""], share: Float[Array, " layers"], room: Int[Array, " layers"]
) -> Int[Array, " layers"]:
    """Shares a number out, in whole numbers, where there is room.

    Layer l first gets floor(total S[l]) - floor(total S[l-1]), with S the cumulated
    shares over their sum, but at most its room. What is left is shared out evenly over
    the layers with room, as if it were poured; a remainder goes to the first of them.

    Args:
      total: what to share out, below 2^31 as is the sum of room.
      share: nonnegative, finite, of any sum; of no sum only if total is 0.
      room: how much each layer can take.

    Guarantees:
      - The sum is exactly total, or the whole room where that is less.
      - No layer gets more than its room.
      - With room for it, a layer's number is less than 1 away from its share or,
        where others are full, not less than that.
    """
    ends = jnp.cumsum(share)
    whole = jnp.where(ends[-1] > 0, ends[-1], 1.0)
    bounds = jnp.floor(total.astype(share.dtype) * ends / whole).astype(jnp.int32)
    # Whatever the rounding of sums: ascending, from 0 to the total.
    bounds = lax.cummax(jnp.clip(bounds, 0, total)).at[-1].set(total)
    given = jnp.minimum(jnp.diff(bounds, prepend=jnp.int32(0)), room)
    more = room - given
    left = jnp.minimum(total, _sum(room)) - _sum(given)

    def poured(level):
        return _sum(jnp.minimum(more, level))

    def set_bit(i, level):
        higher = level | (jnp.int32(1) << jnp.asarray(30 - i, jnp.int32))
        return jnp.where(poured(higher) <= left, higher, level)

    level = lax.fori_loop(0, 31, set_bit, jnp.int32(0))
    open_ = more > level
    rank = jnp.cumsum(open_, dtype=jnp.int32)
    first = open_ & (rank <= left - poured(level))
    return given + jnp.minimum(more, level) + first.astype(jnp.int32)


def snfs(
    is_due: schedules.Due,
    fraction: optax.Schedule,
    *,
    decay: float = 0.9,
    redistribute: bool = True,
    timing: Literal["after", "instead"] = "after",
) -> Rule:
    """Sparse momentum (Dettmers & Zettlemoyer 2019).

    State: m, float32, for each mask; m <- decay m + (1 - decay) g at every step.
    A layer grows at most 99 % of the places it has; the residual goes to the others
    (see `allocate`). A layer of sparsity below 0.2 whose share of the momentum is
    above average drops at most that sparsity. A dropped weight may be grown again.

    Args:
      is_due: the steps that rewire, from `schedules.every`.
      fraction: step -> fraction of each layer's active weights to drop.
      decay: of the moving average, from 0 to below 1.
      redistribute: False grows in each layer as many as it dropped.
      timing: see `Rule`.

    Raises:
      ValueError: a decay outside [0, 1); at `init`, 2^31 weights or more.

    Guarantees:
      - The number of active weights is conserved exactly in total; without
        redistribution in each layer.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay={decay}: give a number from 0 to below 1")

    def init(masks, params):
        _check_total(masks)
        return masks_lib.tree_map(
            lambda m, p: None if m is None else jnp.zeros(p.shape, jnp.float32),
            masks,
            params,
        )

    def observe(state, grads):
        def average(m, g):
            return None if m is None else decay * m + (1 - decay) * g.astype(m.dtype)

        return jax.tree.map(average, state, grads, is_leaf=lambda x: x is None)

    def propose(step, key, masks, params, grads, state):
        del key, grads
        f = jnp.asarray(fraction(step), jnp.float32)
        leaves, treedef = jax.tree.flatten(masks)
        if not leaves:
            return masks, state
        weights = [jnp.abs(w) for w in masks_lib.tree_leaves_at(masks, params)]
        momenta = [jnp.abs(m) for m in jax.tree.leaves(state)]
        if not redistribute:
            return treedef.unflatten(drop_grow(leaves, weights, momenta, f)), state
        n_active = _count(leaves)
        n_free = _sizes(leaves) - n_active
        pairs = zip(leaves, momenta, strict=True)
        means = jnp.stack([mean_active(m, x) for m, x in pairs])
        n_drop = n_dropped(n_active, _fractions(f, means, n_active, n_free))
        kept = topk_mask(weights, list(n_active - n_drop), where=leaves)
        room, total = n_free + n_drop, _sum(n_drop)
        capped = room - (room + 99) // 100
        room = jnp.where(_sum(capped) >= total, capped, room)
        n_grow = allocate(total, _usable(means, n_drop), room)
        return treedef.unflatten(grow(kept, momenta, list(n_grow))), state

    return Rule(is_due, propose, init, observe, timing)


def dsr(
    is_due: schedules.Due,
    *,
    n_prune: int,
    threshold: float = 1e-3,
    timing: Literal["after", "instead"] = "after",
) -> Rule:
    """Dynamic sparse reparameterization (Mostafa & Wang 2019).

    State: the threshold H, float32.

    Args:
      is_due: the steps that rewire, from `schedules.every`.
      n_prune: the target N of weights to move at a rewire, of all layers together.
      threshold: H at the first rewire.
      timing: see `Rule`.

    Raises:
      ValueError: n_prune or threshold not positive; at `init`, 2^31 weights or more.

    Guarantees:
      - The number of active weights is conserved exactly in total, as far as there
        are places that were inactive before.
      - No weight that was just dropped is grown.
    """
    if n_prune < 1:
        raise ValueError(f"n_prune={n_prune}: give 1 weight or more")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: give a positive number")
    # In integers: few = 0.9 N rounded up, many = 1.1 N rounded down.
    few, many = -(-9 * n_prune // 10), 11 * n_prune // 10

    def init(masks, params):
        del params
        _check_total(masks)
        return jnp.float32(threshold)

    def propose(step, key, masks, params, grads, state):
        del step, grads
        leaves, treedef = jax.tree.flatten(masks)
        if not leaves:
            return masks, state
        weights = masks_lib.tree_leaves_at(masks, params)
        scores = [
            criteria.random(jax.random.fold_in(key, i), w, w)
            for i, w in enumerate(weights)
        ]
        pairs = zip(leaves, weights, strict=True)
        kept = [m & (jnp.abs(w).astype(jnp.float32) >= state) for m, w in pairs]
        n_before, n_kept = _count(leaves), _count(kept)
        room = _sizes(leaves) - n_before
        n_pruned = _sum(n_before - n_kept)
        n_grow = allocate(n_pruned, _usable(n_kept, n_before), room)
        born = topk_mask(scores, list(n_grow), where=[~m for m in leaves])
        new = [k | b for k, b in zip(kept, born, strict=True)]
        factor = jnp.where(n_pruned < few, 2.0, jnp.where(n_pruned > many, 0.5, 1.0))
        return treedef.unflatten(new), state * factor.astype(state.dtype)

    return Rule(is_due, propose, init, timing=timing)


def _fractions(f, means, n_active, n_free):
    """f for each layer, but at most its sparsity where that is low and it grows."""
    size = n_active + n_free
    sparsity = n_free / size
    grows = means * means.size > jnp.sum(means)
    return jnp.where((sparsity < 0.2) & grows, jnp.minimum(f, sparsity), f)


def _usable(share, instead) -> Float[Array, " layers"]:
    """The shares, or others where they say nothing: of no sum, or not finite."""
    share, instead = share.astype(jnp.float32), instead.astype(jnp.float32)
    total = jnp.sum(share)
    return jnp.where(jnp.isfinite(total) & (total > 0), share, instead)


def _sum(counts: Int[Array, " layers"]) -> Int[Array, ""]:
    return jnp.sum(counts, dtype=jnp.int32)


def _sizes(masks) -> Int[Array, " layers"]:
    return jnp.asarray([m.size for m in masks], jnp.int32)


def _count(masks) -> Int[Array, " layers"]:
    return jnp.stack([masks_lib.count_true(m) for m in masks])


def _check_total(masks) -> None:
    """Counts over all layers are int32."""
    total = sum(m.size for m in jax.tree.leaves(masks))
    if total >= 2**31:
        raise ValueError(f"{total} masked weights are 2^31 or more: mask fewer layers")
