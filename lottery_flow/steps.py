"""The jit-compiled steps: train, rewire, probe, evaluate.

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
from jaxtyping import Array, Float, UInt8

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.state import TrainState

Batch = dict[str, Any]  # image uint8 [b h w c], label int32 [b], weight float32 [b]


class Steps(NamedTuple):
    """Compiled functions of one run; `train` and `rewire` consume their state.

    Attributes:
      train: `(state, batch) -> (state, metrics)`, an update without a rewire.
      rewire: `(state, batch, probe, grow) -> (state, metrics)`, an update with one,
        which also measures the gradient norm just before and just after; `grow` is
        the batch that growth scores are taken on, None for the training batch.
      probe: `(state, batch) -> metrics`: loss, accuracy and gradient norm.
      evaluate: `(state, batch) -> sums` of loss, hits and weights.
    """

    train: Callable
    rewire: Callable
    probe: Callable
    evaluate: Callable


def compile_steps(
    apply_fn: Callable,
    tx: optax.GradientTransformationExtraArgs,
    timing: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Steps:
    """The steps of a model under a sparse transformation.

    Args:
      apply_fn: `Model.apply`.
      tx: from `sparsify`.
      timing: of its rule; says what the network was just before a rewire.
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

    def gradients(params, batch_stats, batch, key):
        return jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch_stats, batch, key
        )

    def step_key(state: TrainState):
        return jax.random.fold_in(state.key, state.step)

    def gradient_norm(params, masks, state, probe):
        _, grads = gradients(params, state.batch_stats, probe, step_key(state))
        return optax.tree.norm(masks_lib.apply(masks, grads))

    def advance(state: TrainState, batch: Batch, **options):
        (loss, (batch_stats, accuracy)), grads = gradients(
            state.params, state.batch_stats, batch, step_key(state)
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **options)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, state.key)
        return new, {"loss": loss, "accuracy": accuracy}

    def train(state: TrainState, batch: Batch):
        return advance(state, batch, rewire=False)

    def rewire(state: TrainState, batch: Batch, probe: Batch, grow: Batch | None):
        def grow_grad_fn(params):
            return gradients(params, state.batch_stats, grow, step_key(state))[1]

        # Timing 'instead' drops the gradient step: nothing moves before the rewire.
        stepped, _ = advance(state, batch, rewire=False)
        before = state if timing == "instead" else stepped
        after, metrics = advance(
            state,
            batch,
            rewire=True,
            grow_grad_fn=None if grow is None else grow_grad_fn,
        )
        metrics["gradient_norm_before"] = gradient_norm(
            before.params, before.masks, state, probe
        )
        metrics["gradient_norm_after"] = gradient_norm(
            after.params, after.masks, state, probe
        )
        return after, metrics

    def probe(state: TrainState, batch: Batch):
        (loss, (_, accuracy)), grads = gradients(
            state.params, state.batch_stats, batch, step_key(state)
        )
        norm = optax.tree.norm(masks_lib.apply(state.masks, grads))
        return {"probe_loss": loss, "probe_accuracy": accuracy, "gradient_norm": norm}

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

    return Steps(
        train=jax.jit(train, donate_argnums=0),
        rewire=jax.jit(rewire, donate_argnums=0),
        probe=jax.jit(probe),
        evaluate=jax.jit(evaluate),
    )


def normalize(
    images: UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Pixels as float32 fractions of 255, standardised channel by channel."""
    shape = (1, 1, 1, len(mean))
    offset = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = jnp.asarray(std, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255.0 - offset) / scale
