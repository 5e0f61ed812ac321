"""Gradient flow: how much the active gradient of a sparse network promises.

    g = mask o grad loss(w)                        gradient flow ||g||
    loss(w) - loss(w + d) = -(g . d) + O(d^2)      lr ||g||^2 for a step d = -lr g
    gain of a rewire = ||g after|| - ||g before||  on the same batches

(Evci et al. 2022.) The loss is a mean over examples, the norm L2 and not squared; every
active parameter counts, biases and norms too.

Layers are named as by `masks.named_leaves`; 'all' is the whole network. `masks` may be
None, or None at a leaf, where everything is active. A loss function is compiled once
for each shape of its arguments: pass the same one again, not a new one that is equal.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Key, PyTree
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.objective import LossFn
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.rules import Rule
from lottery_flow.sparsity.transform import SparseState, rewire_network

Network = tuple[Params, Masks | None]


def dense_gradient(loss_fn: LossFn, params: Params, batches: Batches) -> PyTree:
    """The gradient of the mean loss, of inactive weights too: what RigL grows by."""
    return batches_lib.mean(
        lambda b: _loss_and_gradient(loss_fn, params, b)[1], batches
    )


class GradientNorm(NamedTuple):
    """Gradient flow of a network.

    Attributes:
      layer: str [l], 'all' first.
      gradient_norm: float64 [l].
    """

    layer: np.ndarray
    gradient_norm: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each layer."""
        return pd.DataFrame(self._asdict())


def gradient_norm(
    loss_fn: LossFn, params: Params, masks: Masks | None, batches: Batches
) -> GradientNorm:
    """The L2 norm of the active gradient of the mean loss, whole and by layer.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch; or an `Objective`.
      params: the sparse weights.
      masks: what is active.
      batches: of any size and number, see `batches`.

    Guarantees:
      - The norm of the mean gradient, not the mean of the norms of the batches.
      - The gradient of an inactive weight does not count, NaN included.
      - Equals `gradient_norm` of a run's rows for its probe batch, with norms in
        training mode and no penalty.
    """
    masks = _checked(masks, params)
    grads = dense_gradient(loss_fn, params, batches)
    return GradientNorm(_layers(params), _norms(masks, grads))


def plot_gradient_norm(result: GradientNorm) -> Figure:
    """A bar for each layer."""
    return _bars(result.layer, {"gradient norm": result.gradient_norm})


class LossDecrease(NamedTuple):
    """What a step takes off the loss.

    Attributes:
      layer: str [l], 'all' first.
      predicted: float64 [l], to first order; the layers add up to 'all'.
      measured: of the whole step.
    """

    layer: np.ndarray
    predicted: np.ndarray
    measured: float

    def frame(self) -> pd.DataFrame:
        """A row for each prediction, and one for the measurement."""
        return pd.DataFrame(
            {
                "layer": [*self.layer, "all"],
                "quantity": ["predicted"] * len(self.layer) + ["measured"],
                "decrease": [*self.predicted, float(self.measured)],
            }
        )


def loss_decrease(
    loss_fn: LossFn,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    learning_rate: float | None = None,
    direction: PyTree | None = None,
) -> LossDecrease:
    """The decrease of the mean loss by a step, to first order and as measured.

    Args:
      loss_fn: see `gradient_norm`.
      params: where the step starts.
      masks: what is active; inactive weights do not move.
      batches: that the loss is taken on.
      learning_rate: of a gradient step, -learning_rate times the active gradient.
      direction: a step of the shape of the parameters instead, for instance the
        updates of an optimizer.

    Raises:
      ValueError: both of `learning_rate` and `direction` are given, or neither.

    Guarantees:
      - A gradient step is predicted to take off learning_rate times the squared norm.
      - Prediction and measurement differ by a term of second order in the step.
    """
    if (learning_rate is None) == (direction is None):
        raise ValueError(
            f"learning_rate={learning_rate} and direction "
            f"{'missing' if direction is None else 'given'}: give exactly one of them"
        )
    masks = _checked(masks, params)
    before, grads = batches_lib.mean(
        lambda b: _loss_and_gradient(loss_fn, params, b), batches
    )
    if learning_rate is not None:
        rate = float(learning_rate)
        direction = jax.tree.map(lambda g: -rate * g, grads)
    grads, step = masks_lib.apply(masks, grads), masks_lib.apply(masks, direction)
    dots = jax.tree.leaves(
        jax.tree.map(lambda g, d: -float(jnp.vdot(g, d)), grads, step)
    )
    moved = jax.tree.map(jnp.add, params, step)
    after = batches_lib.mean(lambda b: _loss(loss_fn, moved, b), batches)
    predicted = np.array([sum(dots), *dots])
    return LossDecrease(_layers(params), predicted, float(before) - float(after))


def plot_loss_decrease(result: LossDecrease) -> Figure:
    """A bar for each prediction, and a line at the measured decrease."""
    fig = _bars(result.layer, {"predicted": result.predicted})
    ax = fig.axes[0]
    ax.axhline(float(result.measured), color="C1", label="measured, all")
    ax.set_ylabel("decrease of the loss")
    ax.legend()
    return fig


class RewireGain(NamedTuple):
    """What a rewire does to gradient flow.

    Attributes:
      layer: str [l], 'all' first.
      before: float64 [l], gradient norm before the rewire.
      after: float64 [l], after it.
      gain: float64 [l], after - before.
    """

    layer: np.ndarray
    before: np.ndarray
    after: np.ndarray
    gain: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each layer."""
        return pd.DataFrame(self._asdict())


def rewire_gain(
    loss_fn: LossFn, before: Network, after: Network, batches: Batches
) -> RewireGain:
    """The change of the gradient norm between two networks, on the same batches.

    Args:
      loss_fn: see `gradient_norm`.
      before: (params, masks) just before a rewire.
      after: (params, masks) just after it, of the same model.
      batches: for both; not those that the rewire grew by, as in the paper.
    """
    _checked(after[1], before[0])
    first, second = (gradient_norm(loss_fn, *pair, batches) for pair in (before, after))
    gain = second.gradient_norm - first.gradient_norm
    return RewireGain(first.layer, first.gradient_norm, second.gradient_norm, gain)


def plot_rewire_gain(result: RewireGain) -> Figure:
    """Two bars for each layer: the gradient norm before and after."""
    return _bars(result.layer, {"before": result.before, "after": result.after})


def rewire(
    rule: Rule,
    params: Params,
    masks: Masks,
    dense_grads: PyTree,
    *,
    key: Key[Array, ""],
    step: int = 0,
) -> tuple[Params, Masks]:
    """A network after one rewire, due or not, without a training loop.

    Args:
      rule: proposes the masks, see `sparsity.rules`.
      params: the sparse weights.
      masks: what is active.
      dense_grads: that the rule grows by, of `dense_gradient`.
      key: of a run; the rewire uses `fold_in(key, step)`.
      step: updates done, on which the drop fraction depends.

    Guarantees:
      - The same network as `sparsify` leaves after this rewire.
    """
    masks_lib.check(masks, params)
    return _rewire(rule, params, masks, dense_grads, key, jnp.asarray(step, jnp.int32))


def compare_rules(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    batches: Batches,
    rules: Mapping[str, Rule],
    dense_grads: PyTree,
    *,
    key: Key[Array, ""],
    step: int = 0,
) -> pd.DataFrame:
    """The gains of several rules' rewires of one and the same network.

    Args: see `rewire` and `rewire_gain`; `rules` by the name to show.

    Returns:
      A row for each rule and layer: `rule`, and the columns of `RewireGain`.
    """
    frames = []
    for name, rule in rules.items():
        after = rewire(rule, params, masks, dense_grads, key=key, step=step)
        frame = rewire_gain(loss_fn, (params, masks), after, batches).frame()
        frame.insert(0, "rule", name)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def plot_compare_rules(frame: pd.DataFrame) -> Figure:
    """The gain of each rule, a group of bars for each layer."""
    gains = {
        name: part["gain"].to_numpy()
        for name, part in frame.groupby("rule", sort=False)
    }
    fig = _bars(frame["layer"].unique(), gains)
    fig.axes[0].set_ylabel("gain of the gradient norm")
    return fig


def trajectory(
    loss_fn: LossFn,
    networks: Iterable[tuple[int, Params, Masks | None]],
    batches: Batches,
) -> pd.DataFrame:
    """Gradient flow over training, one network in memory at a time.

    Args:
      loss_fn: see `gradient_norm`; the same for all, so norms take the statistics of
        the batch, as in the paper, or none.
      networks: (step, params, masks), for instance restored checkpoints one by one.
      batches: the same for all.

    Returns:
      A row for each step and layer: `step`, `layer`, `gradient_norm`.

    Guarantees:
      - One program for all networks of the same shapes, whatever their masks.
    """
    frames = []
    for step, params, masks in networks:
        frame = gradient_norm(loss_fn, params, masks, batches).frame()
        frame.insert(0, "step", step)
        frames.append(frame)
    if not frames:
        raise ValueError("networks is empty; give at least one (step, params, masks)")
    return pd.concat(frames, ignore_index=True)


def plot_trajectory(frame: pd.DataFrame) -> Figure:
    """The norm over the steps, a line for each layer."""
    fig, ax = figures.new()
    for layer, part in frame.groupby("layer", sort=False):
        width = 2.0 if layer == "all" else 0.8
        ax.plot(part["step"], part["gradient_norm"], linewidth=width, label=layer)
    ax.set(xlabel="step", ylabel="gradient norm", yscale="log")
    ax.legend(fontsize="x-small")
    return fig


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradient(loss_fn, params, batch):
    return jax.value_and_grad(loss_fn)(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn, params, batch):
    return loss_fn(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _rewire(rule, params, masks, dense_grads, key, step):
    inner = optax.identity()
    rule_state = rule.observe(rule.init(masks, params), dense_grads)
    state = SparseState(step, key, masks, rule_state, inner.init(params))
    params, state = rewire_network(rule, inner, state, params, dense_grads)
    return params, state.masks


@jax.jit
def _squares(masks, grads):
    active = masks_lib.apply(masks, grads)
    return [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(active)]


def _norms(masks, grads) -> np.ndarray:
    """Of the whole network and of each leaf, float64."""
    squares = np.array(jax.device_get(_squares(masks, grads)), np.float64)
    return np.sqrt(np.array([squares.sum(), *squares]))


def _checked(masks, params) -> Any:
    """The masks, none at all as a tree of them."""
    masks = masks_lib.dense(params) if masks is None else masks
    masks_lib.check(masks, params)
    return masks


def _layers(params) -> np.ndarray:
    return np.array(["all", *masks_lib.named_leaves(params)])


def _bars(labels, series: Mapping[Any, np.ndarray]) -> Figure:
    """Groups of bars, one for each label and in it one for each series."""
    fig, ax = figures.new()
    x, width = np.arange(len(labels)), 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        ax.bar(x + (i - (len(series) - 1) / 2) * width, values, width, label=name)
    ax.set_xticks(x, labels, rotation=45, ha="right")
    ax.set_ylabel("gradient norm")
    if len(series) > 1:
        ax.legend()
    return fig
