"""Signal propagation: what a sparse initialisation does to activations and gradients.

    y = f(w, x)      forward    std of the logits, and of the output of every layer
    dL/dy            backward   std of the gradients with respect to those outputs

over the examples of a batch and the units together, for weights w drawn anew with each
of a number of masks (Evci et al. 2022, fig. 1, and the released notebook). L is the sum
of the criterion over the batch, that is, the batch size times the mean loss: an
example's gradient is then that of its own loss, whatever the size of the batch.

The output of a layer is that of a module with a kernel, before the activation function
and before a norm. Gradients with respect to it come from perturbations, zeros that are
added to it. The network comes as a function that takes them,

    trace(params, batch, perturbations) -> (logits, outputs)

with `outputs` by layer name in the order of the computation, and `perturbations` arrays
like some of the outputs, {} for none. For a `models.Model`:

    lambda p, batch, e: model.trace(p, batch_stats, batch["image"], True, e)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Key, PyTree
from matplotlib.figure import Figure

from lottery_flow.analysis import figures
from lottery_flow.analysis.objective import cross_entropy
from lottery_flow.sparsity import distributions
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.topk import topk_mask


class SignalPropagation(NamedTuple):
    """Standard deviations of a network at initialisation, for draws d of it.

    Attributes:
      sparsity: float64 [s].
      layer: str [l], in the order of the computation.
      logit_std: [s d], over the batch and the classes.
      neuron_std: [s d], std over the batch of one unit, its mean over the units of all
        dense layers (outputs of two dimensions); nan without any.
      activation_std: [s d l], of the outputs of layers, over the batch and the units.
      gradient_std: [s d l], of the gradients with respect to them, likewise.
    """

    sparsity: np.ndarray
    layer: np.ndarray
    logit_std: np.ndarray
    neuron_std: np.ndarray
    activation_std: np.ndarray
    gradient_std: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each sparsity, draw, layer and quantity; 'all': the network."""
        rows = []
        for quantity in self._fields[2:]:
            values = getattr(self, quantity)
            layers = ["all"] if values.ndim == 2 else self.layer.tolist()
            values = values.reshape(*values.shape[:2], len(layers))
            for (s, draw, i), value in np.ndenumerate(values):
                rows.append((self.sparsity[s], draw, layers[i], quantity, value))
        return pd.DataFrame(
            rows, columns=["sparsity", "draw", "layer", "quantity", "value"]
        )


def signal_propagation(
    trace: Callable,
    init: Callable,
    make_masks: Callable,
    params: Params,
    batch: Any,
    sparsities: Sequence[float] | np.ndarray,
    *,
    n_draws: int,
    key: Key[Array, ""],
    criterion: Callable = cross_entropy,
) -> SignalPropagation:
    """Signal propagation against sparsity, with new masks and weights for each draw.

    Args:
      trace: the network, see above.
      init: `(key, params, masks) -> params`, as those of `sparsity.initializers`; the
        dense initialisation is `masked_dense`.
      make_masks: `(key, params, sparsity) -> masks`, `uniform_masks` or `uneven_masks`.
      params: for shapes, and for what `init` does not draw (biases, norms).
      batch: inputs, the same for all draws; the paper's are N(0, 1).
      sparsities: for instance of a grid, each from 0 to below 1.
      n_draws: networks for each sparsity, which are one program.
      key: of all draws; draws are independent.
      criterion: `(logits, batch) -> float [b]`; cross-entropy with `batch["label"]`.

    Raises:
      ValueError: there is no sparsity, draw or layer.

    Guarantees:
      - One program for all sparsities whose masks have one structure.
      - The gradients are those of an example's own loss: more examples do not make them
        smaller.
    """
    if not len(sparsities) or n_draws < 1:
        raise ValueError(
            f"{len(sparsities)} sparsities, n_draws={n_draws}: give one or more of each"
        )
    layers = _layers(trace, params, batch)
    sparsity = np.asarray(sparsities, np.float64)
    found = []
    for i, s in enumerate(sparsity.tolist()):
        mask_key, init_key = jax.random.split(jax.random.fold_in(key, i))
        masks = jax.vmap(lambda k, s=s: make_masks(k, params, s))(
            jax.random.split(mask_key, n_draws)
        )
        keys = jax.random.split(init_key, n_draws)
        found.append(
            _propagate(trace, init, criterion, layers, params, batch, masks, keys)
        )
    by_quantity = (np.stack(values) for values in zip(*found, strict=True))
    return SignalPropagation(sparsity, np.array(layers), *by_quantity)


def plot_signal_propagation(result: SignalPropagation) -> Figure:
    """Means over the draws against sparsity: logits with their range, then layers."""
    fig, axes = figures.new(columns=3, sharex=True)
    s, logits = result.sparsity, result.logit_std
    axes[0].plot(s, logits.mean(1), "o-")
    axes[0].fill_between(s, logits.min(1), logits.max(1), alpha=0.2)
    for ax, values in zip(
        axes[1:], (result.activation_std, result.gradient_std), strict=True
    ):
        for i, layer in enumerate(result.layer.tolist()):
            ax.plot(s, values.mean(1)[:, i], label=layer)
        ax.legend(fontsize="x-small")
    for ax, what in zip(axes, ("logits", "layer outputs", "gradients"), strict=True):
        ax.set(xlabel="sparsity", ylabel=f"std of {what}", yscale="log")
    return fig


def uniform_masks(key: Key[Array, ""], params: PyTree, sparsity: float) -> Masks:
    """Uniformly random masks of the same sparsity in every layer.

    Args:
      key: a typed key.
      params: arrays or shapes.
      sparsity: from 0 to below 1; floor(sparsity * size) weights are masked.
    """
    return _random(key, params, sparsity, slope=0.0, more=0)


def uneven_masks(key: Key[Array, ""], params: PyTree, sparsity: float) -> Masks:
    """Random masks that leave the first units of a layer few inputs: the notebook's.

    A weight of output unit c = 0, 1, ... draws u ~ U(0, c + 1); the smallest u of the
    layer are masked, floor(sparsity * size) + 1 of them, none at sparsity 0. The
    arguments are those of `uniform_masks`.

    Guarantees:
      - Each mask has exactly that many inactive weights.
      - A unit is expected to have at least as many inputs as those before it.
    """
    return _random(key, params, sparsity, slope=1.0, more=1)


def _random(key, params, sparsity: float, slope: float, more: int) -> Masks:
    """Masks by the rank of u ~ U(0, 1 + slope c), with `more` zeros than floor says."""
    shapes = {k: leaf.shape for k, leaf in masks_lib.layers(params).items()}
    n_active = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        n_zeros = distributions.n_zeros(size, sparsity) + more if sparsity else 0
        n_active[name] = size - n_zeros
    masks = _largest(tuple(shapes.items()), key, slope, n_active)
    return masks_lib.from_named(masks, params)


@functools.partial(jax.jit, static_argnums=0)
def _largest(shapes, key, slope, n_active):
    """One program for all sparsities and slopes."""
    u = {}
    for i, (name, shape) in enumerate(shapes):
        highest = 1 + slope * jnp.arange(shape[-1], dtype=jnp.float32)
        draw = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32)
        u[name] = draw * jnp.broadcast_to(highest, shape)
    return topk_mask(u, n_active)


def _layers(trace, params, batch) -> tuple[str, ...]:
    """Names in the order of the computation, which trees of jax do not keep."""
    names: list[str] = []
    jax.eval_shape(lambda p, b: names.extend(trace(p, b, {})[1]), params, batch)
    if not names:
        raise ValueError("trace gives no outputs; give those of one layer or more")
    return tuple(names)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _propagate(trace, init, criterion, layers, params, batch, masks, keys):
    """The fields of the result for one sparsity: [d], [d], [d l], [d l]."""

    def draw(masks, key):
        weights = init(key, params, masks)
        shapes = jax.eval_shape(lambda w: trace(w, batch, {})[1], weights)
        zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

        def loss(perturbations):
            logits, outputs = trace(weights, batch, perturbations)
            return jnp.sum(criterion(logits, batch)), (logits, outputs)

        gradients, (logits, outputs) = jax.grad(loss, has_aux=True)(zeros)
        dense = [jnp.std(y, axis=0) for y in outputs.values() if y.ndim == 2]
        neurons = jnp.mean(jnp.concatenate(dense)) if dense else jnp.nan
        forward, backward = (
            jnp.stack([jnp.std(tree[k]) for k in layers])
            for tree in (outputs, gradients)
        )
        return jnp.std(logits), neurons, forward, backward

    return jax.vmap(draw)(masks, keys)
