"""Curves of low loss between two networks.

    phi(t) = sum_k c_k(t) w_k,  w_0, w_K: the ends;  minimise E_{t ~ U(0, 1)} L(phi(t))

over the bends w_1 ... w_{K-1} (Garipov et al. 2018, arXiv 1802.10026, sec. 3). The
coefficients are Bernstein polynomials for a Bezier curve, hat functions for a polygonal
chain; with one bend

    Bezier:   phi(t) = (1 - t)^2 w_0 + 2 t (1 - t) w_1 + t^2 w_2
    polygon:  phi(t) = (1 - 2t) w_0 + 2t w_1  up to t = 1/2,  then from w_1 to w_2

Between sparse networks the space matters: Evci et al. 2019 (arXiv 1906.10732) find
barriers in the space of the active weights alone, not among dense networks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures, geometry, interpolation
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.interpolation import Path, PathObjective
from lottery_flow.analysis.objective import LossFn, Objective
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

KINDS = ("bezier", "polygon")


class Curve(NamedTuple):
    """A curve through weight space.

    Attributes:
      nodes: parameters: the start, the bends, the end.
      kind: 'bezier' or 'polygon'.
    """

    nodes: tuple[Params, ...]
    kind: str


class Training(NamedTuple):
    """What each step of `fit` saw.

    Attributes:
      step: int [n], from 0.
      t: float [n], where on the curve.
      loss: float [n], there, on the batch of the step, before its update.
    """

    step: np.ndarray
    t: np.ndarray
    loss: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each step."""
        return pd.DataFrame(self._asdict())


def straight(
    start: Params, end: Params, *, kind: str = "bezier", n_bends: int = 1
) -> Curve:
    """The straight line from `start` to `end`, with bends at equal distances on it.

    Raises:
      ValueError: an unknown kind, no bend, or ends of two models.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; write one of {', '.join(KINDS)}")
    if n_bends < 1:
        raise ValueError(f"n_bends={n_bends} must be at least 1")
    geometry.matched([start, end])
    line = Curve((start, end), "polygon")
    bends = [point(line, j / (n_bends + 1)) for j in range(1, n_bends + 1)]
    return Curve((start, *bends, end), kind)


def point(curve: Curve, t: float | Float[Array, ""]) -> Params:
    """The parameters at t, from 0 at the start to 1 at the end."""
    return _point(curve.kind, curve.nodes, jnp.asarray(t))


def fit(
    objective: Objective | LossFn,
    start: Params,
    end: Params,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    *,
    key: Key[Array, ""],
    n_steps: int,
    kind: str = "bezier",
    n_bends: int = 1,
    space: str = "sparse",
    start_masks: Masks | None = None,
    end_masks: Masks | None = None,
) -> tuple[Curve, Training]:
    """Trains the bends of a curve between two networks.

    A step takes the next batch, in a circle, and a t of its own, from
    `fold_in(key, step)`. The loss is that of phi(t), and so is its penalty: weight
    decay acts on the curve, as in Garipov et al. 2018. Where there are norms, train
    with the statistics of the batch, and evaluate with recomputed ones.

    Args:
      objective: what to minimise, an Objective or a loss function.
      start: the fixed parameters at t = 0.
      end: the fixed parameters at t = 1.
      batches: of the training set.
      optimizer: any of optax; its schedules count the steps.
      key: a typed key.
      n_steps: how many.
      kind: 'bezier' or 'polygon'.
      n_bends: trained nodes.
      space: 'sparse' keeps the bends to the weights that are active in one of the ends;
        'dense' lets them use all.
      start_masks: of the start, for 'sparse'.
      end_masks: of the end, for 'sparse'.

    Raises:
      ValueError: an unknown choice, missing masks, or ends that do not fit.

    Guarantees:
      - The ends keep their bits.
      - In the sparse space, weights that are active in neither end are exactly zero on
        the whole curve, whatever the optimizer.
      - The same key, batches and ends give the same curve.
    """
    masks = _space(space, start, start_masks, end_masks)
    check_ends(start, end, masks)
    batches_lib.total(batches)
    _, *bends, _ = straight(start, end, kind=kind, n_bends=n_bends).nodes
    bends = tuple(bends)
    state = optimizer.init(bends)
    seen = []
    for step in range(n_steps):
        batch = batches[step % len(batches)]
        at = jax.random.fold_in(key, step)
        bends, state, t, loss = _step(
            objective, optimizer, kind, bends, state, start, end, masks, batch, at
        )
        seen.append((t, loss))
    ts, losses = np.array(jax.device_get(seen)).reshape(-1, 2).T
    training = Training(np.arange(n_steps), ts, losses)
    return Curve((start, *bends, end), kind), training


def evaluate(
    objective: Objective | PathObjective | LossFn,
    curve: Curve,
    batches: Batches,
    *,
    ts: Float[np.ndarray, " p"] | None = None,
    abscissa: str = "t",
    block: int = 1,
) -> Path:
    """Loss and accuracy along a curve.

    Args:
      objective: see `interpolation.evaluate`.
      curve: the curve.
      batches: the loss is the mean over all their examples.
      ts: where, in [0, 1]; 61 equal steps, the ends included, if None.
      abscissa: what `alpha` of the result is: t, or the length of the curve up to
        there, as a fraction of the whole. A barrier depends on the choice where the
        ends have different losses.
      block: see `interpolation.evaluate`.

    Raises:
      ValueError: an unknown abscissa, or a t outside [0, 1].
    """
    ts = np.linspace(0, 1, 61) if ts is None else np.asarray(ts)
    if abscissa not in ("t", "length"):
        raise ValueError(f"abscissa={abscissa!r} is unknown; write 't' or 'length'")
    if len(ts) and not (0 <= ts.min() and ts.max() <= 1):
        raise ValueError(f"ts go from {ts.min()} to {ts.max()}; stay within 0 and 1")
    path = interpolation.evaluate(
        objective,
        functools.partial(point, curve),
        ts,
        batches,
        block=block,
    )
    if abscissa == "t":
        return path
    lengths = arc_length(curve, np.append(ts, 1.0))
    return path._replace(alpha=lengths[:-1] / lengths[-1])


def arc_length(
    curve: Curve, ts: Float[np.ndarray, " p"], *, n_steps: int = 1000
) -> Float[np.ndarray, " p"]:
    """The length of the curve from its start to each t, in the L2 norm, float64.

    The sum of the chords of a grid of `n_steps` and of all nodes of a polygon: exact
    for a polygon, for a Bezier curve within a relative error of order 1 / n_steps^2.
    """
    n = len(curve.nodes)
    rows = np.stack([_ravel(node) for node in curve.nodes])
    offsets = rows - rows[0]
    gram = offsets @ offsets.T
    grid = np.unique(
        np.concatenate([np.linspace(0, 1, n_steps + 1), np.linspace(0, 1, n)])
    )
    coefficients = np.stack([np.asarray(c) for c in _coefficients(curve.kind, n, grid)])
    chords = np.diff(coefficients, axis=1)
    squares = np.einsum("ip,ij,jp->p", chords, gram, chords)
    lengths = np.append(0.0, np.cumsum(np.sqrt(np.maximum(squares, 0.0))))
    return np.interp(ts, grid, lengths)


def union(a: Masks, b: Masks) -> Masks:
    """Active where either is; a leaf that one of them leaves dense is dense."""
    return masks_lib.tree_map(
        lambda x, y: None if x is None or y is None else x | y, a, b
    )


def check_ends(start: Params, end: Params, masks: Masks) -> None:
    """Raises ValueError unless the ends are of one model and zero outside the masks."""
    masks_lib.check(masks, start)
    named_masks = masks_lib.named_leaves(masks)
    ends = zip(("start", "end"), geometry.matched([start, end]), strict=True)
    for end_name, named in ends:
        for name, leaf in named.items():
            mask = named_masks[name]
            if mask is not None and np.any(np.asarray(leaf)[~np.asarray(mask)]):
                raise ValueError(
                    f"the {end_name} has weights outside the masks, in {name}; apply "
                    "the masks to it, or give masks that contain its own"
                )


def plot_training(training: Training) -> Figure:
    """The loss of each step, coloured by its place on the curve."""
    fig, ax = figures.new()
    dots = ax.scatter(training.step, training.loss, s=6, c=training.t, vmin=0, vmax=1)
    fig.colorbar(dots, ax=ax, label="t")
    ax.set_xlabel("step")
    ax.set_ylabel("loss at phi(t)")
    return fig


def _coefficients(kind, n, t):
    """c_k(t) of n nodes, for t a scalar or an array, of numpy or jax."""
    if kind == "bezier":
        return [math.comb(n - 1, k) * t**k * (1 - t) ** (n - 1 - k) for k in range(n)]
    # Of numpy too, hence no jnp.maximum.
    return [(1 - abs(t * (n - 1) - k)).clip(0) for k in range(n)]


@functools.partial(jax.jit, static_argnums=0)
def _point(kind, nodes, t):
    """sum_k c_k(t) w_k."""
    coefficients = _coefficients(kind, len(nodes), t)

    def mix(*leaves):
        return sum(
            c.astype(leaf.dtype) * leaf
            for c, leaf in zip(coefficients, leaves, strict=True)
        )

    return jax.tree.map(mix, *nodes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(objective, optimizer, kind, bends, state, start, end, masks, batch, key):
    """One update of the bends, with the t and the loss that it is made of."""
    t = jax.random.uniform(key)

    def loss_at(bends):
        return objective(_point(kind, (start, *bends, end), t), batch)

    loss, grads = jax.value_and_grad(loss_at)(bends)
    # Before the update, for what an optimizer makes of a whole leaf, such as its norm;
    # after it, for optimizers that move without a gradient.
    grads = tuple(masks_lib.apply(masks, g) for g in grads)
    updates, state = optimizer.update(grads, state, bends)
    updates = tuple(masks_lib.apply(masks, u) for u in updates)
    return optax.apply_updates(bends, updates), state, t, loss


def _space(space, start, start_masks, end_masks):
    """The masks of the bends."""
    if space == "dense":
        return masks_lib.dense(start)
    if space != "sparse":
        raise ValueError(f"space={space!r} is unknown; write 'sparse' or 'dense'")
    for name, masks in (("start_masks", start_masks), ("end_masks", end_masks)):
        if masks is None:
            raise ValueError(f"space='sparse' needs {name}; give it, or space='dense'")
        masks_lib.check(masks, start)
    return union(start_masks, end_masks)


def _ravel(params):
    """All parameters, float64 on the host."""
    leaves = jax.tree.leaves(params)
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])
