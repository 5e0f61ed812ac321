"""The loss along paths through weight space, above all along straight lines.

    theta(alpha) = (1 - alpha) theta_start + alpha theta_end    (all parameters)

    barrier     = max_{0 <= alpha <= 1} L(alpha) - [(1 - alpha) L(0) + alpha L(1)]
    instability = max_{0 <= alpha <= 1} E(alpha) - [E(0) + E(1)] / 2    (E: error)

The line is that of Goodfellow et al. 2015 (arXiv 1412.6544), between sparse networks as
in Evci et al. 2022; the instability that of Frankle et al. 2020 (arXiv 1912.05671), who
call two networks stable, or linearly connected, below 2 %.

Norms need a choice of statistics at each point. An objective has those that it was made
with, which are kept. `interpolated_norms` interpolates the running statistics of the
ends; `recomputed_norms` measures them anew at each point, as Garipov et al. 2018 do.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float, PyTree
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures, geometry
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.objective import LossFn, Objective
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

# From -0.2 to 1.2, with both ends exactly: 29 points, and the 71 of ResNet-50.
ALPHAS = np.arange(-4, 25) / 20
FINE_ALPHAS = np.arange(-10, 61) / 50


class Path(NamedTuple):
    """Loss and accuracy at points of a path.

    Attributes:
      alpha: float [p], where on the path: 0 at the start, 1 at the end.
      loss: float [p], with the penalty of the objective.
      accuracy: float [p], fraction of examples; nan without logits or labels.
    """

    alpha: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each point."""
        return pd.DataFrame(self._asdict())


class PathObjective(NamedTuple):
    """An objective whose norms have other statistics at each point of a path.

    Attributes:
      objective_at: `(batch_stats) -> Objective` (or a loss function), for instance
        `lambda stats: classification(model.apply, stats)`.
      stats_at: `(alphas, points, batches) -> batch_stats` of p points at once: float
        [p], parameters and statistics with a first axis p.
    """

    objective_at: Callable
    stats_at: Callable


def linear(
    objective: Objective | PathObjective | LossFn,
    start: Params,
    end: Params,
    batches: Batches,
    *,
    mask: str = "start",
    start_masks: Masks | None = None,
    end_masks: Masks | None = None,
    alphas: Float[np.ndarray, " p"] = ALPHAS,
    block: int = 1,
) -> Path:
    """Loss and accuracy on the straight line from `start` to `end`.

    Args:
      objective: what to measure, see `evaluate`.
      start: parameters at alpha = 0.
      end: parameters at alpha = 1.
      batches: the loss is the mean over all their examples.
      mask: whose mask the ends get, see `masked_ends`.
      start_masks: masks of the start.
      end_masks: masks of the end.
      alphas: any numbers, also outside [0, 1].
      block: see `evaluate`.

    Guarantees:
      - At alpha 0 and 1 the parameters are those of the (masked) ends, to the bit.
      - The points are not compiled one by one, whatever their number.
    """
    start, end = masked_ends(
        start, end, mask=mask, start_masks=start_masks, end_masks=end_masks
    )
    point_at = functools.partial(_on_line, start, end)
    return evaluate(objective, point_at, alphas, batches, block=block)


def evaluate(
    objective: Objective | PathObjective | LossFn,
    point_at: Callable[[Any], Params],
    alphas: Float[np.ndarray, " p"],
    batches: Batches,
    *,
    block: int = 1,
) -> Path:
    """Loss and accuracy at points of any path.

    Args:
      objective: an Objective, for loss and accuracy; a loss function, for the loss; or
        a PathObjective, where the statistics of norms change along the path. What is
        compiled for it is used again whenever the same value is given again.
      point_at: the path, from alpha (a float scalar) to parameters.
      alphas: where.
      batches: mean over all their examples. Exact unless norms use the statistics of
        the batch; then it is the mean over batches, weighted by their sizes.
      block: points that are evaluated at once; more is faster for small networks on an
        accelerator, and takes as much more memory.

    Raises:
      ValueError: there are no points, or `block` is below 1.
    """
    if not len(alphas):
        raise ValueError("alphas is empty; give at least one point")
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    block = min(block, len(alphas))
    parts = []
    for i in range(0, len(alphas), block):
        # Filled with the last point: another number would be another program.
        some = alphas[np.minimum(np.arange(i, i + block), len(alphas) - 1)]
        points = _stack([point_at(jnp.asarray(alpha)) for alpha in some])
        if isinstance(objective, PathObjective):
            stats = objective.stats_at(some, points, batches)
            fn = functools.partial(_measure, objective.objective_at, points, stats)
        else:
            fn = functools.partial(_measure, objective, points, None)
        parts.append(jax.device_get(batches_lib.mean(fn, batches)))
    loss, accuracy = np.concatenate(parts, axis=1)[:, : len(alphas)]
    return Path(np.asarray(alphas), loss, accuracy)


def barrier(path: Path) -> float:
    """How far the loss rises above the line between its values at the ends.

    Never negative: at the ends it is zero.

    Raises:
      ValueError: the path lacks alpha 0 or 1.
    """
    alpha, loss = _between_ends(path.alpha, path.loss)
    return float(np.max(loss - ((1 - alpha) * loss[0] + alpha * loss[-1])))


def instability(path: Path) -> float:
    """The highest error on the path minus the mean of those of the ends, a fraction.

    Below 0.02 the ends are stable (Frankle et al. 2020).

    Raises:
      ValueError: the path lacks alpha 0 or 1, or accuracies.
    """
    if np.all(np.isnan(path.accuracy)):
        raise ValueError("the path has no accuracy; evaluate an Objective, with labels")
    _, accuracy = _between_ends(path.alpha, path.accuracy)
    return float((accuracy[0] + accuracy[-1]) / 2 - np.min(accuracy))


def masked_ends(
    start: Params,
    end: Params,
    *,
    mask: str = "start",
    start_masks: Masks | None = None,
    end_masks: Masks | None = None,
) -> tuple[Params, Params]:
    """The ends of a path, masked by one of four conventions.

    Args:
      start: parameters.
      end: parameters.
      mask: 'start' masks both ends with the masks of the start, as the released code
        of Evci et al. 2022 does by default; 'end' both with those of the end; 'own'
        each with its own, so that points between them are as dense as the union;
        'none' neither.
      start_masks: needed for 'start' and 'own'.
      end_masks: needed for 'end' and 'own'.

    Raises:
      ValueError: an unknown `mask`, missing masks, or trees that do not fit together.
    """
    masks = {
        "start": {"start_masks": start_masks},
        "end": {"end_masks": end_masks},
        "own": {"start_masks": start_masks, "end_masks": end_masks},
        "none": {},
    }
    if mask not in masks:
        raise ValueError(f"mask={mask!r} is unknown; write one of {', '.join(masks)}")
    for name, given in masks[mask].items():
        if given is None:
            raise ValueError(
                f"mask={mask!r} needs {name}; give it or write mask='none'"
            )
        masks_lib.check(given, start)
    geometry.matched([start, end])
    if mask == "none":
        return start, end
    both = list(masks[mask].values())
    return masks_lib.apply(both[0], start), masks_lib.apply(both[-1], end)


def interpolated_norms(
    objective_at: Callable, start_stats: PyTree, end_stats: PyTree
) -> PathObjective:
    """The running statistics on the line between those of the ends.

    Outside [0, 1] a variance can become negative, and the loss nan.
    """

    def stats_at(alphas, points, batches):
        del points, batches
        return _stack(
            [_on_line(start_stats, end_stats, jnp.asarray(a)) for a in alphas]
        )

    return PathObjective(objective_at, stats_at)


def recomputed_norms(
    objective_at: Callable,
    apply_fn: Callable,
    batch_stats: PyTree,
    *,
    preprocess: Callable | None = None,
) -> PathObjective:
    """The statistics of the batches at each point, see `recompute_statistics`."""

    def stats_at(alphas, points, batches):
        del alphas
        return _recompute(apply_fn, preprocess, points, batch_stats, batches)

    return PathObjective(objective_at, stats_at)


def recompute_statistics(
    apply_fn: Callable,
    params: Params,
    batch_stats: PyTree,
    batches: Batches,
    *,
    preprocess: Callable | None = None,
) -> PyTree:
    """The statistics that norms should have for these parameters and batches.

    The mean over the batches, weighted by their sizes, of the mean and the variance
    within each, in training mode, as `update_bn` of stochastic weight averaging has it
    (Izmailov et al. 2018, arXiv 1803.05407): not an exponential average, and not the
    variance over all examples, which the variance of the batch means adds to. Deeper
    norms see what the former ones make of the batch, not of the averages.

    In training a norm replaces its running statistic r by m r + (1 - m) s, with s that
    of the batch. The derivative with respect to r is m, exactly, and at r = 0 the new
    value is (1 - m) s: so any model will do, and each norm may have its own m.

    Args:
      apply_fn: `(params, batch_stats, images, train) -> (logits, batch_stats)`, as
        `models.Model.apply`; in training its logits must not depend on `batch_stats`.
      params: of the network.
      batch_stats: for their shapes; {} without norms.
      batches: of `image`; larger ones vary less.
      preprocess: makes model inputs of `batch["image"]`; the images themselves if None.

    Raises:
      ValueError: a statistic is not updated in training.
    """
    stats = _recompute(apply_fn, preprocess, _stack([params]), batch_stats, batches)
    return jax.tree.map(lambda leaf: leaf[0], stats)


def plot_paths(paths: Path | Mapping[str, Path]) -> Figure:
    """Loss, and accuracy where there is any, along one path or several by label."""
    named = {"": paths} if isinstance(paths, Path) else dict(paths)
    quantities = {"loss": "loss"}
    if not all(np.all(np.isnan(path.accuracy)) for path in named.values()):
        quantities["accuracy"] = "accuracy"
    fig, axes = figures.new(1, len(quantities), squeeze=False)
    for ax, quantity in zip(axes[0], quantities, strict=True):
        for label, path in named.items():
            ax.plot(path.alpha, getattr(path, quantity), ".-", label=label)
        ax.set_xlabel("alpha")
        ax.set_ylabel(quantity)
    if list(named) != [""]:
        axes[0, 0].legend()
    return fig


@jax.jit
def _on_line(start, end, alpha):
    """(1 - alpha) start + alpha end."""

    def mix(a, b):
        t = alpha.astype(a.dtype)
        return (1 - t) * a + t * b

    return jax.tree.map(mix, start, end)


@functools.partial(jax.jit, static_argnums=0)
def _measure(objective, points, stats, batch):
    """Loss and accuracy of p points on one batch, float [p] each."""

    def at(params, stats):
        fn = objective if stats is None else objective(stats)
        if not isinstance(fn, Objective):
            loss = fn(params, batch)
            return loss, jnp.full_like(loss, jnp.nan)
        logits = fn.logits(params, batch)
        loss = dataclasses.replace(fn, logits=lambda *_: logits)(params, batch)
        if not isinstance(batch, Mapping) or "label" not in batch:
            return loss, jnp.full_like(loss, jnp.nan)
        label = jnp.asarray(batch["label"])
        right = jnp.argmax(logits, axis=-1).astype(label.dtype) == label
        return loss, jnp.mean(right, dtype=loss.dtype)

    return jax.vmap(at)(points, stats)


def _recompute(apply_fn, preprocess, points, batch_stats, batches):
    """`recompute_statistics` of p points."""

    def fn(batch):
        images = batch["image"]
        return _batch_statistics(apply_fn, preprocess, points, batch_stats, images)

    stats, momentum = batches_lib.mean(fn, batches)
    for name, leaf in masks_lib.named_leaves(jax.device_get(momentum)).items():
        if not np.all(leaf < 1 - 1e-6):
            raise ValueError(
                f"batch_stats: {name} does not change in training; recomputing needs "
                "norms that use and update the statistics of the batch"
            )
    return stats


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_statistics(apply_fn, preprocess, points, batch_stats, images):
    """The statistics of one batch at p points, and the momentum of their averages."""
    inputs = images if preprocess is None else preprocess(images)

    def at(params):
        def updated(stats):
            return apply_fn(params, stats, inputs, True)[1]

        zeros = jax.tree.map(jnp.zeros_like, batch_stats)
        ones = jax.tree.map(jnp.ones_like, batch_stats)
        new, momentum = jax.jvp(updated, (zeros,), (ones,))
        return jax.tree.map(lambda r, m: r / (1 - m), new, momentum), momentum

    return jax.vmap(at)(points)


def _between_ends(alpha, values):
    """Both, sorted, for alpha from 0 to 1."""
    order = np.argsort(alpha)
    order = order[(alpha[order] > -1e-6) & (alpha[order] < 1 + 1e-6)]
    alpha = alpha[order]
    if not len(alpha) or not np.allclose(alpha[[0, -1]], [0, 1], rtol=0, atol=1e-6):
        raise ValueError("the path lacks its ends; evaluate it at alpha 0 and 1 too")
    return alpha, values[order]


def _stack(trees):
    """One tree with a first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
