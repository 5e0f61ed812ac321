"""Second derivatives of small sparse networks; the saliency of Optimal Brain Damage.

    saliency      h_kk w_k^2 / 2                      h the Hessian, or
    Gauss-Newton  G = mean_b J_b^T (d^2 l / dz^2) J_b     z the outputs of example b

Vectors and matrices are over the active parameters: the active entries of leaves with a
mask and all of the others, leaf after leaf. Sources: LeCun, Denker & Solla 1989,
"Optimal brain damage" (whose backward recursion approximates the second diagonal; here
both are exact). Random probes, for large networks, are in `analysis.hutchinson`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

from lottery_flow.sparsity.masks import Masks, Params


def active_vector(masks: Masks, tree: PyTree) -> Float[Array, " n"]:
    """The active entries of a tree, one after the other.

    Args:
      masks: concrete (not traced), so that n is known.
      tree: of the same structure.

    Returns:
      float32, or float64 if a leaf is.
    """
    leaves = jax.tree.leaves(tree)
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    kind = jnp.float64 if wide else jnp.float32
    indices = active_indices(masks, tree)
    parts = [
        jnp.ravel(leaf).astype(kind)[i] for leaf, i in zip(leaves, indices, strict=True)
    ]
    return jnp.concatenate(parts)


def from_active_vector(
    masks: Masks, vector: Shaped[Array, " n"], params: PyTree
) -> PyTree:
    """The tree with these active entries; shapes and dtypes are those of `params`.

    Guarantees:
      - Inactive entries are exactly zero.
      - Of `active_vector(masks, params)` it gives `masks.apply(masks, params)`.
    """
    leaves, treedef = jax.tree.flatten(params)
    new, start = [], 0
    for leaf, index in zip(leaves, active_indices(masks, params), strict=True):
        entries = vector[start : start + len(index)].astype(leaf.dtype)
        start += len(index)
        flat = jnp.zeros(leaf.size, leaf.dtype)
        flat = flat.at[index].set(entries, unique_indices=True, indices_are_sorted=True)
        new.append(flat.reshape(leaf.shape))
    return jax.tree.unflatten(treedef, new)


def active_indices(masks: Masks, params: PyTree) -> list[np.ndarray]:
    """Flat indices of the active entries of every leaf, in order."""

    def of(mask, leaf):
        return np.arange(leaf.size) if mask is None else np.flatnonzero(np.array(mask))

    flags = jax.tree.leaves(masks, is_leaf=lambda x: x is None)
    pairs = zip(flags, jax.tree.leaves(params), strict=True)
    return [of(mask, leaf).astype(np.int32) for mask, leaf in pairs]


def hessian(
    loss_fn: Callable[[Params], Float[Array, ""]], params: Params, masks: Masks
) -> Float[Array, "n n"]:
    """The whole Hessian over the active parameters: n^2 numbers."""

    def loss(vector):
        return loss_fn(from_active_vector(masks, vector, params))

    return jax.hessian(loss)(active_vector(masks, params))


def hessian_diagonal(
    loss_fn: Callable[[Params], Float[Array, ""]],
    params: Params,
    masks: Masks,
    *,
    block: int = 32,
) -> Params:
    """The exact diagonal of the Hessian: one product of it for each active parameter.

    Args:
      loss_fn: params -> loss.
      params: the sparse parameters.
      masks: concrete.
      block: products at a time.

    Returns:
      A tree like `params`, zero where inactive.
    """
    at = active_vector(masks, params)

    def slope(vector):
        return jax.grad(lambda v: loss_fn(from_active_vector(masks, v, params)))(vector)

    def entry(i):
        unit = jnp.zeros_like(at).at[i].set(1)
        return jax.jvp(slope, (at,), (unit,))[1][i]

    diagonal = lax.map(entry, jnp.arange(at.size), batch_size=min(block, at.size))
    return from_active_vector(masks, diagonal, params)


def gauss_newton_diagonal(
    outputs_fn: Callable[[Params, Any], Float[Array, " c"]],
    criterion_fn: Callable[[Float[Array, " c"], Any], Float[Array, ""]],
    params: Params,
    examples: PyTree,
) -> Params:
    """The exact diagonal of the Gauss-Newton matrix, non-negative for a convex loss.

    Args:
      outputs_fn: (params, example) -> outputs of one example.
      criterion_fn: (outputs, example) -> its loss.
      params: the sparse parameters.
      examples: arrays with a leading axis of examples, which are averaged.

    Returns:
      A tree like `params`, inactive weights included.
    """

    def add(total, example):
        outputs = outputs_fn(params, example)
        curvature = jax.hessian(lambda z: criterion_fn(z, example))(outputs)
        jacobian = jax.jacrev(lambda p: outputs_fn(p, example))(params)

        def diagonal(sums, j):
            curved = jnp.tensordot(curvature, j, 1, precision=lax.Precision.HIGHEST)
            return sums + jnp.sum(j * curved, axis=0)

        return jax.tree.map(diagonal, total, jacobian), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = lax.scan(add, zeros, examples)
    n = len(jax.tree.leaves(examples)[0])
    return jax.tree.map(lambda x: x / n, total)


def obd_saliency(diagonal: Params, params: Params) -> Params:
    """h_kk w_k^2 / 2: the increase of the loss, by a diagonal model, without weight k.

    The lowest are deleted, with `ticket_masks.prune_round` for instance.
    """
    return jax.tree.map(lambda h, w: h * jnp.square(w) / 2, diagonal, params)


def example_gradients(
    loss_fn: Callable[[Params, Any], Float[Array, ""]],
    params: Params,
    masks: Masks,
    examples: PyTree,
) -> Float[Array, "m n"]:
    """The gradient of each example's loss over the active parameters.

    Args:
      loss_fn: (params, example) -> loss of one example.
      params: the sparse parameters.
      masks: concrete.
      examples: arrays with a leading axis of m examples.
    """

    def gradient(example):
        return active_vector(masks, jax.grad(loss_fn)(params, example))

    return jax.vmap(gradient)(examples)
