"""Straight-through gradients, sets and thresholds against numpy."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import weight_parameterizations as methods
from lottery_flow.sparsity.straight_through import gated, straight_through

ACTIVE = {"conv": 17, "fc": 11}
BACKWARD = {"conv": 30, "fc": 11}
STEP = jnp.int32(0)


def network(seed=0):
    """Integers, most of them several times: ties decide the masks."""
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": jnp.asarray(rng.integers(-5, 6, (2, 2, 3, 4)), jnp.float32)},
        "fc": {
            "kernel": jnp.asarray(rng.integers(-5, 6, (6, 5)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=5), jnp.float32),
        },
    }


def started(p, params):
    return p.init(jax.random.key(0), params, masks_lib.full(params, ACTIVE))


def largest(w, n):
    order = np.argsort(-np.abs(w).ravel(), kind="stable")[:n]
    mask = np.zeros(w.size, bool)
    mask[order] = True
    return mask.reshape(w.shape)


def values_and_grads(p, params, targets):
    """Weights, and gradients of half their squared distance from the targets."""

    def loss(raw):
        weights = p.weights(raw, None, True)
        terms = jax.tree.map(lambda w, t: 0.5 * jnp.sum((w - t) ** 2), weights, targets)
        return sum(jax.tree.leaves(terms)), weights

    @jax.jit
    def run(params):
        raw = started(p, params)
        return *jax.grad(loss, has_aux=True)(raw), p.masks(raw)

    return jax.device_get(run(params))


def test_dnw():
    params, targets = network(), network(1)
    grads, weights, masks = values_and_grads(methods.dnw(ACTIVE), params, targets)
    for layer in ACTIVE:
        w = np.asarray(params[layer]["kernel"])
        active = largest(w, ACTIVE[layer])
        expected = np.where(active, w, 0)
        np.testing.assert_array_equal(masks[layer]["kernel"], active)
        np.testing.assert_array_equal(weights[layer]["kernel"], expected)
        np.testing.assert_array_equal(
            grads.sparse["weights"][layer]["kernel"],
            expected - np.asarray(targets[layer]["kernel"]),
        )
    bias = params["fc"]["bias"] - targets["fc"]["bias"]
    np.testing.assert_array_equal(grads.dense["fc"]["bias"], bias)


def test_global_scope_ranks_all_layers_together():
    params, targets = network(), network(1)
    p = methods.magnitude_ste(ACTIVE, scope="global")
    grads, weights, masks = values_and_grads(p, params, targets)
    w = {k: np.asarray(params[k]["kernel"]) for k in ACTIVE}
    flat = np.concatenate([w["conv"].ravel(), w["fc"].ravel()])
    active = largest(flat, sum(ACTIVE.values()))
    assert active[: w["conv"].size].sum() != ACTIVE["conv"]
    for layer, part in zip(ACTIVE, np.split(active, [w["conv"].size]), strict=True):
        part = part.reshape(w[layer].shape)
        np.testing.assert_array_equal(masks[layer]["kernel"], part)
        expected = np.where(part, w[layer], 0)
        np.testing.assert_array_equal(weights[layer]["kernel"], expected)
        np.testing.assert_array_equal(
            grads.sparse["weights"][layer]["kernel"],
            expected - np.asarray(targets[layer]["kernel"]),
        )


def test_top_kast_reaches_the_superset_alone():
    params, targets = network(), network(1)
    p = methods.top_kast(ACTIVE, BACKWARD)
    grads, weights, masks = values_and_grads(p, params, targets)
    for layer in ACTIVE:
        w = np.asarray(params[layer]["kernel"])
        forward, backward = largest(w, ACTIVE[layer]), largest(w, BACKWARD[layer])
        expected = np.where(forward, w, 0)
        np.testing.assert_array_equal(masks[layer]["kernel"], forward)
        np.testing.assert_array_equal(weights[layer]["kernel"], expected)
        dense = expected - np.asarray(targets[layer]["kernel"])
        assert dense[~backward].any()
        np.testing.assert_array_equal(
            grads.sparse["weights"][layer]["kernel"], np.where(backward, dense, 0)
        )


def test_top_kast_penalty():
    params = network()
    p = methods.top_kast(ACTIVE, BACKWARD, penalty_scale=0.1)
    raw = started(p, params)
    value, grads = jax.jit(jax.value_and_grad(p.penalty))(raw, STEP)
    expected = 0.0
    for layer in ACTIVE:
        w = np.asarray(params[layer]["kernel"])
        forward, backward = largest(w, ACTIVE[layer]), largest(w, BACKWARD[layer])
        scale = np.where(forward, 1.0, np.where(backward, w.size / ACTIVE[layer], 0.0))
        expected += 0.05 * (scale * w**2).sum()
        np.testing.assert_allclose(
            grads.sparse["weights"][layer]["kernel"], 0.1 * scale * w, rtol=1e-6
        )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert not jnp.any(grads.dense["fc"]["bias"])


@pytest.mark.parametrize("f", [jax.nn.sigmoid, jnp.exp])
def test_str_thresholds_and_gradients(f):
    """Against the formula, and central differences in s, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        kernel, target = rng.normal(size=(2, 7, 9)), rng.normal(size=(2, 7, 9))
        p = methods.str_(-0.7, f)
        params = {"fc": {"kernel": jnp.asarray(kernel)}}
        raw = p.init(jax.random.key(0), params, masks_lib.full(params, {"fc": 126}))

        @jax.jit
        def loss(raw):
            weights = p.weights(raw, None, True)["fc"]["kernel"]
            return jnp.sum(jnp.sin(weights) * target)

        def at(s):
            thresholds = {"fc": {"kernel": jnp.asarray(s)}}
            return raw._replace(sparse={**raw.sparse, "thresholds": thresholds})

        grads, h = jax.grad(loss)(raw).sparse, 1e-6
        slope = (loss(at(-0.7 + h)) - loss(at(-0.7 - h))) / (2 * h)
        np.testing.assert_allclose(
            grads["thresholds"]["fc"]["kernel"], slope, rtol=1e-7
        )
        threshold = 1 / (1 + np.exp(0.7)) if f is jax.nn.sigmoid else np.exp(-0.7)
        expected = np.sign(kernel) * np.maximum(np.abs(kernel) - threshold, 0)
        shown = np.asarray(p.weights(raw, None, False)["fc"]["kernel"])
        np.testing.assert_allclose(shown, expected, rtol=1e-12)
        assert 0 < (expected == 0).mean() < 1
        np.testing.assert_array_equal(p.masks(raw)["fc"]["kernel"], expected != 0)
        np.testing.assert_allclose(
            grads["weights"]["fc"]["kernel"],
            np.where(expected != 0, np.cos(expected) * target, 0),
            rtol=1e-12,
        )


def test_str_starts_at_its_default():
    p = methods.str_()
    raw = started(p, network())
    assert {float(s) for s in jax.tree.leaves(raw.sparse["thresholds"])} == {-5.0}


# The masks with derivatives of their own


def test_hard_masks_keep_bits_and_drop_what_is_not_finite():
    w = jnp.array([0.1, -0.0, jnp.nan, jnp.inf, -3.0], jnp.float32)
    active = jnp.array([True, True, False, False, False])
    for out in (straight_through(w, active), gated(w, w, active)):
        bits = np.asarray(out).view(np.uint32)
        np.testing.assert_array_equal(
            bits, np.where(active, np.asarray(w).view(np.uint32), 0)
        )


def test_forward_and_reverse_derivatives_agree():
    rng = np.random.default_rng(3)
    w, gate, dw, dgate, c = (jnp.asarray(rng.normal(size=6)) for _ in range(5))
    active = jnp.arange(6) % 2 == 0
    _, tangent = jax.jvp(lambda w, g: gated(w, g, active), (w, gate), (dw, dgate))
    expected = np.where(active, dw, 0) + np.asarray(w) * np.asarray(dgate)
    np.testing.assert_allclose(tangent, expected, rtol=1e-6)
    to_w, to_gate = jax.grad(lambda w, g: jnp.sum(c * gated(w, g, active)), (0, 1))(
        w, gate
    )
    np.testing.assert_array_equal(to_w, np.where(active, c, 0))
    np.testing.assert_allclose(to_gate, c * w, rtol=1e-6)
    _, tangent = jax.jvp(lambda w: straight_through(w, active), (w,), (dw,))
    np.testing.assert_array_equal(tangent, dw)


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.dnw({"conv": 3}), "n_active has no layer fc; name it, or"),
        (
            lambda: methods.dnw({**ACTIVE, "f": 1}),
            "n_active names f, which has no mask; the sparse layers are conv, fc",
        ),
        (
            lambda: methods.dnw({"conv": 3, "fc": 31}),
            "n_active: layer fc has 30 weights, not 31; give a number from 0 to",
        ),
        (
            lambda: methods.top_kast(ACTIVE, {"conv": 16, "fc": 11}),
            "n_active_backward: layer conv has 16 weights, fewer than the 17 forward",
        ),
        (
            lambda: methods.top_kast(ACTIVE, {"conv": 17, "fc": 31}),
            "n_active_backward: layer fc has 30 weights, not 31",
        ),
        (
            lambda: methods.top_kast(ACTIVE, BACKWARD, -1.0),
            r"penalty_scale=-1.0: give 0 or more",
        ),
        (
            lambda: methods.magnitude_ste(ACTIVE, "all"),
            "scope='all': give layer or global",
        ),
    ],
)
def test_wrong_arguments_are_rejected(make, message, monkeypatch):
    # Off, for the test run's own type checks reject the names as well.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        started(make(), network())
