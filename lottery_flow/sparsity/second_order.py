"""Second derivatives of small sparse networks; the saliency of Optimal Brain Damage.

    saliency      h_kk w_k^2 / 2                      h the Hessian, or
    Gauss-Newton  G = mean_b J_b^T (d^2 l / dz^2) J_b     z the outputs of example b

Vectors and matrices are over the active parameters, see `active`. Sources: LeCun,
Denker & Solla 1989, "Optimal brain damage" (whose backward recursion approximates the
second diagonal; here both are exact). Random probes, for large networks, are in
`analysis.hutchinson`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from lottery_flow.sparsity.active import active_space
from lottery_flow.sparsity.masks import Masks, Params


def hessian(
    loss_fn: Callable[[Params], Float[Array, ""]], params: Params, masks: Masks
) -> Float[Array, "n n"]:
    """The whole Hessian over the active parameters: n^2 numbers."""

    space = active_space(params, masks)
    return jax.hessian(lambda v: loss_fn(space.unflatten(v)))(space.flatten(params))


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
    space = active_space(params, masks)
    at = space.flatten(params)
    slope = jax.grad(lambda v: loss_fn(space.unflatten(v)))

    def entry(i):
        unit = jnp.zeros_like(at).at[i].set(1)
        return jax.jvp(slope, (at,), (unit,))[1][i]

    diagonal = lax.map(entry, jnp.arange(at.size), batch_size=min(block, at.size))
    return space.unflatten(diagonal)


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

    space = active_space(params, masks)
    gradient = jax.grad(loss_fn)
    return jax.vmap(lambda one: space.flatten(gradient(params, one)))(examples)
