"""The loss on planes through parameter space.

    P(x, y) = w_1 + x u + y v                            through three solutions
    u = (w_2 - w_1) / ||w_2 - w_1||
    v = (w_3 - w_1 - <w_3 - w_1, u> u) / ||...||         (Garipov et al. 2018)

    P(x, y) = w + x d_1 + y d_2                          around one solution
    d_{.,o} <- d_{.,o} ||w_{.,o}|| / ||d_{.,o}||         for each filter o of each layer
                                                         (Li et al. 2018)

d: standard normal; a filter is what makes one output feature, kernel[..., o].

Between networks of different masks the points of a plane are denser than the networks:
their active weights are those of any of the three. Filter-normalised directions keep
the mask. With frozen norms every point of a plane is evaluated with the running
statistics of one network; take an objective with `norms="batch"` for statistics of each
point's own.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.geometry import matched
from lottery_flow.analysis.objective import LossFn
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params


class Surface(NamedTuple):
    """The loss on a grid of a plane.

    Attributes:
      x: float64 [columns], coordinates along the first direction.
      y: float64 [rows], along the second.
      loss: float64 [rows columns].
      labels: str [p], names of the solutions in the plane.
      points: float64 [p 2], their coordinates.
    """

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    labels: np.ndarray
    points: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each point of the grid."""
        x, y = np.meshgrid(self.x, self.y)
        columns = {"x": x, "y": y, "loss": self.loss}
        return pd.DataFrame({k: np.ravel(v) for k, v in columns.items()})


def through_solutions(
    loss_fn: LossFn,
    solutions: Sequence[Params],
    batches: Batches,
    *,
    labels: Sequence[str] = ("1", "2", "3"),
    n_points: int = 21,
    margin: float = 0.2,
    block: int = 1,
) -> Surface:
    """The loss on the plane through three networks.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch; or an `Objective`.
      solutions: three networks of the same shapes. The first is the origin, the second
        lies on the x axis. Coordinates are L2 distances in weight space.
      batches: of any size and number, see `batches`.
      labels: names of the three.
      n_points: along each axis.
      margin: how far the grid reaches beyond the three, as a fraction of their extent.
      block: points that are evaluated at once; more is faster for small networks on an
        accelerator, and takes as much more memory.

    Raises:
      ValueError: there are not three networks and labels, they differ in shapes, or
        lie on a line.

    Guarantees:
      - The loss at a grid point is that of the network there.
      - Distances in the plane are those in weight space.
    """
    if len(solutions) != 3 or len(labels) != 3:
        raise ValueError(
            f"a plane goes through three networks; found {len(solutions)} of them "
            f"and {len(labels)} labels"
        )
    origin, u, v, points = basis(solutions)
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    reach = margin * (high - low)
    x, y = np.linspace(low - reach, high + reach, n_points).T
    loss = on_grid(loss_fn, origin, (u, v), x, y, batches, block=block)
    return Surface(x, y, loss, np.array(labels), points)


def around_solution(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    n_points: int = 21,
    reach: float = 1.0,
    move_vectors: bool = False,
    block: int = 1,
) -> Surface:
    """The loss on two random filter-normalised directions around a network.

    Args:
      key: of the directions; the same key gives networks of one model directions that
        are the same up to masks and norms of filters.
      loss_fn: as in `through_solutions`, and so are `batches`, `n_points` and `block`.
      params: the sparse weights.
      masks: what is active; None: everything.
      batches: of any size and number.
      n_points: along each axis; an odd number puts `params` on the grid.
      reach: the grid covers [-reach, reach] twice; 1 moves each filter by its own norm
        along each direction.
      move_vectors: see `filter_normalised`.
      block: points that are evaluated at once.

    Guarantees:
      - Inactive weights stay zero.
      - Rescaling the filters of a network without changing its function leaves the
        surface the same (for rectified linear units).
    """
    directions = tuple(
        filter_normalised(
            jax.random.fold_in(key, i), params, masks, move_vectors=move_vectors
        )
        for i in range(2)
    )
    x = np.linspace(-reach, reach, n_points)
    loss = on_grid(loss_fn, params, directions, x, x, batches, block=block)
    return Surface(x, x, loss, np.array(["solution"]), np.zeros((1, 2)))


def basis(
    solutions: Sequence[Params],
) -> tuple[Params, Params, Params, Float[np.ndarray, "3 2"]]:
    """Origin, two orthonormal directions, and the coordinates of three networks.

    Computed in float64; the directions have the dtypes of the first network.

    Raises:
      ValueError: the networks differ in shapes, or lie on a line.
    """
    w1, w2, w3 = (
        [np.asarray(leaf).astype(np.float64) for leaf in named.values()]
        for named in matched(solutions)
    )
    u, x2 = _unit([b - a for a, b in zip(w1, w2, strict=True)])
    side = [c - a for a, c in zip(w1, w3, strict=True)]
    x3 = _inner(side, u)
    v, y3 = _unit([s - x3 * e for s, e in zip(side, u, strict=True)])
    # Networks of float32 lie on a line only up to their rounding.
    if not x2 or not y3 > 1e-6 * _inner(side, side) ** 0.5:
        raise ValueError("the three networks lie on a line; give three that do not")
    leaves, treedef = jax.tree.flatten(solutions[0])
    u, v = (
        jax.tree.unflatten(
            treedef, [e.astype(w.dtype) for e, w in zip(unit, leaves, strict=True)]
        )
        for unit in (u, v)
    )
    return solutions[0], u, v, np.array([[0, 0], [x2, 0], [x3, y3]])


def filter_normalised(
    key: Key[Array, ""],
    params: Params,
    masks: Masks | None,
    *,
    move_vectors: bool = False,
) -> Params:
    """A random direction, each filter of which is as long as that of the network.

    Args:
      key: a typed key.
      params: the sparse weights, kernels (..., in, out).
      masks: what is active; None: everything.
      move_vectors: False leaves biases and norms (leaves of less than two dimensions)
        where they are; True moves each of their entries, a filter of one weight, up or
        down by its own size.

    Guarantees:
      - Zero where the network is inactive: the mask comes before the normalisation, so
        that what remains has the norm of the filter.
      - Zero for a filter that is zero or has no active weight.
    """
    masks = masks_lib.dense(params) if masks is None else masks
    masks_lib.check(masks, params)
    return _filter_normalised(key, params, masks, move_vectors)


def on_grid(
    loss_fn: LossFn,
    origin: Params,
    directions: tuple[Params, Params],
    x: Float[np.ndarray, " columns"],
    y: Float[np.ndarray, " rows"],
    batches: Batches,
    *,
    block: int = 1,
) -> Float[np.ndarray, "rows columns"]:
    """The mean loss over all batches at origin + x u + y v, for each x and y.

    Guarantees:
      - One compilation for batches of one size, which another grid, origin or direction
        does not repeat.
      - Does not depend on `block`, up to rounding.
    """
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    grid = np.stack([np.ravel(c) for c in np.meshgrid(x, y)], axis=1)
    # The last block is filled with a repeated point, to be of the same shape.
    n_blocks = -(-len(grid) // block)
    filled = np.concatenate(
        [grid, np.repeat(grid[-1:], n_blocks * block - len(grid), 0)]
    )
    blocks = filled.reshape(n_blocks, block, 2)

    def of_batch(batch):
        parts = [_losses(loss_fn, origin, *directions, xy, batch) for xy in blocks]
        return np.concatenate([np.asarray(part, np.float64) for part in parts])

    losses = batches_lib.mean(of_batch, batches)
    return losses[: len(grid)].reshape(len(y), len(x))


def plot_surface(result: Surface) -> Figure:
    """The loss as colours, logarithmic where it is positive, with the solutions."""
    fig, ax = figures.new()
    loss = np.ma.masked_invalid(result.loss)
    positive = loss.count() and loss.min() > 0
    norm = matplotlib.colors.LogNorm() if positive else matplotlib.colors.Normalize()
    mesh = ax.pcolormesh(result.x, result.y, loss, norm=norm, shading="nearest")
    fig.colorbar(mesh, ax=ax, label="loss")
    ax.plot(*result.points.T, "o", color="white", mec="black")
    for label, point in zip(result.labels.tolist(), result.points, strict=True):
        ax.annotate(label, point, (4, 4), textcoords="offset points", color="white")
    ax.set_aspect("equal")
    return fig


@functools.partial(jax.jit, static_argnums=3)
def _filter_normalised(key, params, masks, move_vectors):
    leaves, treedef = jax.tree.flatten(params)
    normal = [
        jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    direction = masks_lib.apply(masks, jax.tree.unflatten(treedef, normal))

    def scale(d, w):
        if w.ndim < 2 and not move_vectors:
            return jnp.zeros_like(d)
        length = _filter_norms(d)
        safe = jnp.where(length == 0, jnp.ones_like(length), length)
        return d * (_filter_norms(w) / safe)

    return jax.tree.map(scale, direction, params)


@functools.partial(jax.jit, static_argnums=0)
def _losses(loss_fn, origin, u, v, xy, batch):
    """The loss at each row of `xy`."""

    def at(point):
        def move(w, a, b):
            x, y = point.astype(w.dtype)
            return w + x * a + y * b

        return loss_fn(jax.tree.map(move, origin, u, v), batch)

    return jax.vmap(at)(xy)


def _filter_norms(leaf):
    """L2 norms over all but the last axis; of each entry of a vector."""
    axes = tuple(range(leaf.ndim - 1))
    return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes, keepdims=True))


def _inner(a, b) -> float:
    return float(sum(np.sum(x * y) for x, y in zip(a, b, strict=True)))


def _unit(leaves):
    """The direction, and the length; the direction is nothing where that is zero."""
    length = _inner(leaves, leaves) ** 0.5
    return [leaf / (length or 1.0) for leaf in leaves], length
