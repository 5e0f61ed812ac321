"""Optimal Brain Surgeon: remove one weight after the other, and correct the others.

    L_q = w_q^2 / (2 [H^-1]_qq)                      the loss gained without weight q
    dw  = -(w_q / [H^-1]_qq) H^-1 e_q                correction; w_q + dw_q = 0
    H^-1 <- H^-1 - H^-1 e_q e_q^T H^-1 / [H^-1]_qq   the inverse for those left

The last line (a Schur complement) makes later removals account for earlier ones. The
inverse of the empirical Fisher matrix, alpha I + (1/m) sum g g^T, needs no inversion:

    H_0^-1 = I / alpha
    H_i^-1 = H_{i-1}^-1 - (H_{i-1}^-1 g)(H_{i-1}^-1 g)^T / (m + g^T H_{i-1}^-1 g)

For larger networks H is taken as block diagonal. Source: Hassibi & Stork 1992, "Second
order derivatives for network pruning: optimal brain surgeon" (and, with Wolff, 1993).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.active import active_space
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.topk import topk_mask


class Pruned(NamedTuple):
    """A network after some removals.

    Attributes:
      params: corrected; zero where inactive.
      masks: what is left.
      increase: of the loss, by the quadratic model: the sum of the L_q.
    """

    params: Params
    masks: Masks
    increase: Float[Array, ""]


@jax.jit
def inverse_fisher(
    grads: Float[Array, "m n"], alpha: float | Float[Array, ""]
) -> Float[Array, "n n"]:
    """(alpha I + mean of g g^T)^-1, one example after the other.

    Args:
      grads: of each example, `second_order.example_gradients`.
      alpha: damping, positive (1e-8 to 1e-4 in the source, for float64).
    """
    m, n = grads.shape

    def step(inverse, grad):
        image = jnp.matmul(inverse, grad, precision=lax.Precision.HIGHEST)
        scale = m + jnp.sum(grad * image)
        return inverse - jnp.outer(image, image) / scale, None

    start = jnp.eye(n, dtype=grads.dtype) / jnp.asarray(alpha, grads.dtype)
    return lax.scan(step, start, grads)[0]


def blocks(
    masks: Masks, params: Params, size: int | None = None
) -> Int[np.ndarray, "blocks size"]:
    """Which active parameters form a block: consecutive ones of one leaf.

    Args:
      masks: concrete; coordinates are those of `active.active_space`.
      params: arrays or shapes.
      size: parameters a block; None for a whole leaf.

    Returns:
      Coordinates, int32; n where a block is not full.

    Raises:
      ValueError: a size below 1, or nothing is active.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size}: give 1 or more parameters a block")
    space = active_space(params, masks)
    leaves = space.layers.values()
    width = size or max(leaf.stop - leaf.start for leaf in leaves)
    rows = []
    for leaf in leaves:
        for first in range(leaf.start, leaf.stop, width):
            row = np.full(width, space.n, np.int32)
            part = np.arange(first, min(first + width, leaf.stop))
            row[: len(part)] = part
            rows.append(row)
    return np.stack(rows)


@jax.jit
def inverse_fisher_blocks(
    grads: Float[Array, "m n"],
    layout: Int[Array | np.ndarray, "blocks size"],
    alpha: float | Float[Array, ""],
) -> Float[Array, "blocks size size"]:
    """`inverse_fisher` of every block by itself."""
    of_block = jnp.moveaxis(_gather(grads, layout), 1, 0)
    return jax.vmap(inverse_fisher, in_axes=(0, None))(of_block, alpha)


def obs_prune(
    params: Params,
    masks: Masks,
    inverse: Float[Array, "n n"] | Float[Array, "blocks size size"],
    n_remove: int,
    layout: Int[Array | np.ndarray, "blocks size"] | None = None,
) -> Pruned:
    """Removes weights in the order of their saliency and corrects the others.

    Each time the weight of the least L_q among all that have a mask goes. Leaves
    without a mask keep all their parameters, which are corrected too. A weight whose
    [H^-1]_qq is not positive goes last, and corrects nothing.

    Args:
      params: the sparse parameters, at or near a minimum of the loss.
      masks: concrete.
      inverse: of the Hessian, positive definite, over the active parameters: whole, or
        by the blocks of `layout`.
      n_remove: how many weights go.
      layout: `blocks` of the same masks; None if `inverse` is whole.

    Raises:
      ValueError: more weights to remove than there are, or an inverse of another size.

    Guarantees:
      - Exactly n_remove weights go, and inactive weights are exactly zero.
      - For a quadratic loss at its minimum, and the whole inverse, the loss grows by
        `increase` and the weights left are at its minimum.
      - One block of everything gives what the whole inverse gives.
    """
    space = active_space(params, masks)
    weights, n = space.flatten(params), space.n
    if layout is None:
        layout, inverse = np.arange(n, dtype=np.int32)[None], inverse[None]
    if inverse.shape != (*layout.shape, layout.shape[1]):
        raise ValueError(
            f"inverse has shape {inverse.shape}, the blocks {layout.shape}; take both "
            "for the active parameters of the same masks"
        )
    removable = np.zeros(n, bool)
    for leaf, index in zip(space.layers.values(), space.indices, strict=True):
        removable[leaf] = index is not None
    n_masked = int(removable.sum())
    if not 0 <= n_remove <= n_masked:
        raise ValueError(
            f"n_remove={n_remove}, but {n_masked} active weights have a mask; give a "
            "number from 0 to that"
        )
    weights, kept, increase = _prune(
        weights, jnp.asarray(removable), inverse, jnp.asarray(layout), n_remove
    )
    left = space.unflatten(kept.astype(space.dtype))
    new_masks = masks_lib.tree_map(
        lambda mask, flag: None if mask is None else flag != 0, masks, left
    )
    new_params = masks_lib.apply(new_masks, space.unflatten(weights))
    return Pruned(new_params, new_masks, increase)


class _Block(NamedTuple):
    """A block while its weights go."""

    weights: Float[Array, " size"]
    inverse: Float[Array, "size size"]
    removable: Bool[Array, " size"]


@jax.jit
def _prune(weights, removable, inverse, layout, n_remove):
    """New weights, which of them are left, and the increase of the loss."""
    inverse = inverse.astype(weights.dtype)
    start = _Block(_gather(weights, layout), inverse, _gather(removable, layout))
    n_blocks, size = layout.shape
    # Blocks do not touch each other: each has an order of its own, and all of them
    # are looked at together only to know how far each gets.
    n_steps = jnp.minimum(size, n_remove)
    n_of_block = jnp.full(n_blocks, n_remove, jnp.int32)
    if n_blocks > 1:
        # A cheap weight behind a dear one goes right after it.
        cost = lax.cummax(jax.vmap(lambda b: _costs(b, n_steps))(start), axis=1)
        taken = topk_mask(-cost, n_remove, jnp.isfinite(cost))
        n_of_block = jnp.sum(taken, axis=1, dtype=jnp.int32)

    def run(block, n):
        def step(i, carry):
            block, total = carry
            after, cost = _remove(block)
            go = i < n
            block = jax.tree.map(partial(jnp.where, go), after, block)
            return block, total + jnp.where(go, cost, jnp.zeros_like(cost))

        return lax.fori_loop(0, n_steps, step, (block, jnp.zeros((), weights.dtype)))

    end, increase = jax.vmap(run)(start, n_of_block)
    gone = start.removable & ~end.removable
    out = jnp.zeros(weights.size + 1, weights.dtype).at[layout].set(end.weights)
    left = jnp.ones(weights.size + 1, bool).at[layout].set(~gone)
    return out[:-1], left[:-1], jnp.sum(increase)


def _costs(block: _Block, n_steps) -> Float[Array, " size"]:
    """What each removal costs, in their order; inf beyond the last."""

    def step(i, carry):
        block, costs = carry
        block, cost = _remove(block)
        return block, costs.at[i].set(cost)

    none = jnp.full_like(block.weights, jnp.inf)
    return lax.fori_loop(0, n_steps, step, (block, none))[1]


def _remove(block: _Block) -> tuple[_Block, Float[Array, ""]]:
    """The block without its cheapest weight, and the cost; inf if none is left."""
    weights, inverse, removable = block
    diagonal = jnp.diagonal(inverse)
    sound = diagonal > 0  # rounding may spoil it when nearly everything is gone
    cost = jnp.square(weights) / (2 * jnp.where(sound, diagonal, 1))
    cost = jnp.where(sound, cost, jnp.finfo(cost.dtype).max)
    cost = jnp.where(removable, cost, jnp.inf)
    q = jnp.argmin(cost)
    column, pivot = inverse[:, q], jnp.where(sound[q], diagonal[q], 1)
    is_q = jnp.arange(len(weights)) == q
    zero = jnp.zeros_like(column)
    corrected = jnp.where(sound[q], weights - (weights[q] / pivot) * column, weights)
    downdated = inverse - jnp.outer(column, column) / pivot
    # Exactly zero, so that a removed weight is never corrected again.
    downdated = jnp.where(is_q[:, None] | is_q[None, :], zero[:, None], downdated)
    after = _Block(jnp.where(is_q, zero, corrected), downdated, removable & ~is_q)
    some = jnp.any(removable)
    return jax.tree.map(partial(jnp.where, some), after, block), cost[q]


def _gather(values: Array, layout: Array | np.ndarray) -> Array:
    """Values by block along the last axis; zero where a block is not full."""
    tail = jnp.zeros((*values.shape[:-1], 1), values.dtype)
    return jnp.concatenate([values, tail], axis=-1)[..., layout]
