"""Training the values of a parameterization: the promises of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import reparameterize
from lottery_flow.sparsity.parameterizations import PARAMETERIZATIONS

PARAMS = {
    "fc1": {"kernel": (6, 5), "bias": (5,)},
    "fc2": {"kernel": (5, 3)},  # stays dense
}


@pytest.fixture(autouse=True)
def _promotion():
    """optax's Adam mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start(name, **options):
    keys = iter(jax.random.split(jax.random.key(0), 5))
    params = jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    masks = masks_lib.full(params, {"fc1": None})
    parameterization = PARAMETERIZATIONS[name](**options)
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1))
    params, state = reparameterize.init(
        parameterization, inner, params, masks, key=jax.random.key(1)
    )
    return parameterization, inner, params, state


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dnw", {"n_active": {"fc1": 7}}),
        ("edge_popup", {"n_active": {"fc1": 7}}),
        ("str", {"init": -1.0}),
        ("variational_dropout", {"kl_scale": 0.01}),
    ],
)
def test_parameters_follow_from_the_raw_values(name, options):
    parameterization, inner, params, state = start(name, **options)
    x = jax.random.normal(jax.random.key(2), (20, 6))

    @jax.jit
    def step(state):
        def loss(raw):
            p = parameterization.weights(raw, jax.random.key(3), True)
            hidden = jnp.tanh(x @ p["fc1"]["kernel"] + p["fc1"]["bias"][None])
            return jnp.mean(jnp.square(hidden @ p["fc2"]["kernel"] - 1.0))

        grads = jax.grad(loss)(state.rule_state)
        return reparameterize.update(parameterization, inner, grads, state)

    first = params
    for n in range(4):
        wanted = parameterization.weights(state.rule_state, None, False)
        assert bits(params) == bits(wanted)
        mask = np.asarray(state.masks["fc1"]["kernel"])
        assert not np.any(np.asarray(params["fc1"]["kernel"])[~mask])
        assert int(state.step) == n
        assert [int(c) for _, c in optax.tree.get_all_with_path(state, "count")] == [n]
        params, state = step(state)
    moves = parameterization.trained(state.rule_state).dense["fc2"]["kernel"]
    assert (bits(first["fc2"]) != bits(params["fc2"])) == moves


def test_what_is_not_trained_keeps_its_bits_whatever_the_optimizer():
    """Even where its gradient is not a number, and everything decays."""
    parameterization, inner, _, state = start("edge_popup", n_active={"fc1": 7})
    trained = parameterization.trained(state.rule_state)
    grads = jax.tree.map(
        lambda t, v: jnp.full_like(v, 1.0 if t else jnp.nan), trained, state.rule_state
    )
    _, after = reparameterize.update(parameterization, inner, grads, state)
    pairs = zip(
        jax.tree.leaves(trained),
        bits(state.rule_state),
        bits(after.rule_state),
        strict=True,
    )
    for moves, old, new in pairs:
        assert (old != new) == moves
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.inner_state))
