"""Hessians of the active parameters as linear maps, and what products tell of them.

    H v = d/de grad L(w + e v) at e = 0        jvp of grad, forward over reverse
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
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures
from lottery_flow.analysis.active import ActiveSpace, active_space
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.objective import LossFn, Objective
from lottery_flow.sparsity.masks import Masks, Params

Progress = Callable[[int, int], None]  # (done, all)


class Operator(NamedTuple):
    """A symmetric linear map of the space of active parameters.

    Attributes:
      space: where its vectors live.
      product: `float [s n] -> float [s n]`, each row by itself.
    """

    space: ActiveSpace
    product: Callable

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
      loss_fn: `(params, batch) -> scalar`, the mean over the batch; `objective.loss`.
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

    return _operator(product, params, masks, batches, block)


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

    return _operator(product, params, masks, batches, block)


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

    return _operator(product, params, masks, batches, block)


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


class Trace(NamedTuple):
    """Hutchinson's estimate of a trace.

    Attributes:
      samples: float64 [s], v^T A v of each probe.
      n: dimension of the space.
    """

    samples: np.ndarray
    n: int

    @property
    def mean(self) -> float:
        """The estimate."""
        return float(np.mean(self.samples))

    @property
    def standard_error(self) -> float:
        """Standard deviation of the estimate, nan for a single probe."""
        n = len(self.samples)
        return float(np.std(self.samples, ddof=1) / n**0.5) if n > 1 else float("nan")

    def frame(self) -> pd.DataFrame:
        """A row for each probe."""
        probes = np.arange(len(self.samples))
        return pd.DataFrame({"probe": probes, "sample": self.samples, "n": int(self.n)})


class Diagonal(NamedTuple):
    """Hutchinson's estimate of a diagonal.

    Attributes:
      mean: float64 [n], for each active parameter.
      standard_error: float64 [n], nan for a single probe.
      layer: str [n], the layer of each.
    """

    mean: np.ndarray
    standard_error: np.ndarray
    layer: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each active parameter."""
        return pd.DataFrame(self._asdict())


def trace(
    operator: Operator,
    key: Key[Array, ""],
    *,
    n_probes: int = 100,
    block: int = 10,
    progress: Progress | None = None,
) -> Trace:
    """The trace by Rademacher probes (Hutchinson 1990).

    Guarantees:
      - Exact for a diagonal operator, whatever the probes; unbiased otherwise.
    """
    samples = [
        np.sum(v * av, axis=1)
        for v, av in _probes(operator, key, n_probes, block, progress)
    ]
    return Trace(np.concatenate(samples), operator.space.n)


def diagonal(
    operator: Operator,
    key: Key[Array, ""],
    *,
    n_probes: int = 100,
    block: int = 10,
    progress: Progress | None = None,
) -> Diagonal:
    """The diagonal by Rademacher probes: the mean of v o A v (Bekas et al. 2007).

    Guarantees:
      - Exact for a diagonal operator, whatever the probes; unbiased otherwise.
    """
    total, squares = np.zeros(operator.space.n), np.zeros(operator.space.n)
    for v, av in _probes(operator, key, n_probes, block, progress):
        total += np.sum(v * av, axis=0)
        squares += np.sum(np.square(v * av), axis=0)
    mean = total / n_probes
    error = np.full_like(mean, np.nan)
    if n_probes > 1:
        variance = (
            np.maximum(squares / n_probes - mean**2, 0) * n_probes / (n_probes - 1)
        )
        error = np.sqrt(variance / n_probes)
    return Diagonal(mean, error, layer_of_each(operator.space))


def plot_trace(result: Trace) -> Figure:
    """The running mean over the probes, with its standard error."""
    fig, ax = figures.new()
    n = np.arange(1, len(result.samples) + 1)
    mean = np.cumsum(result.samples) / n
    ax.plot(n, mean)
    ax.axhspan(
        result.mean - result.standard_error,
        result.mean + result.standard_error,
        color="C0",
        alpha=0.2,
    )
    ax.set(xlabel="probes", ylabel="trace")
    return fig


def plot_diagonal(result: Diagonal) -> Figure:
    """The diagonal, sorted within each layer."""
    fig, ax = figures.new()
    start = 0
    for layer in dict.fromkeys(result.layer.tolist()):
        values = np.sort(result.mean[result.layer == layer])
        ax.plot(np.arange(start, start + len(values)), values, label=layer)
        start += len(values)
    ax.set(xlabel="active parameter", ylabel="diagonal of the Hessian")
    ax.legend(fontsize="x-small")
    return fig


def layer_of_each(space: ActiveSpace) -> np.ndarray:
    """The layer's name for each coordinate."""
    names = [np.full(part.stop - part.start, k) for k, part in space.layers.items()]
    return np.concatenate(names)


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


def _operator(product: Callable, params, masks, batches, block) -> Operator:
    space = active_space(params, masks)
    batches_lib.total(batches)  # says so if there are none

    @jax.jit
    def of_batch(params, vectors, batch):
        def one(vector):
            return space.flatten(product(params, space.unflatten(vector), batch))

        with precise():
            return each(one, vectors, block)

    def of_all(vectors):
        return batches_lib.mean(lambda batch: of_batch(params, vectors, batch), batches)

    return Operator(space, of_all)


def _probes(operator, key, n_probes, block, progress):
    """Blocks of Rademacher vectors and their products, float64 on the host."""
    if n_probes < 1 or block < 1:
        raise ValueError(f"n_probes={n_probes} and block={block} must be at least 1")
    kind = operator.space.dtype
    draw = jax.jit(
        lambda i: jax.random.rademacher(
            jax.random.fold_in(key, i), (block, operator.space.n), kind
        )
    )
    for start in range(0, n_probes, block):
        # One shape, so that one program serves all; the last may have too many.
        size = min(block, n_probes - start)
        v = draw(start)
        av = np.asarray(operator.product(v), np.float64)
        yield np.asarray(v, np.float64)[:size], av[:size]
        if progress is not None:
            progress(start + size, n_probes)
