"""Paths of least loss between two networks: AutoNEB.

    p_i <- p_i - eta [g_i - (g_i . tau_i) tau_i],   then re-spaced along the chain

for the pivots p_i of a chain between fixed ends, with g_i the gradient of the loss at
p_i and tau_i the unit tangent of the chain there (Draxler et al. 2018, arXiv
1803.00885; the nudged elastic band of Jonsson et al. 1998, with springs of infinite
strength). A fine chain that no longer moves is a path of steepest descent on both sides
of its highest point, a saddle.

The tangent is that of Henkelman & Jonsson 2000 (J. Chem. Phys. 113, 9978, eqs. 8-11):
towards the neighbour of higher loss; at a pivot above or below both its neighbours, a
mean of the two differences, weighted by the differences of loss so that it never jumps.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from lottery_flow.analysis import curves, figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.curves import Curve
from lottery_flow.analysis.interpolation import PathObjective
from lottery_flow.analysis.objective import LossFn, Objective
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.active import active_space
from lottery_flow.sparsity.masks import Masks, Params

# (steps, learning rate) of each cycle, in the paper, and with a tenth of the steps.
PAPER_CYCLES = (*((1000, 0.1),) * 4, *((2000, 0.1),) * 2, *((1000, 0.01),) * 4,
                *((1000, 0.001),) * 4)  # fmt: skip
CYCLES = tuple((n_steps // 10, rate) for n_steps, rate in PAPER_CYCLES)


class Cycles(NamedTuple):
    """The chain at the end of each cycle; row 0 is the straight line.

    Attributes:
      cycle: int [c].
      steps: int [c], of the cycle.
      n_pivots: int [c], between the ends.
      saddle: float [c], highest loss on the chain, between pivots too.
    """

    cycle: np.ndarray
    steps: np.ndarray
    n_pivots: np.ndarray
    saddle: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each cycle."""
        return pd.DataFrame(self._asdict())


def connect(
    objective: Objective | LossFn,
    start: Params,
    end: Params,
    batches: Batches,
    *,
    masks: Masks | None = None,
    cycles: Sequence[tuple[int, float]] = CYCLES,
    momentum: float = 0.9,
    n_pivots: int = 3,
    n_between: int = 9,
    max_inserted: int = 2,
    threshold: float = 0.1,
    measured: Objective | PathObjective | LossFn | None = None,
    block: int = 1,
) -> tuple[Curve, Cycles]:
    """A chain of low loss from `start` to `end`.

    A cycle is SGD with momentum, which starts at zero; a step takes the next batch, in
    a circle, for all pivots. Before each cycle but the first, pivots are inserted where
    the loss is highest above the line between two neighbours, in units of the range of
    losses over all pivots. Pivots stand at fixed fractions of the length of the chain:
    equal at first; an inserted one divides the gap that it was put into, so that the
    chain stays fine where the loss is steep.

    Args:
      objective: what the pivots descend; its penalty acts at each of them.
      start: the first fixed end.
      end: the other.
      batches: of the training set; also what the saddle is the maximum on.
      masks: the chain stays in their active space; the ends must lie in it. None lets
        it use all weights.
      cycles: steps and learning rate of each. The paper's are `PAPER_CYCLES`.
      momentum: of SGD.
      n_pivots: at first, between the ends.
      n_between: points between two pivots at which the loss is measured.
      max_inserted: pivots inserted before a cycle.
      threshold: least excess of the loss for an insertion.
      measured: the objective of the losses on whole chains, for instance with other
        statistics of norms (see `interpolation.evaluate`); `objective` if None.
      block: of those points, see `interpolation.evaluate`.

    Returns:
      The chain with the lowest saddle of all cycles (the last of several), or the
      straight line, as a polygon for `curves.evaluate`; and what each cycle led to.

    Raises:
      ValueError: ends that do not fit or lie outside the masks, or no pivots.

    Guarantees:
      - The saddle of the chain is never above that of the straight line, on its
        `n_pivots + 1` gaps of `n_between` points.
      - Inactive weights are exactly zero at all pivots, and the ends keep their bits.
    """
    if min(n_pivots, n_between) < 1:
        raise ValueError(
            f"n_pivots={n_pivots} and n_between={n_between} must be at least 1"
        )
    masks = masks_lib.dense(start) if masks is None else masks
    curves.check_ends(start, end, masks)
    space = active_space(start, masks)
    places = np.linspace(0, 1, n_pivots + 2)  # fractions of the chain's length
    line = curves.straight(start, end)
    chain = jnp.stack([space.flatten(curves.point(line, place)) for place in places])
    step = jax.jit(functools.partial(_step, objective, space.unflatten, momentum))

    def losses_of(chain):
        curve = Curve((start, *map(space.unflatten, chain[1:-1]), end), "polygon")
        ts = np.linspace(0, 1, (len(chain) - 1) * (n_between + 1) + 1)
        what = objective if measured is None else measured
        path = curves.evaluate(what, curve, batches, ts=ts, block=block)
        return curve, path.loss

    curve, losses = losses_of(chain)
    best, rows = (losses.max(), curve), [(0, 0, n_pivots, losses.max())]
    n_done = 0
    for i, (n_steps, learning_rate) in enumerate(cycles, start=1):
        if i > 1:
            gaps, fractions = _insertions(losses, n_between, max_inserted, threshold)
            chain, places = _insert(chain, places, gaps, fractions)
        velocity = jnp.zeros_like(chain[1:-1])
        for _ in range(n_steps):
            batch = batches[n_done % len(batches)]
            chain, velocity = step(chain, velocity, places, learning_rate, batch)
            n_done += 1
        curve, losses = losses_of(chain)
        rows.append((i, n_steps, len(chain) - 2, losses.max()))
        if losses.max() <= best[0]:  # equal where an end is the highest point
            best = (losses.max(), curve)
    return best[1], Cycles(*map(np.array, zip(*rows, strict=True)))


def plot_cycles(cycles: Cycles) -> Figure:
    """The saddle after each cycle, and the number of pivots."""
    fig, axes = figures.new(1, 2)
    for ax, quantity in zip(axes, ("saddle", "n_pivots"), strict=True):
        ax.plot(cycles.cycle, getattr(cycles, quantity), ".-")
        ax.set_xlabel("cycle")
        ax.set_ylabel(quantity)
    return fig


def _step(loss_fn, unflatten, momentum, chain, velocity, places, learning_rate, batch):
    """One step of all pivots, and their re-spacing."""

    def loss_at(vector):
        return loss_fn(unflatten(vector), batch)

    inner, grads = jax.vmap(jax.value_and_grad(loss_at))(chain[1:-1])
    ends = jax.vmap(loss_at)(chain[jnp.array([0, -1])])
    tangents = _tangents(chain, jnp.concatenate([ends[:1], inner, ends[1:]]))
    along = jnp.sum(grads * tangents, axis=1, keepdims=True)
    velocity = momentum * velocity + grads - along * tangents
    moved = chain.at[1:-1].add(-learning_rate * velocity)
    return _respace(moved, jnp.asarray(places, chain.dtype)), velocity


def _tangents(
    chain: Float[Array, "k n"], losses: Float[Array, " k"]
) -> Float[Array, "pivots n"]:
    """Unit tangents at the inner pivots, Henkelman & Jonsson 2000, eqs. 8-11."""
    ahead, behind = chain[2:] - chain[1:-1], chain[1:-1] - chain[:-2]
    up, down = losses[2:] - losses[1:-1], losses[:-2] - losses[1:-1]
    large = jnp.maximum(jnp.abs(up), jnp.abs(down))
    small = jnp.minimum(jnp.abs(up), jnp.abs(down))
    # Of three equal losses both neighbours count; on a slope the higher one alone.
    flat, slope = large == 0, up * down < 0
    large = jnp.where(flat | slope, 1.0, large)
    small = jnp.where(flat, 1.0, jnp.where(slope, 0.0, small))
    rising = up > down
    tangents = (
        jnp.where(rising, large, small)[:, None] * ahead
        + jnp.where(rising, small, large)[:, None] * behind
    )
    norms = jnp.linalg.norm(tangents, axis=1, keepdims=True)
    return tangents / jnp.where(norms == 0, 1.0, norms)


def _respace(
    chain: Float[Array, "k n"], places: Float[Array, " k"]
) -> Float[Array, "k n"]:
    """Puts the pivots at fractions of the length of the chain that they make."""
    lengths = jnp.linalg.norm(jnp.diff(chain, axis=0), axis=1)
    at = jnp.concatenate([jnp.zeros_like(lengths[:1]), jnp.cumsum(lengths)])
    wanted = places[1:-1] * at[-1]
    gap = jnp.clip(jnp.searchsorted(at, wanted, side="right") - 1, 0, len(lengths) - 1)
    part = (wanted - at[gap]) / jnp.where(lengths[gap] == 0, 1.0, lengths[gap])
    part = part[:, None]
    return chain.at[1:-1].set((1 - part) * chain[gap] + part * chain[gap + 1])


def _insertions(losses, n_between, max_inserted, threshold):
    """The gaps to insert a pivot into, ascending, and the fraction of each gap."""
    pivots = losses[:: n_between + 1]
    inside = losses[:-1].reshape(-1, n_between + 1)[:, 1:]
    fractions = np.arange(1, n_between + 1) / (n_between + 1)
    line = pivots[:-1, None] * (1 - fractions) + pivots[1:, None] * fractions
    excess = inside - line
    heights = excess.max(axis=1)
    gaps = np.argsort(-heights, kind="stable")[:max_inserted]
    gaps = np.sort(gaps[heights[gaps] > threshold * np.ptp(pivots)])
    return gaps, fractions[excess.argmax(axis=1)[gaps]]


def _insert(chain, places, gaps, fractions):
    """The chain with pivots inserted on its straight pieces."""
    if not len(gaps):
        return chain, places
    places = np.insert(
        places, gaps + 1, places[gaps] + fractions * (places[gaps + 1] - places[gaps])
    )
    part = jnp.asarray(fractions, chain.dtype)[:, None]
    new = (1 - part) * chain[gaps] + part * chain[gaps + 1]
    return jnp.insert(chain, gaps + 1, new, axis=0), places
