"""sparsify(): its arguments, its errors, and how it compiles.

The promises that hold for every optimizer and rule are in test_transform_table.py.
"""

import functools

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules, schedules
from lottery_flow.sparsity.transform import SparseState, rewire_network, sparsify

EVERY = 3
TIMES = schedules.every(EVERY), schedules.constant(0.5)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
RIGL = rules.rigl(*TIMES)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 6), "b": (6, 5), "bias": (5,), "head": (5, 3)}
    return {
        k: jnp.asarray(rng.standard_normal(s, np.float32)) for k, s in shapes.items()
    }


def start(rule=RIGL, inner=MOMENTUM, n_active=10, seed=0):
    params = random_tree(seed)
    masks = masks_lib.random(jax.random.key(seed), params, {"a": n_active, "b": 12})
    params = masks_lib.apply(masks, params)
    tx = sparsify(inner, masks, rule, key=jax.random.key(5))
    return tx, params, tx.init(params)


def step(update, n, state, params, **kwargs):
    updates, state = update(random_tree(100 + n), state, params, **kwargs)
    return optax.apply_updates(params, updates), state


def assert_same(a, b):
    """Masks and counters equal; the rest up to the rounding of two programs."""
    chex.assert_trees_all_equal(a[1].masks, b[1].masks)
    chex.assert_trees_all_equal(a[1].step, b[1].step)
    chex.assert_trees_all_close(a[0], b[0], rtol=1e-6)
    chex.assert_trees_all_close(a[1].inner_state, b[1].inner_state, rtol=1e-6)


def drop_grow(mask, weights, grads):
    """Half of the weights, by a sort on the host."""
    m, w, g = (np.ravel(x) for x in (mask, weights, grads))
    n_drop = int(m.sum() * 0.5)
    kept = np.zeros(m.size, bool)
    kept[np.argsort(np.where(m, -np.abs(w), 1.0))[: m.sum() - n_drop]] = True
    new = kept.copy()
    new[np.argsort(np.where(kept, 1.0, -np.abs(g)))[:n_drop]] = True
    return new.reshape(np.shape(mask))


# Who decides on a rewire


def test_is_rewire_counts_the_updates_before():
    after, instead = RIGL, RIGL._replace(timing="instead")
    n = np.arange(8)
    assert np.flatnonzero(rules.is_rewire(after, n)).tolist() == [2, 5]
    assert np.flatnonzero(rules.is_rewire(instead, n)).tolist() == [0, 3, 6]


@pytest.mark.parametrize("rule", [RIGL, rules.set_(*TIMES, timing="instead")])
def test_a_rewire_decided_on_the_host_gives_the_same_trajectory(rule):
    tx, params, state = start(rule)
    update = jit(tx.update, static_argnames="rewire")
    on_host = on_device = params, state
    for n in range(2 * EVERY + 1):
        rewire = bool(rules.is_rewire(rule, n))
        on_host = step(update, n, *reversed(on_host), rewire=rewire)
        on_device = step(update, n, *reversed(on_device))
        assert_same(on_host, on_device)
    assert (on_host[1].masks["a"] != state.masks["a"]).any()


def test_rewire_network_equals_the_branch_inside_update():
    tx, params, state = start()
    update = jit(tx.update, static_argnames="rewire")
    rewire = jit(rewire_network, static_argnums=(0, 1))
    params, state = step(update, 0, state, params, rewire=False)
    kept = step(update, 1, state, params, rewire=False)
    inside = step(update, 1, state, params, rewire=True)
    outside = rewire(RIGL, MOMENTUM, kept[1], kept[0], random_tree(101))
    assert outside[1].step == kept[1].step == inside[1].step
    assert (inside[1].masks["a"] != state.masks["a"]).any()
    assert_same(outside, inside)


@pytest.mark.parametrize("timing", ["after", "instead"])
def test_grow_grad_fn_runs_in_rewires_alone_and_decides_growth(timing):
    rule = rules.rigl(*TIMES, timing=timing)
    tx, params, state = start(rule)
    grow_grads, calls = random_tree(77), []

    def grow_grad_fn(weights):
        jax.debug.callback(lambda w: calls.append(np.asarray(w)), weights["a"])
        return grow_grads

    update = jit(functools.partial(tx.update, grow_grad_fn=grow_grad_fn))
    plain = jit(functools.partial(tx.update, rewire=False))
    n_rewires = 0
    for n in range(2 * EVERY + 1):
        stepped, _ = step(plain, n, state, params)
        old_params, old = params, state
        params, state = step(update, n, old, old_params)
        jax.effects_barrier()
        n_rewires += bool(rules.is_rewire(rule, n))
        assert len(calls) == n_rewires
        if rules.is_rewire(rule, n):
            weights = stepped if timing == "after" else old_params
            np.testing.assert_allclose(calls[-1], weights["a"], rtol=1e-6)
            for name in "ab":
                new = drop_grow(old.masks[name], weights[name], grow_grads[name])
                np.testing.assert_array_equal(state.masks[name], new)
    assert n_rewires == {"after": 2, "instead": 3}[timing]


def test_without_grow_grad_fn_the_rewire_sees_the_dense_gradient():
    tx, params, state = start()
    update = jit(tx.update, static_argnames="rewire")
    plain, _ = step(update, 0, state, params, rewire=False)
    _, rewired = step(update, 0, state, params, rewire=True)
    new = drop_grow(state.masks["a"], plain["a"], random_tree(100)["a"])
    np.testing.assert_array_equal(rewired.masks["a"], new)


def test_the_rule_observes_every_dense_gradient_and_keeps_its_state():
    def propose(step, key, masks, params, grads, state):
        return masks, state + 1000

    rule = RIGL._replace(
        init=lambda masks, params: jnp.float32(0),
        observe=lambda state, grads: state + grads["a"].sum(),
        propose=propose,
    )
    tx, params, state = start(rule)
    update, expected = jit(tx.update), 0.0
    for n in range(2 * EVERY):
        params, state = step(update, n, state, params)
        expected += random_tree(100 + n)["a"].sum() + 1000 * (n % EVERY == EVERY - 1)
        np.testing.assert_allclose(state.rule_state, expected, rtol=1e-5)


def test_every_rewire_draws_anew():
    tx, params, state = start(rules.set_(*TIMES))
    update = jit(tx.update, static_argnames="rewire")
    later = state._replace(step=state.step + 1)
    masks = [step(update, 0, s, params, rewire=True)[1].masks for s in (state, later)]
    assert (masks[0]["a"] != masks[1]["a"]).any()


# The inner optimizer


@pytest.mark.parametrize("inner", [MOMENTUM, optax.adam(0.1)])
def test_a_static_rule_on_full_masks_is_the_plain_optimizer_bit_for_bit(inner):
    params = random_tree(0)
    masks = masks_lib.full(params, {"a": 24, "b": 30})
    tx = sparsify(inner, masks, rules.static(), key=jax.random.key(0))
    sparse, plain = (params, tx.init(params)), (params, inner.init(params))
    # Op by op: two different programs may round differently.
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        for n in range(3):
            sparse = step(tx.update, n, *reversed(sparse), rewire=False)
            plain = step(inner.update, n, *reversed(plain))
    chex.assert_trees_all_equal(sparse[0], plain[0])
    chex.assert_trees_all_equal(sparse[1].inner_state, plain[1])


def test_the_inner_optimizer_sees_masked_gradients_and_other_arguments():
    def update(grads, state, params, *, factor):
        return jax.tree.map(lambda g: factor * g, grads), grads

    inner = optax.GradientTransformationExtraArgs(lambda params: params, update)
    tx, params, state = start(rules.static(), inner)
    grads = random_tree(1)
    updates, new = tx.update(grads, state, params, factor=2.0)
    seen = jnp.where(state.masks["a"], grads["a"], 0.0)
    np.testing.assert_array_equal(new.inner_state["a"], seen)
    np.testing.assert_array_equal(new.inner_state["head"], grads["head"])
    np.testing.assert_array_equal(updates["bias"], 2 * grads["bias"])


@pytest.mark.parametrize("rule", [rules.static(), RIGL])
def test_a_nan_gradient_at_an_inactive_weight_does_no_harm(rule):
    tx, params, state = start(rule)
    grads = random_tree(1)
    poisoned = {
        k: jnp.where(state.masks[k], g, jnp.nan) if k in "ab" else g
        for k, g in grads.items()
    }
    update = jit(tx.update, static_argnames="rewire")
    for rewire in (False, True):
        updates, new = update(poisoned, state, params, rewire=rewire)
        chex.assert_tree_all_finite((updates, new.inner_state))
    clean, _ = update(grads, state, params, rewire=False)
    updates, _ = update(poisoned, state, params, rewire=False)
    chex.assert_trees_all_equal(updates, clean)


@pytest.mark.parametrize("inner", [optax.adafactor(0.01), optax.novograd(0.01)])
def test_slots_that_are_not_of_the_shape_of_the_parameters(inner):
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        tx, params, state = start(inner=inner)
        update = jit(tx.update)
        for n in range(EVERY + 1):
            params, state = step(update, n, state, params)
            assert masks_lib.counts(state.masks, params) == {
                "a": 10,
                "b": 12,
                "head": 15,
            }
            assert not params["a"][~state.masks["a"]].any()


@pytest.mark.parametrize("timing", ["after", "instead"])
def test_parameters_that_were_not_masked_land_on_zero_at_the_first_step(timing):
    _, _, state = start()
    params = random_tree(0)
    tx = sparsify(
        MOMENTUM, state.masks, rules.rigl(*TIMES, timing=timing), key=jax.random.key(0)
    )
    update = jit(tx.update, static_argnames="rewire")
    for rewire in (False, True):
        new_params, new = step(update, 0, tx.init(params), params, rewire=rewire)
        for name in "ab":
            assert not new_params[name][~(new.masks[name] & state.masks[name])].any()


# Compilation


def test_steps_and_rewires_compile_once():
    tx, params, state = start()
    update = jit(chex.assert_max_traces(tx.update, n=1))
    for n in range(2 * EVERY):
        params, state = step(update, n, state, params)


def primitives(jaxpr, *, inside_cond):
    """Names of all primitives, nested ones too, outside of conds or inside."""
    names = []
    for eqn in jaxpr.eqns:
        # A choice of platform is no branch: one of them is compiled.
        is_platform = eqn.params.get("branches_platforms") is not None
        is_cond = eqn.primitive.name == "cond" and not is_platform
        names += [] if inside_cond or is_platform else [eqn.primitive.name]
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            if not is_cond:
                names += primitives(sub, inside_cond=inside_cond)
            elif inside_cond:
                names += primitives(sub, inside_cond=False)
    return names


@pytest.mark.parametrize("step_axis", [None, 0])
def test_members_rewire_in_a_branch_if_their_step_is_not_batched(step_axis):
    members = [start(seed=seed) for seed in range(3)]
    params, state = jax.tree.map(lambda *xs: jnp.stack(xs), *(m[1:] for m in members))
    if step_axis is None:
        state = state._replace(step=members[0][2].step)
    axes = SparseState(step_axis, 0, 0, 0, 0)
    update = jax.vmap(members[0][0].update, in_axes=(0, axes, 0), out_axes=(0, axes))
    grads = jax.tree.map(lambda x: jnp.ones_like(x), params)
    jaxpr = jax.make_jaxpr(update)(grads, state, params).jaxpr
    loops = {"scan", "while"}
    outside = set(primitives(jaxpr, inside_cond=False))
    inside = set(primitives(jaxpr, inside_cond=True))
    assert ("cond" in outside) == (step_axis is None)
    assert bool(outside & loops) == (step_axis == 0)
    assert bool(inside & loops) == (step_axis is None)


def test_masks_that_do_not_fit_raise_naming_the_layer():
    params = random_tree(0)
    masks = masks_lib.full({**params, "b": jnp.ones((2, 2))}, {"b": 4})
    tx = sparsify(MOMENTUM, masks, RIGL, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"layer b has shape \(6, 5\), its mask bool"):
        tx.init(params)


def test_update_without_params_raises():
    tx, params, state = start()
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, state)
