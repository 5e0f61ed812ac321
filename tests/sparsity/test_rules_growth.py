"""Grown values: where newly grown weights start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules, schedules
from lottery_flow.sparsity.rules_growth import with_grown
from lottery_flow.sparsity.transform import rewire_network, sparsify

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
TIMES = schedules.every(1), schedules.constant(0.5)
RIGL = rules.rigl(*TIMES)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
SHAPES = {"a": (40, 50), "b": (30, 20), "head": (5, 3)}


def draw(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in SHAPES.items()}


def start(rule, dtype=jnp.float32):
    params = draw(0, dtype)
    masks = masks_lib.random(jax.random.key(0), params, {"a": 800, "b": 200})
    params = masks_lib.apply(masks, params)
    params["b"] = params["b"] * jnp.asarray(3, dtype)
    tx = sparsify(MOMENTUM, masks, rule, key=jax.random.key(5))
    return tx, params, tx.init(params)


def bits(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def active(tree, masks, layer):
    return np.asarray(tree[layer])[np.asarray(masks[layer])]


def values_of(name, divisor=1.0, dtype=jnp.float32):
    """(values, masks, parameters they are made of, gradients), before a rewire."""
    rule = with_grown(RIGL, name, divisor)
    _, params, state = start(rule, dtype)
    now, grads = masks_lib.apply(state.masks, draw(3, dtype)), draw(1, dtype)
    trees = state.masks, state.masks, now, grads, state.rule_state
    values = rule.grown(jax.random.key(0), jnp.int32(4), *trees)
    assert values["head"] is None
    return values, state.masks, params if name == "initial_dist" else now, grads


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("divisor", [1.0, -4.0])
def test_gradient_values(dtype, divisor):
    for name, fn in (("grad_scale", lambda g: g), ("grad_sign", np.sign)):
        values, _, _, grads = values_of(name, divisor, dtype)
        for k in "ab":
            g = np.asarray(grads[k])
            expected = (fn(g) / np.asarray(divisor, g.dtype)).astype(g.dtype)
            np.testing.assert_array_equal(bits(values[k]), bits(expected))


@pytest.mark.parametrize(
    ("divisor", "dtype"), [(1.0, jnp.float32), (4.0, jnp.bfloat16)]
)
def test_random_values_have_the_moments_of_the_active_weights(divisor, dtype):
    normal, masks, params, _ = values_of("random_normal", divisor, dtype)
    uniform = values_of("random_uniform", divisor, dtype)[0]
    for k in "ab":
        w = active(params, masks, k).astype(np.float64)
        values, scale = np.asarray(normal[k]) * divisor, w.std()
        n = values.size
        assert abs(values.std() / scale - 1) < 4 / np.sqrt(2 * n)
        assert abs(values.mean() / scale) < 4 / np.sqrt(n)
        assert np.abs(values).max() > 2 * scale  # no uniform of this deviation
        flat, bound = np.asarray(uniform[k]) * divisor, np.abs(w).mean()
        assert 0.98 * bound < np.abs(flat).max() <= bound * (1 + 1e-6)
        assert abs((flat**2).mean() / (bound**2 / 3) - 1) < 4 * np.sqrt(0.8 / n)
        assert abs(flat.mean() / bound) < 4 / np.sqrt(3 * n)


def test_initial_values_are_those_of_the_start():
    values, masks, params, _ = values_of("initial_dist", 2.0)
    for k in "ab":
        drawn, pool = np.asarray(values[k]).ravel() * 2, active(params, masks, k)
        n = pool.size
        places = np.minimum(np.searchsorted(np.sort(pool), drawn), n - 1)
        np.testing.assert_array_equal(np.sort(pool)[places], drawn)
        # With replacement, each as often as the others.
        times = np.bincount(places, minlength=n)
        spread = ((times - drawn.size / n) ** 2).sum() / (drawn.size / n)
        assert abs(spread - (n - 1)) < 4 * np.sqrt(2 * (n - 1))


def test_layers_and_keys_draw_for_themselves():
    masks = {k: jnp.ones(100, bool) for k in "ab"}
    w = {k: jnp.arange(100.0) for k in "ab"}
    for name in ("random_normal", "random_uniform", "initial_dist"):
        rule = with_grown(RIGL, name)
        state = rule.init(masks, w)
        grown = jit(lambda key, r=rule, s=state: r.grown(key, 0, masks, masks, w, w, s))
        first, second = (grown(jax.random.key(seed)) for seed in (0, 1))
        assert (first["a"] != first["b"]).sum() > 90
        assert (first["a"] != second["a"]).sum() > 90


@pytest.mark.parametrize("name", ["random_normal", "random_uniform", "initial_dist"])
def test_a_layer_without_weights_grows_no_nan(name):
    rule, w = with_grown(RIGL, name), {"w": jnp.zeros(9)}
    masks = {"w": jnp.zeros(9, bool)}
    state = rule.init(masks, w)
    values = rule.grown(jax.random.key(0), 0, masks, masks, w, w, state)["w"]
    assert not values.any()


def test_initial_values_are_remembered_and_the_rule_keeps_its_own_state():
    counting = rules.static()._replace(
        init=lambda masks, params: jnp.int32(0),
        observe=lambda state, grads: state + 1,
        propose=lambda step, key, masks, params, grads, state: (masks, 10 * state),
    )
    rule = with_grown(counting, "initial_dist")
    _, params, start_state = start(rule)
    masks, state = start_state.masks, start_state.rule_state
    state = rule.observe(rule.observe(state, params), params)
    same, state = rule.propose(1, jax.random.key(0), masks, params, params, state)
    assert same is masks
    assert state.rule_state == 20
    for k in "ab":
        kept = state.values[k][: state.n_active[k]]
        np.testing.assert_array_equal(kept, active(params, masks, k))
    assert state.values["head"] is None


def rewire(rule, dtype=jnp.bfloat16):
    """The network before and after `rewire_network`."""
    tx, params, state = start(rule, dtype)
    fn = jit(functools.partial(rewire_network, rule, MOMENTUM))
    return tx, (params, state), fn(state, params, draw(1, dtype))


def test_grown_values_land_with_their_bits_and_their_slots_reset():
    """With timing 'instead', whose rewire sees the parameters before the step."""
    rule = with_grown(RIGL._replace(timing="instead"), "random_normal")
    tx, (params, state), (after, new) = rewire(rule)
    _, _, (plain, plain_state) = rewire(RIGL)
    ones = jax.tree.map(jnp.ones_like, state.inner_state)
    update = jit(functools.partial(tx.update, rewire=True))
    grads = draw(1, jnp.bfloat16)
    updates, landed_state = update(grads, state._replace(inner_state=ones), params)
    landed = optax.apply_updates(params, updates)
    for k in "ab":
        born = np.asarray(new.masks[k] & ~state.masks[k])
        stay = np.asarray(new.masks[k]) & ~born
        # update() and rewire_network() agree.
        np.testing.assert_array_equal(landed_state.masks[k], new.masks[k])
        np.testing.assert_array_equal(bits(landed[k]), bits(after[k]))
        assert np.asarray(after[k])[born].all()
        slots = np.asarray(landed_state.inner_state[0].trace[k])
        assert not slots[born].any()
        assert (slots[stay] == 1).all()
        # All but the grown values is as without them.
        np.testing.assert_array_equal(new.masks[k], plain_state.masks[k])
        np.testing.assert_array_equal(bits(after[k])[~born], bits(plain[k])[~born])
        assert not np.asarray(plain[k])[born].any()
    np.testing.assert_array_equal(bits(after["head"]), bits(plain["head"]))


def test_grown_values_have_a_key_of_their_own():
    seen = {}

    def propose(step, key, masks, params, grads, state):
        seen["propose"] = key
        return jax.tree.map(jnp.logical_not, masks), state

    def grown(key, step, old_masks, new_masks, params, grads, state):
        seen["grown"], seen["step"] = key, step
        assert (new_masks["w"] != old_masks["w"]).all()
        return {"w": jnp.full(4, 7.0)}

    rule = rules.Rule(TIMES[0], propose, grown=grown)
    params = {"w": jnp.array([1.0, 0, 2.0, 0])}
    masks = {"w": params["w"] != 0}
    tx = sparsify(MOMENTUM, masks, rule, key=jax.random.key(5))
    state = tx.init(params)._replace(step=jnp.int32(3))
    after, _ = rewire_network(rule, MOMENTUM, state, params, params)
    assert after["w"].tolist() == [0.0, 7.0, 0.0, 7.0]
    assert seen["step"] == 3
    assert seen["grown"] != seen["propose"]


def test_with_grown_refuses():
    with pytest.raises(ValueError, match="no grown values named 'ones'; choose zeros"):
        with_grown(RIGL, "ones")
    with pytest.raises(ValueError, match="divisor is 0"):
        with_grown(RIGL, "grad_sign", 0.0)
