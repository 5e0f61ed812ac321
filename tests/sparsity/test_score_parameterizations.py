"""Edge-popup and supermasks: gradients of scores by hand, draws by their laws."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from scipy import special, stats

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import score_parameterizations as methods

ACTIVE = {"conv": 30, "fc": 200}


def network(n=20):
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 2, 4, 5)), jnp.float32)},
        "fc": {
            "kernel": jnp.asarray(rng.normal(size=(50, n)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=n), jnp.float32),
        },
    }


def started(p, params, seed=0):
    masks = masks_lib.full(params, {"conv": 0, "fc": 0})
    return jax.jit(p.init)(jax.random.key(seed), params, masks)


def targets(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )


def grads_of(p, raw, key, aims):
    """Gradients of half their squared distance from the targets."""

    def loss(raw):
        terms = jax.tree.map(
            lambda w, t: 0.5 * jnp.sum((w - t) ** 2), p.weights(raw, key, True), aims
        )
        return sum(jax.tree.leaves(terms))

    return jax.grad(loss)(raw)


# Edge-popup


@pytest.fixture(scope="module")
def popup():
    p, params = methods.edge_popup(ACTIVE, weights="given"), network()
    run = jax.jit(lambda raw, aims: grads_of(p, raw, None, aims))
    return p, params, started(p, params), run


def test_gradient_of_a_score_is_its_sign_times_the_weight_and_its_gradient(popup):
    _, params, raw, run = popup
    aims = targets(params)
    grads = run(raw, aims)
    for layer, n in ACTIVE.items():
        w = np.asarray(params[layer]["kernel"])
        s = np.asarray(raw.sparse["scores"][layer]["kernel"])
        top = np.sort(np.abs(s).ravel())[-n:]
        shown = np.where(np.abs(s) >= top[0], w, 0)
        dense = shown - np.asarray(aims[layer]["kernel"])
        assert (s < 0).any()
        np.testing.assert_allclose(
            grads.sparse["scores"][layer]["kernel"], np.sign(s) * w * dense, rtol=1e-5
        )
        assert not grads.sparse["weights"][layer]["kernel"].any()


def test_a_score_moves_away_from_zero_where_its_weight_helps(popup):
    """Negative ones too: what ranks is the size."""
    _, params, raw, run = popup
    aims = jax.tree.map(lambda w: 2.0 * w, params)  # every weight should be active
    grads = run(raw, aims).sparse["scores"]
    for layer in ACTIVE:
        s = np.asarray(raw.sparse["scores"][layer]["kernel"])
        assert (np.sign(-grads[layer]["kernel"]) == np.sign(s)).all()


def test_an_optimizer_that_heeds_trained_leaves_the_weights_untouched(popup):
    p, params, raw, run = popup
    # Decay of everything: the frozen values would move.
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    grads = run(raw, targets(params))
    updates, _ = jax.jit(tx.update)(grads, tx.init(raw), raw)
    assert updates.sparse["weights"]["fc"]["kernel"].all()
    updates = jax.tree.map(
        lambda moves, u: u if moves else jnp.zeros_like(u), p.trained(raw), updates
    )
    after = optax.apply_updates(raw, updates)
    for layer in ACTIVE:
        np.testing.assert_array_equal(
            after.sparse["weights"][layer]["kernel"], params[layer]["kernel"]
        )
        old, new = (x.sparse["scores"][layer]["kernel"] for x in (raw, after))
        assert (old != new).all()
    np.testing.assert_array_equal(after.dense["fc"]["bias"], params["fc"]["bias"])


def test_scores_start_uniform(popup):
    scores = popup[2].sparse["scores"]
    for layer, fan_in in (("conv", 24), ("fc", 50)):
        s = np.asarray(scores[layer]["kernel"]).ravel() * fan_in**0.5
        assert np.abs(s).max() <= 1 + 1e-6
        law = stats.uniform(-1, 2)
        assert stats.kstest(s, law.cdf).pvalue > 1e-3
        assert stats.kstest(1.3 * s, law.cdf).pvalue < 0.05


@pytest.mark.parametrize("scale_fan", [False, True])
def test_signed_constants(scale_fan):
    params = network()
    raw = started(methods.edge_popup(ACTIVE, scale_fan=scale_fan), params)
    for layer, fan_in in (("conv", 24), ("fc", 50)):
        w = np.asarray(raw.sparse["weights"][layer]["kernel"])
        density = ACTIVE[layer] / w.size if scale_fan else 1.0
        std = (2 / (fan_in * density)) ** 0.5
        np.testing.assert_allclose(np.abs(w), std, rtol=1e-6)
        n_positive = int((w > 0).sum())
        assert abs(n_positive - w.size / 2) < 5 * (w.size / 4) ** 0.5
        s = np.asarray(raw.sparse["scores"][layer]["kernel"])
        assert abs(np.corrcoef(s.ravel(), w.ravel())[0, 1]) < 5 / w.size**0.5


def test_kaiming_normal_weights():
    raw = started(methods.edge_popup(ACTIVE, weights="kaiming_normal"), network(400))
    z = np.asarray(raw.sparse["weights"]["fc"]["kernel"]).ravel() * (50 / 2) ** 0.5
    assert stats.kstest(z, stats.norm.cdf).pvalue > 1e-3
    assert stats.kstest(1.1 * z, stats.norm.cdf).pvalue < 1e-3


# Supermask


def with_logits(p, params):
    """Logits from -3 to 3, some of them exactly zero."""
    raw = started(p, params)
    rng = np.random.default_rng(2)
    logits = jax.tree.map(
        lambda w: jnp.asarray(np.round(rng.uniform(-3, 3, w.shape), 1), w.dtype),
        raw.sparse["logits"],
    )
    return raw._replace(sparse={**raw.sparse, "logits": logits})


def test_frequency_of_every_weight():
    """Within 5 standard errors of sigmoid(logit), and of no shifted one."""
    p, params = methods.supermask(), network()
    raw, draws = with_logits(p, params), 2000
    keys = jax.random.split(jax.random.key(3), draws)

    @jax.jit
    def mean(raw):
        shown = jax.vmap(lambda key: p.weights(raw, key, True))(keys)
        return jax.tree.map(lambda w: jnp.mean(w != 0, axis=0), shown)

    frequency = mean(raw)
    for layer in ACTIVE:
        logits = np.asarray(raw.sparse["logits"][layer]["kernel"])
        found = np.asarray(frequency[layer]["kernel"])

        def worst(shift, logits=logits, found=found):
            prob = special.expit(logits + shift)
            error = np.sqrt(prob * (1 - prob) / draws)
            return (np.abs(found - prob) / error).max()

        assert worst(0.0) < 5
        assert worst(0.3) > 5
        assert worst(-0.3) > 5


@pytest.mark.parametrize("rescale", [False, True])
def test_gradient_of_a_logit_is_that_of_its_probability(rescale):
    p, params = methods.supermask(rescale=rescale), network()
    raw, key, aims = with_logits(p, params), jax.random.key(4), targets(params)
    shown = jax.jit(lambda raw: p.weights(raw, key, True))(raw)
    grads = jax.jit(lambda raw: grads_of(p, raw, key, aims))(raw)
    for layer in ACTIVE:
        w = np.asarray(params[layer]["kernel"])
        found = np.asarray(shown[layer]["kernel"])
        scale = w.size / (found != 0).sum() if rescale else 1.0
        np.testing.assert_allclose(found, np.where(found != 0, scale * w, 0), rtol=1e-6)
        prob = special.expit(np.asarray(raw.sparse["logits"][layer]["kernel"]))
        expected = prob * (1 - prob) * scale * w * (found - aims[layer]["kernel"])
        np.testing.assert_allclose(
            grads.sparse["logits"][layer]["kernel"], expected, rtol=1e-4, atol=1e-6
        )
        assert not grads.sparse["weights"][layer]["kernel"].any()


@pytest.mark.parametrize("rescale", [False, True])
def test_evaluation_keeps_logits_of_zero_or_more(rescale):
    p, params = methods.supermask(rescale=rescale), network()
    raw = with_logits(p, params)
    shown, masks = p.weights(raw, None, False), p.masks(raw)
    for layer in ACTIVE:
        logits = np.asarray(raw.sparse["logits"][layer]["kernel"])
        assert (logits == 0).any()
        np.testing.assert_array_equal(masks[layer]["kernel"], logits >= 0)
        scale = logits.size / (logits >= 0).sum() if rescale else 1.0
        np.testing.assert_allclose(
            shown[layer]["kernel"],
            np.where(logits >= 0, scale * np.asarray(params[layer]["kernel"]), 0),
            rtol=1e-6,
        )
    every = p.masks(started(p, params))  # of logits that start at zero
    assert all(mask.all() for mask in jax.tree.leaves(every))


def test_an_empty_supermask_is_zero_when_rescaled():
    p = methods.supermask(init=-1.0, rescale=True)
    shown = p.weights(started(p, network()), None, False)
    assert not jnp.any(shown["fc"]["kernel"])


def test_signed_constants_of_a_supermask():
    params = network()
    raw = started(methods.supermask(weights="signed_constant"), params)
    for layer in ACTIVE:
        w = np.asarray(params[layer]["kernel"])
        np.testing.assert_allclose(
            raw.sparse["weights"][layer]["kernel"], np.sign(w) * w.std(), rtol=1e-5
        )


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.edge_popup({"conv": 3}), "n_active has no layer fc"),
        (
            lambda: methods.edge_popup(ACTIVE, weights="ones"),
            "weights='ones': give signed_kaiming_constant, kaiming_normal or given",
        ),
        (
            lambda: methods.edge_popup(ACTIVE, weights="given", scale_fan=True),
            "scale_fan=True scales weights that are drawn; write False",
        ),
        (
            lambda: methods.supermask(weights="ones"),
            "weights='ones': give given or signed_constant",
        ),
    ],
)
def test_wrong_arguments_are_rejected(make, message, monkeypatch):
    # Off, for the test run's own type checks reject the names as well.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        started(make(), network())
