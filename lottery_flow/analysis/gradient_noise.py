"""Gradient noise: how the gradients of single examples spread about their mean.

    noise scale = tr(Sigma) / |G|^2                in examples

(McCandlish et al. 2018, "An empirical model of large-batch training", the simple noise
scale.) G is the true gradient, Sigma the covariance of the gradients of single
examples, both of the active parameters. For n examples of gradient g_i and mean g

    tr(Sigma) = sum_i ||g_i - g||^2 / (n - 1)      |G|^2 = ||g||^2 - tr(Sigma) / n

are unbiased: the estimates of their appendix A for batches of 1 and of n examples. The
mean is known before a deviation from it is squared, so that nothing cancels, and only a
chunk of the examples' gradients is in memory at once.

Layers are named as by `masks.named_leaves`; 'all' is the whole network.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.gradient_flow import dense_gradient
from lottery_flow.analysis.objective import Objective
from lottery_flow.sparsity.active import active_space
from lottery_flow.sparsity.masks import Masks, Params


class GradientNoise(NamedTuple):
    """How the gradients of single examples spread about their mean.

    Attributes:
      layer: str [l], 'all' first.
      trace: float64 [l], tr(Sigma), trace of the covariance, unbiased.
      squared_norm: float64 [l], |G|^2 of the true mean, unbiased; may be negative.
      noise_scale: float64 [l], in examples; nan where `squared_norm` is not positive.
      cosine_mean: float64 [l], mean over examples of the cosine of their gradient with
        the mean gradient; those of zero gradient are left out.
      cosine_std: float64 [l], its standard deviation over the examples.
      mean: [n], the mean gradient in the space of active parameters.
    """

    layer: np.ndarray
    trace: np.ndarray
    squared_norm: np.ndarray
    noise_scale: np.ndarray
    cosine_mean: np.ndarray
    cosine_std: np.ndarray
    mean: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each layer, without the mean gradient."""
        return pd.DataFrame({k: v for k, v in self._asdict().items() if k != "mean"})


def gradient_noise(
    objective: Objective,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    chunk: int = 32,
) -> GradientNoise:
    """Statistics of the gradients of single examples, in two passes over the batches.

    Args:
      objective: of which an example's loss does not depend on the others.
      params: the sparse weights.
      masks: what is active.
      batches: two examples or more in all.
      chunk: examples whose gradients are in memory at once.

    Raises:
      ValueError: the objective is not separable, or there is a single example.

    Guarantees:
      - Does not depend on how the examples are cut, into batches or chunks.
      - The variance does not cancel against a large mean.
    """
    n = batches_lib.total(batches)
    if not objective.separable:
        raise ValueError(
            "objective.separable is False: with statistics of the batch an example has "
            "no gradient of its own; take an objective with norms='frozen'"
        )
    if n < 2 or chunk < 1:
        raise ValueError(
            f"{n} examples, chunk={chunk}: give 2 examples and a chunk of 1, or more"
        )
    space = active_space(params, masks)
    grads = dense_gradient(objective, params, batches)
    mean = _active(space.indices, grads)
    sums = [
        _deviations(objective, chunk, params, space.indices, mean, b) for b in batches
    ]
    # [n l 3], of each example and layer: ||g_i - g||^2, ||g_i||^2, g_i . g
    by_layer = np.concatenate([np.stack(part, 1).astype(np.float64) for part in sums])
    whole = by_layer.sum(1, keepdims=True)
    deviation, squares, dots = np.moveaxis(np.concatenate([whole, by_layer], 1), 2, 0)
    layer_norms = [np.sum(np.square(np.asarray(g, np.float64))) for g in mean]
    mean_norm = np.array([sum(layer_norms), *layer_norms])
    trace = deviation.sum(0) / (n - 1)
    squared_norm = mean_norm - trace / n
    cosines = _ratio(dots, np.sqrt(squares * mean_norm))
    n_cosines = np.sum(~np.isnan(cosines), 0)
    cosine_mean = _ratio(np.nansum(cosines, 0), n_cosines)
    spread = _ratio(np.nansum(np.square(cosines - cosine_mean), 0), n_cosines)
    return GradientNoise(
        layer=np.array(["all", *space.layers]),
        trace=trace,
        squared_norm=squared_norm,
        noise_scale=_ratio(trace, squared_norm),
        cosine_mean=cosine_mean,
        cosine_std=np.sqrt(spread),
        mean=np.asarray(space.flatten(grads)),
    )


def plot_gradient_noise(result: GradientNoise) -> Figure:
    """The noise scale of each layer, and the cosines with their spread."""
    fig, (left, right) = figures.new(columns=2)
    x = np.arange(len(result.layer))
    left.bar(x, result.noise_scale)
    left.set(ylabel="simple noise scale (examples)", yscale="log")
    right.errorbar(x, result.cosine_mean, result.cosine_std, fmt="o")
    right.set(ylabel="cosine with the mean gradient")
    for ax in (left, right):
        ax.set_xticks(x, result.layer, rotation=45, ha="right")
    return fig


@functools.partial(jax.jit, static_argnums=(0, 1))
def _deviations(loss_fn, chunk, params, indices, mean, batch):
    """For each layer [b 3]; see where they are added up."""

    def of_example(example):
        alone = jax.tree.map(lambda x: x[None], example)
        grads = _active(indices, jax.grad(loss_fn)(params, alone))
        return [
            jnp.stack([jnp.sum(jnp.square(g - m)), jnp.sum(g * g), jnp.sum(g * m)])
            for g, m in zip(grads, mean, strict=True)
        ]

    chunk = min(chunk, batches_lib.size(batch))
    return jax.lax.map(of_example, batch, batch_size=chunk)


def _active(indices, tree) -> list[Array]:
    """The active entries of each leaf, as `ActiveSpace.flatten` takes them."""
    flat = [jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]
    return [
        leaf if index is None else leaf[index]
        for leaf, index in zip(flat, indices, strict=True)
    ]


def _ratio(a, b) -> np.ndarray:
    """a / b, nan where b is not positive."""
    positive = b > 0
    return np.where(positive, a / np.where(positive, b, 1), np.nan)
