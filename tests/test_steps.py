"""The compiled steps against numpy, and against the plain optax form."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_cli

from lottery_flow import parallel, population
from lottery_flow.analysis import objective
from lottery_flow.data import arrays
from lottery_flow.evaluate import evaluate
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.transform import rewire_network, sparsify
from lottery_flow.state import create
from lottery_flow.steps import cross_entropy, make_steps, normalize


@pytest.fixture(autouse=True)
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def digits() -> arrays.Arrays:
    return run_cli.small_job().load_data()


def batch(digits, start: int, n: int) -> dict[str, np.ndarray]:
    images, labels = digits.train_images, digits.train_labels
    return arrays.gather(images, labels, np.arange(start, start + n))


def start(job, inner=None):
    """The transformation (the job's, or around `inner`), the state, the steps."""

    def make_method(knobs):
        return job.make_method(knobs) if inner is None else (inner, job.rule)

    network = job.make_network()
    optimizer, rule = make_method(job.knobs)
    tx = sparsify(optimizer, network.masks, rule, key=job.rewire_key)
    state = create(tx, network.params, network.batch_stats, job.step_key)
    steps = make_steps(job.model.apply, make_method, job.spec.mean, job.spec.std)
    train, rewire = jax.jit(steps.train), jax.jit(steps.rewire)

    def whole(batch):
        return batch, np.arange(len(batch["label"]))

    compiled = SimpleNamespace(
        train=lambda state, batch: train(state, job.knobs, *whole(batch)),
        rewire=lambda state, batch, grow: rewire(state, job.knobs, *whole(batch), grow),
        probe=jax.jit(steps.probe),
        population=population.one_by_one(steps, mesh=parallel.one_device()),
    )
    return tx, state, compiled


def copy(state):
    """To survive a step that consumes its state."""
    return jax.tree.map(jnp.copy, state)


# --- The optimizers, re-implemented ------------------------------------------------


def keras(w, v, g, rate, decay):
    v = 0.9 * v - rate * (g + decay * w)
    return w + v, v


def plain(w, v, g, rate, decay):
    v = 0.9 * v + (g + decay * w)
    return w - rate * v, v


@pytest.mark.parametrize(
    ("name", "update"), [("keras_momentum", keras), ("momentum", plain)]
)
def test_momentum_with_coupled_decay_on_kernels_only(name, update):
    n_steps, decay, peak = 10, 0.05, 0.3
    fields = {"optim__name": name, "optim__weight_decay": decay}
    fields |= {"optim__learning_rate": peak, "train__total_steps": n_steps}
    job = run_cli.small_job(**fields)
    tx, state, _ = start(job)
    params, opt_state = state.params, state.opt_state
    rng = np.random.default_rng(0)
    w = {k: np.float64(v) for k, v in masks_lib.named_leaves(params).items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    mask = {
        k: 1.0 if m is None else np.float64(m)
        for k, m in masks_lib.named_leaves(state.masks).items()
    }
    update_fn = jax.jit(tx.update)
    for step in range(n_steps):
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
        )
        g = {k: np.float64(x) for k, x in masks_lib.named_leaves(grads).items()}
        updates, opt_state = update_fn(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.5 * peak * (1 + np.cos(np.pi * step / n_steps))
        for k in w:
            own = decay if w[k].ndim == 2 else 0.0
            w[k], v[k] = update(w[k], v[k], g[k] * mask[k], rate, own)
    for k, leaf in masks_lib.named_leaves(params).items():
        np.testing.assert_allclose(leaf, w[k], rtol=1e-5, atol=1e-6, err_msg=k)


# --- Gradient flow -----------------------------------------------------------------


def gradient_in_numpy(params, masks, images, labels):
    """(loss, accuracy, gradient by layer name) of the one-hidden-layer MLP."""
    p = {k: np.float64(v) for k, v in masks_lib.named_leaves(params).items()}
    x = np.float64(images).reshape(len(images), -1) / 255.0
    hidden = x @ p["fc1"] + p["fc1/bias"]
    active = np.maximum(hidden, 0.0)
    logits = active @ p["fc2"] + p["fc2/bias"]
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = shifted / shifted.sum(1, keepdims=True)
    loss = -np.log(probability[np.arange(len(labels)), labels]).mean()
    d_logits = (probability - np.eye(10)[labels]) / len(labels)
    d_hidden = (d_logits @ p["fc2"].T) * (hidden > 0)
    grads = {
        "fc1": x.T @ d_hidden,
        "fc1/bias": d_hidden.sum(0),
        "fc2": active.T @ d_logits,
        "fc2/bias": d_logits.sum(0),
    }
    for name, mask in masks_lib.named_leaves(masks).items():
        if mask is not None:
            grads[name] = grads[name] * np.asarray(mask)
    return loss, np.mean(logits.argmax(1) == labels), grads


def norm_in_numpy(params, masks, examples) -> float:
    grads = gradient_in_numpy(params, masks, examples["image"], examples["label"])[2]
    return float(np.sqrt(sum((g**2).sum() for g in grads.values())))


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_gradient_norm_against_numpy(digits, sparsity):
    """All trainables, kernels masked, without the weight decay of the config."""
    fields = {"optim__weight_decay": 10.0, "sparsity__sparsity": sparsity}
    _, state, steps = start(run_cli.small_job(**fields))
    for _ in range(2):
        state, _ = steps.train(state, batch(digits, 0, 16))
    probe = batch(digits, 0, 40)
    found = steps.probe(state, probe)
    loss, accuracy, _ = gradient_in_numpy(
        state.params, state.masks, probe["image"], probe["label"]
    )
    norm = norm_in_numpy(state.params, state.masks, probe)
    np.testing.assert_allclose(found["gradient_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(found["probe_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["probe_accuracy"], accuracy, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "timing", "grows"),
    [("rigl", "after", 30), ("set", "instead", 30), ("rigl_inverted", "after", 0)],
)
def test_a_rewire_step_equals_its_parts(digits, rule, timing, grows):
    fields = {"sparsity__rule": rule, "sparsity__timing": timing}
    job = run_cli.small_job(**fields)
    inner = optax.sgd(0.1, momentum=0.9)
    _, state, steps = start(job, inner)
    for i in range(2):  # so that the optimizer has slots
        state, _ = steps.train(state, batch(digits, 16 * i, 16))
    now, probe = batch(digits, 50, 16), batch(digits, 0, 40)
    grow = batch(digits, 70, grows) if grows else None
    stepped, _ = steps.train(state, now)
    before = state if timing == "instead" else stepped
    # Growth sees its own batch at the new weights, or the gradients of the step.
    seen = (before.params, grow) if grows else (state.params, now)
    dense = jax.jit(jax.grad(_loss(job)))(*seen)
    # A rewire after the gradient step counts it, one instead of it does not.
    rewired = jax.jit(rewire_network, static_argnums=(0, 1))
    params, opt_state = rewired(job.rule, inner, before.opt_state, before.params, dense)
    after, _, just_before = steps.rewire(state, now, grow)
    np.testing.assert_allclose(
        steps.probe(just_before, probe)["gradient_norm"],
        norm_in_numpy(before.params, before.masks, probe),
        rtol=1e-5,
    )
    assert_same_masks(after.masks, opt_state.masks)
    assert any(
        (a != b).any()
        for a, b in zip(
            jax.tree.leaves(before.masks), jax.tree.leaves(after.masks), strict=True
        )
    )
    for a, b in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    measured_after = norm_in_numpy(params, opt_state.masks, probe)
    np.testing.assert_allclose(
        steps.probe(after, probe)["gradient_norm"], measured_after, rtol=1e-5
    )
    assert int(after.step) == int(after.opt_state.step) == 3


def _loss(job):
    def loss(params, examples):
        images = normalize(examples["image"], job.spec.mean, job.spec.std)
        logits, _ = job.model.apply(params, {}, images, True, jax.random.key(0))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, examples["label"]
        ).mean()

    return loss


def assert_same_masks(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# --- Loops -------------------------------------------------------------------------


def test_the_host_driven_loop_equals_the_plain_optax_one(digits):
    job = run_cli.small_job(sparsity__rule="rigl")
    tx, state, steps = start(job)
    loss_fn = _loss(job)
    grow = batch(digits, 40, 30)
    on_device = jax.tree.map(jnp.asarray, grow)

    @jax.jit
    def plain_step(params, opt_state, now):
        def grow_grad_fn(weights):
            return jax.grad(loss_fn)(weights, on_device)

        grads = jax.grad(loss_fn)(params, now)
        updates, opt_state = tx.update(
            grads, opt_state, params, grow_grad_fn=grow_grad_fn
        )
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = copy((state.params, state.opt_state))
    for i in range(9):
        now = batch(digits, 16 * i, 16)
        params, opt_state = plain_step(params, opt_state, now)
        if (i + 1) % 3 == 0:
            state, _, _ = steps.rewire(state, now, grow)
        else:
            state, _ = steps.train(state, now)
    assert_same_masks(state.masks, opt_state.masks)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


# --- Evaluation --------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1000, 355, 100, 7])
def test_evaluation_is_a_plain_mean_whatever_the_batch_size(digits, batch_size):
    _, state, steps = start(run_cli.small_job())
    images, labels = digits.test_images, digits.test_labels
    loss, accuracy, _ = gradient_in_numpy(state.params, state.masks, images, labels)
    batches = arrays.padded_batches(images, labels, batch_size)
    (found,) = evaluate(steps.population, [state], batches)
    assert found["test_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["test_accuracy"] == pytest.approx(accuracy, rel=1e-12)


def test_normalize_channel_by_channel():
    images = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    found = normalize(jnp.asarray(images), mean, std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop", ["learning_rate", "cosine"])
def test_a_run_that_stops_short_follows_the_schedule_of_the_whole_one(drop):
    fields = {"sparsity__rule": "rigl", "sparsity__drop_schedule": drop}
    whole = run_cli.small_job(train__total_steps=100, **fields)
    short = run_cli.small_job(
        train__total_steps=10, optim__schedule_steps=100, **fields
    )
    alone = run_cli.small_job(train__total_steps=10, **fields)
    with jax.numpy_dtype_promotion("standard"):
        for step in (0, 5, 9):
            assert short.learning_rate(step) == whole.learning_rate(step)
            assert short.drop_fraction(step) == whole.drop_fraction(step)
        assert short.learning_rate(9) > 2 * alone.learning_rate(9)
        assert short.drop_fraction(9) > 2 * alone.drop_fraction(9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_targets_are_spread_over_all_classes(smoothing):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 5, 6), jnp.int32)
    targets = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = -np.sum(targets * log_p, axis=1)
    found = cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-6)
    by_example = objective.cross_entropy(logits, {"label": labels}, smoothing)
    np.testing.assert_allclose(by_example, expected, rtol=1e-6)


def test_a_run_trains_on_smoothed_targets_and_evaluates_on_plain_ones():
    """Told apart by a network that is sure of what it says."""
    job = run_cli.small_job(loss__label_smoothing=0.2)
    network = job.make_network()
    sure = jax.tree.map(lambda p: 30 * p, network.params)
    network = network._replace(params=sure)
    state = job.create(network, job.rewire_key, job.step_key, job.knobs)
    digits_ = job.load_data()
    images, labels = digits_.train_images[:50], digits_.train_labels[:50]
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    steps = job.make_steps()
    probed = jax.jit(steps.probe)(state, batch)["probe_loss"]
    weighted = batch | {"weight": jnp.ones(50, jnp.float32)}
    sums = jax.jit(steps.evaluate)(state, weighted)
    normal = normalize(batch["image"], (0.0,), (1.0,))
    logits, _ = job.model.apply(sure, {}, normal, False)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    plain = -log_p[np.arange(50), labels].mean()
    np.testing.assert_allclose(sums["test_loss"] / 50, plain, rtol=1e-5)
    expected = 0.8 * plain - 0.2 * log_p.mean()
    np.testing.assert_allclose(probed, expected, rtol=1e-5)
    assert abs(expected - plain) > 0.1
