"""Trace and diagonal of a linear map from a few random probes.

    tr A = E v^T A v        diag A = E v o A v        v of independent signs

(Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007.) The maps are those of `curvature`,
which know v^T A v by itself: it needs no way back through the network, and costs less
than half of a product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Key
from matplotlib.figure import Figure

from lottery_flow.analysis import figures
from lottery_flow.analysis.curvature import Operator, Progress
from lottery_flow.sparsity.active import ActiveSpace


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
      - The samples do not depend on whether the operator knows its quadratic form.
    """

    def by_product(v):
        return jnp.sum(v * operator.product(v), axis=1)

    measure = operator.quadratic or by_product
    samples = [s for _, s in _probes(operator, measure, key, n_probes, block, progress)]
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
    probes = _probes(operator, operator.product, key, n_probes, block, progress)
    for v, av in probes:
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


def _probes(operator, measure, key, n_probes, block, progress):
    """Blocks of Rademacher vectors and what they measure, float64 on the host."""
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
        found = np.asarray(measure(v), np.float64)
        yield np.asarray(v, np.float64)[:size], found[:size]
        if progress is not None:
            progress(start + size, n_probes)
