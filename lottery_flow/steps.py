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
from jaxtyping import Array, Bool, Float, Int, UInt8

from lottery_flow import parts
from lottery_flow.augment import take
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import reparameterize
from lottery_flow.sparsity.parameterization import Parameterization
from lottery_flow.sparsity.transform import rewire_network, sparsify
from lottery_flow.state import TrainState

# image uint8 [b h w c], label int32 [b]; to evaluate on also weight float32 [b]. A
# whole training split, of which a step takes some examples, looks the same.
Batch = dict[str, Any]
Knobs = dict[str, Any]  # see `Job.knobs`
_NOISE = 1  # stream of the key of a step: what a parameterization draws


class Steps(NamedTuple):
    """What is done to one network.

    Attributes:
      train: `(state, knobs, data, indices, plans=None) -> (state, metrics)`, an update
        without a rewire, on the examples of `data` that `indices` int32 [b], or with
        augmentation [4 b], names; None: on all of them. See `augment.draws`, and for
        the plans `Model.apply`.
      rewire: `(state, knobs, data, indices, grow) -> (state, metrics, before)`, an
        update with one; `grow` is the batch that growth scores are taken on, None for
        the batch of the step; `before` is the network just before the rewire, for
        `probe`, without the state of its optimizer.
      probe: `(state, batch) -> metrics`: loss, accuracy, gradient norm, and the active
        weights of each masked layer.
      evaluate: `(state, batch) -> sums` over the examples, by their weights, of what
        is named as in a row of metrics, and of the weights.
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
    *,
    label_smoothing: float = 0.0,
    norm_examples: int = 0,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    parameterization: Parameterization | None = None,
    skip_nonfinite: bool = False,
) -> Steps:
    """The steps of a model under a sparse transformation.

    Args:
      apply_fn: `Model.apply`.
      make_method: `Job.make_method`.
      mean: of each channel, as a fraction of 255, subtracted from the images.
      std: of each channel, likewise; the images are divided by it.
      label_smoothing: share of the target that is spread evenly over all classes
        (Szegedy et al. 2015), in everything that is differentiated; not in evaluation.
      norm_examples: images of a step whose statistics norms share, as the replicas of
        a distributed training have it; running statistics are the means over them. 0:
        all images of a part, on however many devices.
      accumulate_steps: parts in which the gradient of a step is computed, one after
        another, to save memory, and at least as many of a probe or a growth batch.
        Their mean is the gradient of the batch, but for norms.
      ema_decay: d in ema = d ema + (1 - d) params, after each step; 0: no average.
      parameterization: what is trained instead of the weights, see `reparameterize`;
        the loss that is reported is without its penalty.
      skip_nonfinite: an update whose loss, gradient (also that of a growth batch,
        where it is taken after the step) or weights are not finite is not applied:
        only `step`, `skipped` and the counters of the optimizer advance, and the
        metrics have `skipped`.
    """

    def forward(params, batch_stats, images, key, n_together: int, plans):
        if not n_together or n_together == len(images):
            # Only who knows of plans has to take them.
            own = (plans,) if plans else ()
            return apply_fn(params, batch_stats, images, True, key, *own)
        groups = images.reshape(-1, n_together, *images.shape[1:])

        def apply(group, i):
            own = jax.random.fold_in(key, i)
            return apply_fn(params, batch_stats, group, True, own)

        logits, stats = jax.vmap(apply)(groups, jnp.arange(len(groups)))
        means = jax.tree.map(lambda s: jnp.mean(s, axis=0), stats)
        return logits.reshape(-1, logits.shape[-1]), means

    def loss_fn(params, batch_stats, batch, key, n_together: int = 0, plans=None):
        images = normalize(batch["image"], mean, std)
        logits, batch_stats = forward(
            params, batch_stats, images, key, n_together, plans
        )
        labels = batch["label"]
        loss = cross_entropy(logits, labels, label_smoothing)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return loss, (batch_stats, accuracy)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(state: TrainState, params, batch):
        key = jax.random.fold_in(state.key, state.step)
        n_parts = parts.fewest(len(batch["label"]), accumulate_steps)
        return parts.mean(gradient, params, state.batch_stats, batch, key, n_parts)

    def loss_of_raw(raw, batch_stats, batch, key, n_together: int = 0, plans=None):
        assert parameterization is not None
        assert not plans
        params = parameterization.weights(raw, jax.random.fold_in(key, _NOISE), True)
        return loss_fn(params, batch_stats, batch, key, n_together)

    if parameterization is not None:
        gradient_of_step = jax.value_and_grad(loss_of_raw, has_aux=True)
    else:
        gradient_of_step = gradient

    def gradients_of_step(state: TrainState, batch: Batch, plans):
        """As `gradients`, for the batch of a step, of what is trained."""
        trained = state.opt_state.rule_state if parameterization else state.params
        key = jax.random.fold_in(state.key, state.step)
        return parts.mean(
            *(gradient_of_step, trained, state.batch_stats, batch, key),
            *(accumulate_steps, norm_examples, plans),
        )

    def averaged(before: TrainState, after: TrainState) -> TrainState:
        if not ema_decay:
            return after
        ema = jax.tree.map(
            lambda old, new: ema_decay * old + (1 - ema_decay) * new,
            before.ema,
            after.params,
        )
        return after._replace(ema=masks_lib.apply(after.masks, ema))

    def checked(old: TrainState, new: TrainState, metrics, *grads):
        """`new` if it and what led to it are finite, else `old` one step later."""
        if not skip_nonfinite:
            return new, metrics
        finite = jnp.isfinite(metrics["loss"])
        for leaf in jax.tree.leaves((grads, new.params)):
            finite &= jnp.all(jnp.isfinite(leaf))
        new = _select(finite, new, old)
        skipped = old.skipped + (~finite).astype(jnp.int32)
        return new._replace(skipped=skipped), metrics | {"skipped": skipped}

    def advance(state: TrainState, method, batch: Batch, plans=None, **options):
        inner, rule = method
        (loss, (batch_stats, accuracy)), grads = gradients_of_step(state, batch, plans)
        if parameterization is not None:
            raw = state.opt_state.rule_state
            slopes = jax.grad(parameterization.penalty)(raw, state.step)
            grads = jax.tree.map(jnp.add, grads, slopes)
            params, opt_state = reparameterize.update(
                parameterization, inner, grads, state.opt_state
            )
        else:
            tx = sparsify(inner, state.masks, rule, key=state.opt_state.key)
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, **options
            )
            params = optax.apply_updates(state.params, updates)
        own = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}
        new = state._replace(step=state.step + 1, **own)
        return new, grads, {"loss": loss, "accuracy": accuracy}

    def train(state: TrainState, knobs: Knobs, data: Batch, indices, plans=None):
        method, batch = make_method(knobs), take(data, indices)
        new, grads, metrics = advance(state, method, batch, plans, rewire=False)
        return checked(state, averaged(state, new), metrics, grads)

    def rewire(state: TrainState, knobs, data: Batch, indices, grow: Batch | None):
        inner, rule = method = make_method(knobs)
        batch = take(data, indices)

        def grow_grad_fn(params):
            return gradients(state, params, grow)[1]

        if rule.timing == "instead":
            options = {} if grow is None else {"grow_grad_fn": grow_grad_fn}
            new, grads, metrics = advance(state, method, batch, rewire=True, **options)
            own = checked(state, averaged(state, new), metrics, grads)
            return *own, without_slots(state)
        # What tx.update(rewire=True) does, but for the weights in between: as updates
        # they would be one more copy of the parameters.
        new, grads, metrics = advance(state, method, batch, rewire=False)
        scores = grads if grow is None else grow_grad_fn(new.params)
        params, opt_state = rewire_network(
            rule, inner, new.opt_state, new.params, scores
        )
        after = new._replace(params=params, opt_state=opt_state)
        own = checked(state, averaged(state, after), metrics, grads, scores)
        before, _ = checked(state, new, metrics, grads, scores)
        return *own, without_slots(before)

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
        labels, weight = batch["label"], batch["weight"]

        def sums(params, prefix):
            logits, _ = apply_fn(params, state.batch_stats, images, False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            hits = (jnp.argmax(logits, axis=-1) == labels).astype(weight.dtype)
            return {
                f"{prefix}loss": jnp.sum(losses * weight),
                f"{prefix}accuracy": jnp.sum(hits * weight),
            }

        found = sums(state.params, "test_") | {"weight": jnp.sum(weight)}
        return found | sums(state.ema, "ema_test_") if ema_decay else found

    return Steps(train, rewire, probe, evaluate)


def _select(chosen: Bool[Array, ""], new: TrainState, old: TrainState) -> TrainState:
    """`new` or `old`, but for what counts steps, which is always that of `new`."""

    def pick(a, b):
        return jnp.where(chosen, a, b)

    def pick_slot(a, b):
        counts = a.ndim == 0 and jnp.issubdtype(a.dtype, jnp.integer)
        return a if counts else pick(a, b)

    ours, theirs = new.opt_state, old.opt_state
    opt_state = ours._replace(
        masks=jax.tree.map(pick, ours.masks, theirs.masks),
        rule_state=jax.tree.map(pick, ours.rule_state, theirs.rule_state),
        inner_state=jax.tree.map(pick_slot, ours.inner_state, theirs.inner_state),
    )
    return new._replace(
        params=jax.tree.map(pick, new.params, old.params),
        batch_stats=jax.tree.map(pick, new.batch_stats, old.batch_stats),
        ema=jax.tree.map(pick, new.ema, old.ema),
        opt_state=opt_state,
    )


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


def normalize(
    images: UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Pixels as float32 fractions of 255, standardised channel by channel."""
    shape = (1, 1, 1, len(mean))
    offset = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = jnp.asarray(std, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255.0 - offset) / scale
