"""The steps of one member of a population, as pure functions.

`population` compiles them for one network, or for many at once.

Gradient flow is the L2 norm of the gradient of the mean cross-entropy (of the run's
smoothed targets) over all active parameters, without weight decay, on a fixed *probe*
batch: the first training images in the order of the data set, with the model in
training mode, as in the paper's released code.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.transform import rewire_network, sparsify
from lottery_flow.state import TrainState

# image uint8 [b h w c], label int32 [b]; to evaluate on also weight float32 [b]. A
# whole training split, of which a step takes some examples, looks the same.
Batch = dict[str, Any]
Knobs = dict[str, Any]  # see `Job.knobs`


class Steps(NamedTuple):
    """What is done to one network.

    Attributes:
      train: `(state, knobs, data, indices) -> (state, metrics)`, an update without a
        rewire, on the examples of `data` that `indices` int32 [b] names; None: on
        all of them.
      rewire: `(state, knobs, data, indices, grow) -> (state, metrics, before)`, an
        update with one; `grow` is the batch that growth scores are taken on, None for
        the batch of the step; `before` is the network just before the rewire, for
        `probe`, without the state of its optimizer.
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
    make_method: Callable,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    label_smoothing: float = 0.0,
) -> Steps:
    """The steps of a model under a sparse transformation.

    Args:
      apply_fn: `Model.apply`.
      make_method: `Job.make_method`.
      mean: of each channel, as a fraction of 255, subtracted from the images.
      std: of each channel, likewise; the images are divided by it.
      label_smoothing: share of the target that is spread evenly over all classes
        (Szegedy et al. 2015), in everything that is differentiated; not in evaluation.
    """

    def loss_fn(params, batch_stats, batch, key):
        images = normalize(batch["image"], mean, std)
        logits, batch_stats = apply_fn(params, batch_stats, images, True, key)
        labels = batch["label"]
        loss = cross_entropy(logits, labels, label_smoothing)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return loss, (batch_stats, accuracy)

    def gradients(state: TrainState, params, batch):
        key = jax.random.fold_in(state.key, state.step)
        return jax.value_and_grad(loss_fn, has_aux=True)(
            params, state.batch_stats, batch, key
        )

    def advance(state: TrainState, method, batch: Batch, **options):
        inner, rule = method
        tx = sparsify(inner, state.masks, rule, key=state.opt_state.key)
        (loss, (batch_stats, accuracy)), grads = gradients(state, state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **options)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, state.key)
        return new, grads, {"loss": loss, "accuracy": accuracy}

    def train(state: TrainState, knobs: Knobs, data: Batch, indices):
        method, batch = make_method(knobs), take(data, indices)
        new, _, metrics = advance(state, method, batch, rewire=False)
        return new, metrics

    def rewire(state: TrainState, knobs, data: Batch, indices, grow: Batch | None):
        inner, rule = method = make_method(knobs)
        batch = take(data, indices)

        def grow_grad_fn(params):
            return gradients(state, params, grow)[1]

        if rule.timing == "instead":
            options = {} if grow is None else {"grow_grad_fn": grow_grad_fn}
            new, _, metrics = advance(state, method, batch, rewire=True, **options)
            return new, metrics, without_slots(state)
        # What tx.update(rewire=True) does, but for the weights in between: as updates
        # they would be one more copy of the parameters.
        new, grads, metrics = advance(state, method, batch, rewire=False)
        if grow is not None:
            grads = grow_grad_fn(new.params)
        params, opt_state = rewire_network(
            rule, inner, new.opt_state, new.params, grads
        )
        after = new._replace(params=params, opt_state=opt_state)
        return after, metrics, without_slots(new)

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


def cross_entropy(
    logits: Float[Array, "b n"], labels: Int[Array, " b"], smoothing: float
) -> Float[Array, ""]:
    """The mean over the batch, with smoothed targets."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:
        # Of a target that is the same for all classes.
        even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        losses = (1 - smoothing) * losses + smoothing * even
    return losses.mean()


def without_slots(state: TrainState) -> TrainState:
    """The network, with what only its training needs left out."""
    opt_state = state.opt_state._replace(rule_state=(), inner_state=())
    return state._replace(opt_state=opt_state)


def take(data: Batch, indices: Int[Array, " b"] | None) -> Batch:
    """The batch of some examples; None: all of them, in their order."""
    if indices is None:
        return data
    return {k: jnp.take(v, indices, axis=0, mode="clip") for k, v in data.items()}


def normalize(
    images: UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Pixels as float32 fractions of 255, standardised channel by channel."""
    shape = (1, 1, 1, len(mean))
    offset = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = jnp.asarray(std, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255.0 - offset) / scale
