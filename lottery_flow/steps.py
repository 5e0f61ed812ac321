"""The steps of one member of a population, as pure functions.

`population` compiles them for one network, or for many at once.

Gradient flow is the L2 norm of the gradient of the mean cross-entropy over all
active parameters, without weight decay, on a fixed *probe* batch: the first training
images in the order of the data set, with the model in training mode, as in the
paper's released code.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.state import TrainState

# image uint8 [b h w c], label int32 [b]; to evaluate on also weight float32 [b]. A
# whole training split, of which a step takes some examples, looks the same.
Batch = dict[str, Any]
Knobs = dict[str, Any]  # see `Job.knobs`


class Steps(NamedTuple):
    """What is done to one network.

    Attributes:
      train: `(state, knobs, data, indices) -> (state, metrics)`, an update without a
        rewire, on the examples of `data` that `indices` int32 [b] names.
      rewire: `(state, knobs, data, indices, grow) -> (state, metrics)`, an update with
        one; `grow` is the batch that growth scores are taken on, None for the batch
        of the step.
      probe: `(state, batch) -> metrics`: loss, accuracy, gradient norm, and the active
        weights of each masked layer.
      evaluate: `(state, batch) -> sums` of loss, hits and weights.
    """

    train: Callable
    rewire: Callable
    probe: Callable
    evaluate: Callable


def make_steps(
    apply_fn: Callable,
    make_tx: Callable,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Steps:
    """The steps of a model under a sparse transformation.

    Args:
      apply_fn: `Model.apply`.
      make_tx: `Job.make_tx`.
      mean: of each channel, as a fraction of 255, subtracted from the images.
      std: of each channel, likewise; the images are divided by it.
    """

    def loss_fn(params, batch_stats, batch, key):
        images = normalize(batch["image"], mean, std)
        logits, batch_stats = apply_fn(params, batch_stats, images, True, key)
        labels = batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return loss, (batch_stats, accuracy)

    def gradients(state: TrainState, params, batch):
        key = jax.random.fold_in(state.key, state.step)
        return jax.value_and_grad(loss_fn, has_aux=True)(
            params, state.batch_stats, batch, key
        )

    def advance(state: TrainState, knobs: Knobs, batch: Batch, **options):
        tx = make_tx(state.masks, state.opt_state.key, knobs)
        (loss, (batch_stats, accuracy)), grads = gradients(state, state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **options)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, state.key)
        return new, {"loss": loss, "accuracy": accuracy}

    def train(state: TrainState, knobs: Knobs, data: Batch, indices):
        return advance(state, knobs, take(data, indices), rewire=False)

    def rewire(state: TrainState, knobs, data: Batch, indices, grow: Batch | None):
        def grow_grad_fn(params):
            return gradients(state, params, grow)[1]

        grow_options = {} if grow is None else {"grow_grad_fn": grow_grad_fn}
        return advance(state, knobs, take(data, indices), rewire=True, **grow_options)

    def probe(state: TrainState, batch: Batch):
        (loss, (_, accuracy)), grads = gradients(state, state.params, batch)
        norm = optax.tree.norm(masks_lib.apply(state.masks, grads))
        return {
            "probe_loss": loss,
            "probe_accuracy": accuracy,
            "gradient_norm": norm,
            "n_active": masks_lib.count(state.masks),
        }

    def evaluate(state: TrainState, batch: Batch):
        images = normalize(batch["image"], mean, std)
        logits, _ = apply_fn(state.params, state.batch_stats, images, False)
        labels, weight = batch["label"], batch["weight"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (jnp.argmax(logits, axis=-1) == labels).astype(weight.dtype)
        return {
            "loss": jnp.sum(losses * weight),
            "hits": jnp.sum(hits * weight),
            "weight": jnp.sum(weight),
        }

    return Steps(train, rewire, probe, evaluate)


def take(data: Batch, indices: Int[Array, " b"]) -> Batch:
    """The batch of some examples."""
    return {k: jnp.take(v, indices, axis=0, mode="clip") for k, v in data.items()}


def normalize(
    images: UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Pixels as float32 fractions of 255, standardised channel by channel."""
    shape = (1, 1, 1, len(mean))
    offset = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = jnp.asarray(std, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255.0 - offset) / scale
