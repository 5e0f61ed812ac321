"""Hessians of the active parameters as linear maps, and what products tell of them.

    H v = d/de grad L(w + e v) at e = 0        jvp of grad, forward over reverse
    v^T H v = d^2/de^2 L(w + e v) at e = 0     jvp of jvp, which needs no way back
    G v = J^T (d2 criterion) J v               Gauss-Newton part
    H = G + R                                  R: curvature of the logits, residual part

(Pearlmutter 1994; Schraudolph 2002.) All live in the space of active parameters
(`active.ActiveSpace`), which is mask o H o mask without its zero rows: inactive weights
give no eigenvalues. What the loss is, with which norms and whether with a penalty, is
the objective's affair (`objective`); the paper uses neither penalty nor running
averages.

Products take any number of vectors in one program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.objective import LossFn, Objective
from lottery_flow.sparsity.active import ActiveSpace, active_space
from lottery_flow.sparsity.masks import Masks, Params

Progress = Callable[[int, int], None]  # (done, all)


class Operator(NamedTuple):
    """A symmetric linear map of the space of active parameters.

    Attributes:
      space: where its vectors live.
      product: `float [s n] -> float [s n]`, each row by itself.
      quadratic: `float [s n] -> float [s]`, v^T A v of each row, where that is cheaper
        than by a product; None where it is not known.
    """

    space: ActiveSpace
    product: Callable
    quadratic: Callable | None = None

    def __call__(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """The product with one vector."""
        return self.product(vector[None])[0]


def hessian(
    loss_fn: LossFn,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    block: int | None = None,
) -> Operator:
    """The Hessian of the mean loss over all batches.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch; or an `Objective`.
      params: where it is taken.
      masks: what is active; None: everything.
      batches: of any size and number, see `batches`; may be spread over devices.
      block: vectors that are multiplied at once, see `each`.

    Guarantees:
      - Equals the rows and columns of `jax.hessian` that belong to active parameters.
      - Does not depend on how the examples are cut into batches, where the loss of an
        example does not depend on the others.
    """

    def product(params, tangent, batch):
        return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (tangent,))[1]

    def quadratic(params, tangent, batch):
        return _second(lambda p: loss_fn(p, batch), params, tangent)

    return _operator(product, quadratic, params, masks, batches, block)


def explicit(matrix: np.ndarray, space: ActiveSpace) -> Operator:
    """A matrix as an operator, for many products in a small space.

    Args:
      matrix: symmetric, float [n n], in the coordinates of the space; for instance
        `spectrum.hessian_matrix`.
      space: of the active parameters.

    Raises:
      ValueError: a matrix of another shape.
    """
    if matrix.shape != (space.n, space.n):
        raise ValueError(
            f"matrix has shape {matrix.shape}, but there are {space.n} active "
            "parameters; give a matrix of these"
        )
    whole = jnp.asarray(matrix, space.dtype)

    @jax.jit
    def product(vectors):
        with precise():
            return vectors @ whole

    @jax.jit
    def quadratic(vectors):
        with precise():
            return jnp.sum(vectors * (vectors @ whole), axis=1)

    return Operator(space, product, quadratic)


def gauss_newton(
    objective: Objective,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    block: int | None = None,
) -> Operator:
    """The Gauss-Newton part of the Hessian, without the penalty.

    Positive semi-definite where the criterion is convex in the logits. The arguments
    are those of `hessian`.
    """

    def product(params, tangent, batch):
        def forward(p):
            return objective.logits(p, batch)

        def criterion(z):
            return jnp.mean(objective.criterion(z, batch))

        logits, pull_back = jax.vjp(forward, params)
        pushed = jax.jvp(forward, (params,), (tangent,))[1]
        curved = jax.jvp(jax.grad(criterion), (logits,), (pushed,))[1]
        return pull_back(curved)[0]

    def quadratic(params, tangent, batch):
        def criterion(z):
            return jnp.mean(objective.criterion(z, batch))

        logits, pushed = jax.jvp(
            lambda p: objective.logits(p, batch), (params,), (tangent,)
        )
        return _second(criterion, logits, pushed)

    return _operator(product, quadratic, params, masks, batches, block)


def residual(
    objective: Objective,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    block: int | None = None,
) -> Operator:
    """The rest of the Hessian: curvature of the logits, weighted with the slopes.

    Zero for a model that is linear in its parameters. The arguments are those of
    `hessian`; without the penalty.
    """

    def product(params, tangent, batch):
        linear = with_fixed_slopes(objective, params, batch)
        return jax.jvp(jax.grad(linear), (params,), (tangent,))[1]

    def quadratic(params, tangent, batch):
        linear = with_fixed_slopes(objective, params, batch)
        return _second(linear, params, tangent)

    return _operator(product, quadratic, params, masks, batches, block)


def with_fixed_slopes(objective: Objective, params: Params, batch) -> Callable:
    """The mean criterion linearised in the logits; its Hessian is the residual part."""

    def criterion(z):
        return jnp.mean(objective.criterion(z, batch))

    slopes = jax.grad(criterion)(objective.logits(params, batch))
    return lambda p: jnp.vdot(slopes, objective.logits(p, batch))


def hvp(
    loss_fn: LossFn,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    tangent: PyTree,
) -> PyTree:
    """mask o H o mask times a tree of the shape of the parameters, as such a tree.

    Compiles at each call; for many products make a `hessian` once.
    """
    operator = hessian(loss_fn, params, masks, batches)
    return operator.space.unflatten(operator(operator.space.flatten(tangent)))


def gradient(
    loss_fn: LossFn, params: Params, masks: Masks | None, batches: Batches
) -> Float[Array, " n"]:
    """The gradient of the mean loss, in the space of active parameters."""
    space = active_space(params, masks)

    @jax.jit
    def grad(params, batch):
        with precise():
            return space.flatten(jax.grad(loss_fn)(params, batch))

    return batches_lib.mean(lambda batch: grad(params, batch), batches)


def gradient_overlap(
    gradient: Float[Array | np.ndarray, " n"], vectors: Float[Array | np.ndarray, "k n"]
) -> pd.DataFrame:
    """How much of the gradient lies in the first eigenvectors.

    Args:
      gradient: for instance of `gradient`.
      vectors: orthonormal rows, of `lanczos.top_eigenpairs`.

    Returns:
      A row for each of the k vectors: `n_vectors` (1 to k), and `overlap`, the squared
      norm of the gradient's projection on that many over that of the gradient
      (Gur-Ari, Roberts & Dyer 2018).
    """
    g, v = np.asarray(gradient, np.float64), np.asarray(vectors, np.float64)
    shares = np.square(v @ g) / np.sum(g * g)
    index = np.arange(1, len(v) + 1)
    return pd.DataFrame({"n_vectors": index, "overlap": np.cumsum(shares)})


def plot_gradient_overlap(overlap: pd.DataFrame) -> Figure:
    """The share of the gradient in the first eigenvectors, over their number."""
    fig, ax = figures.new()
    ax.plot(overlap["n_vectors"], overlap["overlap"], "o-")
    ax.set(
        xlabel="eigenvectors", ylabel="share of the squared gradient", ylim=(0, 1.02)
    )
    return fig


def precise():
    """A context in which accelerators multiply in full float32.

    By default they may round factors to 10 bits and fewer, which is more than small
    eigenvalues are.
    """
    return jax.default_matmul_precision("highest")


def each(fn: Callable, xs: Array, block: int | None = None) -> Array:
    """`fn` of each row: `block` at once; None: one on a CPU, 32 elsewhere.

    Many at once fill an accelerator, but fall out of the caches of a CPU.
    """
    if block is None:
        block = 1 if jax.default_backend() == "cpu" else 32
    if block == 1:
        return jax.lax.map(fn, xs)
    return jax.lax.map(fn, xs, batch_size=block)


def _second(fn: Callable, at: PyTree, along: PyTree) -> Array:
    """The second derivative of a scalar function along a direction."""

    def moved(e):
        point = jax.tree.map(lambda x, d: x + e.astype(x.dtype) * d, at, along)
        return fn(point)

    def slope(e):
        return jax.jvp(moved, (e,), (one,))[1]

    one = jnp.ones((), jnp.float32)
    return jax.jvp(slope, (jnp.zeros_like(one),), (one,))[1]


def _operator(
    product: Callable, quadratic: Callable, params, masks, batches, block
) -> Operator:
    space = active_space(params, masks)
    batches_lib.total(batches)  # says so if there are none

    def over_batches(of_one: Callable) -> Callable:
        @jax.jit
        def of_batch(params, vectors, batch):
            with precise():
                return each(lambda v: of_one(params, v, batch), vectors, block)

        return lambda vectors: batches_lib.mean(
            lambda batch: of_batch(params, vectors, batch), batches
        )

    def product_of_one(params, vector, batch):
        return space.flatten(product(params, space.unflatten(vector), batch))

    def quadratic_of_one(params, vector, batch):
        return quadratic(params, space.unflatten(vector), batch)

    return Operator(space, over_batches(product_of_one), over_batches(quadratic_of_one))
