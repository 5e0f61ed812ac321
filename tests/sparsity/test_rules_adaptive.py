"""SNFS and DSR against numpy, written from the papers' algorithms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from uniformity import p_value_uniform

from lottery_flow.sparsity import rules_adaptive as lib
from lottery_flow.sparsity import schedules

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
ALWAYS = schedules.every(1)
SHAPES = {"a": (6, 10), "b": (4, 5, 3), "c": (20, 10)}
allocate = jit(lib.allocate)


def best(scores, k, where):
    """The k best entries by a sort; ties by the lower index."""
    order = np.argsort(np.where(where, -scores, np.inf).ravel(), kind="stable")
    chosen = np.zeros(scores.size, bool)
    chosen[order[:k]] = True
    return chosen.reshape(scores.shape)


def share_out(total, share, room):
    """Cumulated shares rounded down, then one by one, whoever has got least more."""
    total = min(total, sum(room))
    bounds = np.floor(total * np.cumsum(share) / np.sum(share) + 1e-9).astype(int)
    quota = np.diff(np.concatenate([[0], bounds[:-1], [total]]))
    given, more = np.minimum(quota, room), np.zeros(len(room), int)
    while (given + more).sum() < total:
        open_ = np.flatnonzero(given + more < room)
        more[open_[np.argmin(more[open_])]] += 1
    return given + more


def network(seed, dtype=jnp.float32, densities=(0.3, 0.5, 0.2)):
    rng = np.random.default_rng(seed)
    masks = {
        k: rng.random(s) < d
        for (k, s), d in zip(SHAPES.items(), densities, strict=True)
    }
    weights = {
        k: jnp.asarray(np.where(m, rng.standard_normal(m.shape), 0), dtype)
        for k, m in masks.items()
    }
    momenta = {
        k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()
    }
    masks = {k: jnp.asarray(m) for k, m in masks.items()}
    return masks, weights, momenta


def numpy_(tree):
    return {k: np.asarray(x).astype(np.float64) for k, x in tree.items()}


def total(masks):
    return sum(int(m.sum()) for m in masks.values())


# Sharing out


@pytest.mark.parametrize(
    ("n", "share", "room", "expected"),
    [
        (6, (1, 2, 3), (9, 9, 9), (1, 2, 3)),
        (7, (1, 1, 1), (9, 9, 9), (2, 2, 3)),  # 2.33, 4.67 and 7, rounded down
        (10, (8, 1, 1), (3, 9, 9), (3, 4, 3)),  # 5 are left: two each, and one
        (10, (1, 0, 0), (4, 3, 9), (4, 3, 3)),
        (10, (5, 1, 1), (1, 2, 3), (1, 2, 3)),
        (0, (0, 0, 0), (1, 2, 3), (0, 0, 0)),
    ],
)
def test_allocate_by_hand(n, share, room, expected):
    given_ = allocate(jnp.int32(n), jnp.asarray(share, jnp.float32), jnp.asarray(room))
    assert tuple(given_.tolist()) == expected


_four = functools.partial(st.lists, min_size=4, max_size=4)


@given(st.integers(0, 400), _four(st.integers(1, 9)), _four(st.integers(0, 120)))
def test_allocate_gives_exactly_the_total_or_the_whole_room(n, share, room):
    args = jnp.int32(n), jnp.asarray(share, jnp.float32), jnp.asarray(room)
    n_each = np.asarray(allocate(*args))
    assert n_each.sum() == min(n, sum(room))
    assert (n_each <= room).all()
    quota = n * np.array(share) / sum(share)
    if (quota + 1 <= room).all():
        assert (np.abs(n_each - quota) < 1).all()
    assert ((n_each == room) | (n_each > quota - 1)).all()
    if n <= sum(room):
        np.testing.assert_array_equal(n_each, share_out(n, share, room))


def test_allocate_is_exact_whatever_float32_rounds():
    share = jnp.asarray([1e-8, 0.1, 0.7, 1e8, 0.3], jnp.float32)
    room = jnp.full(5, 2**28, jnp.int32)
    n_each = allocate(jnp.int32(2**30 + 1), share, room)
    assert np.asarray(n_each, np.int64).sum() == 2**30 + 1
    assert (n_each >= 0).all()


# SNFS


def snfs_oracle(masks, weights, momenta, fraction):
    sizes = np.array([m.size for m in masks.values()])
    n_active = np.array([int(m.sum()) for m in masks.values()])
    free = sizes - n_active
    means = np.array([np.abs(momenta[k])[m].mean() for k, m in masks.items()])
    share = means / means.sum()
    f = np.full(len(sizes), fraction)
    dense = (free < 0.2 * sizes) & (share > 1 / len(sizes))
    f[dense] = np.minimum(fraction, (free / sizes)[dense])
    n_drop = np.floor(np.float32(f) * np.float32(n_active)).astype(int)
    n_keep = n_active - n_drop
    room = np.floor(0.99 * (free + n_drop)).astype(int)
    n_grow = share_out(n_drop.sum(), share, room)
    new = {}
    for (k, m), keep, more in zip(masks.items(), n_keep, n_grow, strict=True):
        kept = best(np.abs(weights[k]), keep, np.asarray(m))
        new[k] = kept | best(np.abs(momenta[k]), more, ~kept)
    return new


SNFS = lib.snfs(ALWAYS, schedules.constant(0.4))
snfs_step = jit(SNFS.propose)


@pytest.mark.parametrize(
    ("densities", "scales"),
    [
        ((0.3, 0.5, 0.2), (1, 1, 1)),
        ((0.3, 0.5, 0.2), (1, 30, 1)),  # b meets its cap
        ((0.9, 0.5, 0.2), (5, 1, 1)),  # a is nearly dense and grows
        ((0.9, 0.5, 0.2), (0.1, 1, 1)),  # a is nearly dense and shrinks
        ((0.99, 0.97, 0.9), (1, 1, 3)),
    ],
)
def test_snfs_equals_the_oracle(densities, scales):
    masks, weights, momenta = network(0, densities=densities)
    scaled = zip(momenta.items(), scales, strict=True)
    momenta = {k: m * s for (k, m), s in scaled}
    args = masks, weights, weights, momenta
    new, state = snfs_step(0, jax.random.key(0), *args)
    expected = snfs_oracle(masks, numpy_(weights), numpy_(momenta), 0.4)
    for k in SHAPES:
        np.testing.assert_array_equal(new[k], expected[k])
        np.testing.assert_array_equal(state[k], momenta[k])
    assert total(new) == total(masks)
    assert any(new[k].sum() != masks[k].sum() for k in SHAPES)


def test_snfs_by_hand():
    masks = {"a": jnp.array([True, True, False, False, False, False]), "b": None}
    masks["c"] = jnp.array([True, True, True, True, False, False, False])
    weights = {
        "a": jnp.array([1.0, 3.0, 0, 0, 0, 0]),
        "b": jnp.ones(3),
        "c": jnp.array([4.0, -1.0, 0.5, 2.0, 0, 0, 0]),
    }
    momenta = {
        "a": jnp.array([3.0, 3.0, 1.0, -9.0, 0.0, 2.0]),  # mean of the active: 3
        "b": None,
        "c": jnp.array([1.0, 1.0, -1.0, 1.0, 0.5, 7.0, 6.0]),  # 1
    }
    rule = lib.snfs(ALWAYS, schedules.constant(0.5))
    new, _ = jit(rule.propose)(0, jax.random.key(0), masks, weights, weights, momenta)
    # Dropped: 1 and 2. Of the 3, floor(3 x 3/4) = 2 go to a and 1 to c.
    assert np.flatnonzero(new["a"]).tolist() == [0, 1, 3]
    assert np.flatnonzero(new["c"]).tolist() == [0, 3, 5]
    assert new["b"] is None


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_without_a_usable_momentum_each_layer_grows_what_it_dropped(bad):
    masks, weights, momenta = network(1)
    momenta = {k: jnp.full_like(m, bad) for k, m in momenta.items()}
    new, _ = snfs_step(0, jax.random.key(0), masks, weights, weights, momenta)
    for k, m in masks.items():
        assert new[k].sum() == m.sum()


def test_snfs_without_redistribution_grows_by_momentum_layer_by_layer():
    masks, weights, momenta = network(2)
    rule = lib.snfs(ALWAYS, schedules.constant(0.4), redistribute=False)
    new, _ = jit(rule.propose)(0, jax.random.key(0), masks, weights, weights, momenta)
    for k, m in masks.items():
        n, n_drop = int(m.sum()), int(np.float32(m.sum()) * np.float32(0.4))
        kept = best(np.abs(np.asarray(weights[k])), n - n_drop, np.asarray(m))
        grown = best(np.abs(np.asarray(momenta[k])), n_drop, ~kept)
        np.testing.assert_array_equal(new[k], kept | grown)


def test_the_momentum_is_a_moving_average_of_dense_gradients():
    masks, weights, _ = network(3, jnp.bfloat16)
    masks["b"] = None
    rule = lib.snfs(ALWAYS, schedules.constant(0.4), decay=0.75)
    state, expected = rule.init(masks, weights), {"a": 0.0, "c": 0.0}
    observe = jit(rule.observe)
    for seed in range(3):
        grads = network(seed, jnp.bfloat16, (1, 1, 1))[1]
        state = observe(state, grads)
        for k in expected:
            expected[k] = 0.75 * expected[k] + 0.25 * numpy_(grads)[k]
    assert state["b"] is None
    for k, value in expected.items():
        assert state[k].dtype == jnp.float32
        np.testing.assert_allclose(state[k], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_snfs_refuses_a_decay(decay):
    with pytest.raises(ValueError, match="decay="):
        lib.snfs(ALWAYS, schedules.constant(0.4), decay=decay)


# DSR


DSR = lib.dsr(ALWAYS, n_prune=10, threshold=0.5)
dsr_step = jit(DSR.propose)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dsr_prunes_below_the_threshold_and_grows_in_proportion(dtype):
    masks, weights, _ = network(4, dtype)
    state = DSR.init(masks, weights)
    new, _ = dsr_step(0, jax.random.key(3), masks, weights, weights, state)
    kept = {
        k: np.asarray(m) & (np.abs(numpy_(weights)[k]) >= 0.5) for k, m in masks.items()
    }
    n_pruned = total(masks) - total(kept)
    room = [int((~m).sum()) for m in masks.values()]
    n_grow = share_out(n_pruned, [int(m.sum()) for m in kept.values()], room)
    assert total(new) == total(masks)
    for (k, m), n in zip(masks.items(), n_grow, strict=True):
        born = np.asarray(new[k]) & ~kept[k]
        np.testing.assert_array_equal(np.asarray(new[k]) & np.asarray(m), kept[k])
        assert born.sum() == n > 0


def line(n_small, n_free=200):
    """One layer: 30 weights of 1, some of 0.1, and free places."""
    w = np.concatenate([np.ones(30), np.full(n_small, 0.1), np.zeros(n_free - n_small)])
    return {"w": jnp.asarray(w != 0)}, {"w": jnp.asarray(w, jnp.float32)}


@pytest.mark.parametrize(
    ("n_small", "factor"), [(0, 2), (8, 2), (9, 1), (10, 1), (11, 1), (12, 0.5)]
)
def test_the_threshold_doubles_and_halves(n_small, factor):
    masks, weights = line(n_small)
    args = masks, weights, weights, jnp.float32(0.3)
    new, state = dsr_step(0, jax.random.key(0), *args)
    assert float(state) == np.float32(0.3) * np.float32(factor)
    assert state.dtype == jnp.float32
    assert new["w"].sum() == 30 + n_small
    assert not new["w"][30 : 30 + n_small].any()


def test_without_room_dsr_loses_what_has_no_place():
    masks, weights = line(12, n_free=15)
    args = masks, weights, weights, jnp.float32(0.3)
    new, _ = dsr_step(0, jax.random.key(0), *args)
    assert np.flatnonzero(new["w"]).tolist() == [*range(30), 42, 43, 44]


def test_dsr_grows_uniformly_over_the_places_inactive_before():
    masks, weights = line(3, n_free=20)
    step = functools.partial(DSR.propose, jnp.int32(0))
    keys = jax.random.split(jax.random.key(7), 400)
    args = masks, weights, weights, jnp.float32(0.3)
    new, _ = jit(jax.vmap(lambda key: step(key, *args)))(keys)
    assert p_value_uniform(np.asarray(new["w"])[:, 33:], 3) > 1e-3


def test_a_layer_that_lost_everything_gets_nothing():
    masks, weights, _ = network(5)
    weights["a"] = weights["a"] * 1e-3
    new, _ = dsr_step(0, jax.random.key(0), masks, weights, weights, jnp.float32(0.1))
    assert not new["a"].any()
    assert total(new) == total(masks)


@pytest.mark.parametrize("change", [{"n_prune": 0}, {"n_prune": 3, "threshold": 0.0}])
def test_dsr_refuses(change):
    with pytest.raises(ValueError, match=r"n_prune=0|threshold=0"):
        lib.dsr(ALWAYS, **change)


@pytest.mark.parametrize("rule", [SNFS, DSR])
def test_counts_that_int32_cannot_hold_are_refused(rule):
    masks = {k: jax.ShapeDtypeStruct((2**15, 2**15), bool) for k in "ab"}
    with pytest.raises(ValueError, match="2\\^31"):
        rule.init(masks, masks)


@pytest.mark.parametrize("rule", [SNFS, DSR])
def test_a_dense_network_stays_dense(rule):
    masks, params = {"w": None}, {"w": jnp.ones(3)}
    state = rule.init(masks, params)
    assert rule.propose(0, jax.random.key(0), masks, params, params, state)[0] == masks
