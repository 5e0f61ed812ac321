"""Hard concrete gates: their law, their mean and their expected number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.l0_parameterization import l0_hard_concrete

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
DRAWS = 4000
LOG_ALPHAS = np.linspace(-4, 4, 15).astype(np.float32)
STEP = jnp.int32(0)


def layer(theta, log_alpha, **options):
    p = l0_hard_concrete(**{"l0_scale": 1.0} | options)

    def leaf(x):
        return {"fc": {"kernel": jnp.asarray(np.reshape(x, (3, 5)), jnp.float32)}}

    params = leaf(theta)
    raw = p.init(jax.random.key(0), params, masks_lib.full(params, {"fc": 0}))
    return p, raw._replace(sparse={**raw.sparse, "log_alpha": leaf(log_alpha)})


def gates(**options):
    """Draws of every gate: the weights where theta is one."""
    p, raw = layer(np.ones(15), LOG_ALPHAS, **options)
    keys = jax.random.split(jax.random.key(7), DRAWS)
    run = jax.jit(jax.vmap(lambda key, raw: p.weights(raw, key, True), (0, None)))
    return p, raw, np.asarray(run(keys, raw)["fc"]["kernel"]).reshape(DRAWS, 15)


@pytest.fixture(scope="module")
def drawn():
    return gates()


def test_range_of_gates(drawn):
    z = drawn[2]
    assert z.min() == 0
    assert z.max() == 1
    between = (z > 0) & (z < 1)
    for at_end in (z == 0, z == 1, between):
        assert at_end.any(axis=0).all()  # of every gate


@pytest.mark.parametrize("ends", [(BETA, GAMMA, ZETA), (0.5, -0.3, 1.2)])
def test_expected_number_of_active_weights(ends, drawn):
    """The penalty against draws, gate by gate; neighbouring formulas are rejected."""
    beta, gamma, zeta = ends
    p, raw, z = drawn if beta == BETA else gates(beta=beta, gamma=gamma, zeta=zeta)
    active = (z > 0).mean(axis=0)

    def worst(offset):
        probability = special.expit(LOG_ALPHAS - offset)
        error = np.sqrt(probability * (1 - probability) / DRAWS)
        return (np.abs(active - probability) / error).max()

    offset = beta * np.log(-gamma / zeta)
    assert worst(offset) < 5
    assert worst(1.3 * offset) > 5
    assert worst(0.7 * offset) > 5
    assert worst(np.log(-gamma / zeta)) > 5
    expected = special.expit(LOG_ALPHAS - offset).sum()
    np.testing.assert_allclose(p.penalty(raw, STEP), expected, rtol=1e-5)


def test_mean_of_gates(drawn):
    """Against the integral over the uniform noise behind the logistic one."""
    u = (np.arange(100_000) + 0.5) / 100_000
    y = special.expit((special.logit(u)[:, None] + LOG_ALPHAS) / BETA)
    z = np.clip(y * (ZETA - GAMMA) + GAMMA, 0, 1)
    error = z.std(axis=0) / DRAWS**0.5
    found = drawn[2].mean(axis=0)
    assert (np.abs(found - z.mean(axis=0)) / error).max() < 5
    unstretched = special.expit((special.logit(u)[:, None] + LOG_ALPHAS) / BETA)
    assert (np.abs(found - unstretched.mean(axis=0)) / error).max() > 5


def test_gates_are_independent(drawn):
    inner = np.corrcoef(drawn[2].T) - np.eye(15)
    assert np.abs(inner).max() < 5 / DRAWS**0.5


def test_evaluation_takes_the_deterministic_gate():
    theta = np.random.default_rng(0).normal(size=15)
    p, raw = layer(theta, LOG_ALPHAS)
    gate = np.clip(special.expit(LOG_ALPHAS) * (ZETA - GAMMA) + GAMMA, 0, 1)
    assert (gate == 0).any()
    assert (gate == 1).any()
    shown = np.asarray(p.weights(raw, None, False)["fc"]["kernel"]).ravel()
    np.testing.assert_allclose(shown, theta * gate, rtol=1e-5)
    np.testing.assert_array_equal(p.masks(raw)["fc"]["kernel"].ravel(), gate > 0)
    assert not shown[gate == 0].view(np.uint32).any()


def test_gradients_of_a_draw():
    """Through the gate where it is inside (0, 1), to the weight where it is open."""
    theta = np.random.default_rng(1).normal(size=15)
    p, raw = layer(theta, LOG_ALPHAS)

    @jax.jit
    def run(raw, key):
        def shown(raw):
            return p.weights(raw, key, True)["fc"]["kernel"]

        return shown(raw), jax.grad(lambda raw: jnp.sum(shown(raw)))(raw)

    seen = set()
    for i in range(5):
        weights, grads = run(raw, jax.random.key(i))
        z = np.asarray(weights).ravel() / theta
        np.testing.assert_allclose(
            np.ravel(grads.sparse["theta"]["fc"]["kernel"]), z, rtol=1e-5
        )
        inside = (z > 0) & (z < 1 - 1e-6)
        y = (z - GAMMA) / (ZETA - GAMMA)
        slope = np.where(inside, (ZETA - GAMMA) * y * (1 - y) / BETA, 0)
        np.testing.assert_allclose(
            np.ravel(grads.sparse["log_alpha"]["fc"]["kernel"]),
            theta * slope,
            rtol=1e-3,
            atol=1e-6,
        )
        seen |= {"zero"} if (z == 0).any() else set()
        seen |= {"inside"} if inside.any() else set()
    assert seen == {"zero", "inside"}


def test_penalty_scale_and_warm_up():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    p, raw = layer(np.ones(15), LOG_ALPHAS, l0_scale=0.1, warmup=schedule)
    penalty_fn = jax.jit(p.penalty)
    whole = layer(np.ones(15), LOG_ALPHAS)[0].penalty(raw, STEP)
    for step, factor in ((0, 0.0), (5, 0.5), (20, 1.0)):
        found = penalty_fn(raw, jnp.int32(step))
        np.testing.assert_allclose(found, 0.1 * factor * whole, rtol=1e-6)


def test_gates_start_near_nine_tenths():
    p = l0_hard_concrete(l0_scale=1.0)
    params = {"fc": {"kernel": jnp.ones((40, 50))}}
    raw = p.init(jax.random.key(0), params, masks_lib.full(params, {"fc": 0}))
    log_alpha = np.asarray(raw.sparse["log_alpha"]["fc"]["kernel"])
    assert abs(log_alpha.mean() - np.log(0.9 / 0.1)) < 2e-3
    assert abs(log_alpha.std() / 0.01 - 1) < 5 / 4000**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0_scale": -0.1}, "l0_scale=-0.1: give 0 or more"),
        ({"beta": 0.0}, "beta=0.0, gamma=-0.1, zeta=1.1: give beta > 0, gamma < 0"),
        ({"gamma": 0.0}, "gamma=0.0, zeta=1.1: give beta > 0, gamma < 0 and"),
        ({"zeta": 1.0}, "zeta=1.0: give beta > 0, gamma < 0 and zeta > 1"),
    ],
)
def test_wrong_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        l0_hard_concrete(**{"l0_scale": 1.0} | options)
