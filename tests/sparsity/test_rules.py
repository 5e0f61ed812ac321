"""Criteria and rules against a sort on the host, written from the paper's code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from uniformity import p_value_uniform

from lottery_flow.sparsity import criteria, rules, schedules

SHAPE = (3, 8)
SIZE = 24
TIED = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0)
LENET5 = {
    "conv1": (5, 5, 1, 6),
    "conv2": (5, 5, 6, 16),
    "dense1": (256, 120),
    "dense2": (120, 84),
    "dense3": (84, 10),
}

drop_grow = jax.jit(rules.drop_grow)
always = schedules.every(1)


def descending(scores):
    """Indices by descending score; ties by the lower index."""
    return np.argsort(-scores, kind="stable")


def oracle(mask, weights, grow, fraction, inactive_drop_score=-1.0):
    """Drop by |w|, grow by score: the five points of the official code.

    There an inactive weight enters the drop with score 0, so that it may take the
    place of an active weight that is zero; here it never does.
    """
    m, w, g = (np.asarray(x).ravel() for x in (mask, weights, grow))
    n_ones = int(m.sum())
    n_prune = int(np.float32(n_ones) * np.float32(fraction))
    score = np.where(m, np.abs(w), inactive_drop_score)
    kept = np.zeros(m.size, bool)
    kept[descending(score)[: n_ones - n_prune]] = True
    lifted = np.where(kept, g.min() - 1, g)
    grown = np.zeros(m.size, bool)
    grown[descending(lifted)[:n_prune]] = True
    return (kept | grown).reshape(np.shape(mask))


def arrays(values):
    elements = st.lists(st.sampled_from(values), min_size=SIZE, max_size=SIZE)
    return elements.map(lambda xs: np.array(xs, np.float32).reshape(SHAPE))


masks_ = arrays((False, True)).map(lambda m: m.astype(bool))
fractions = st.sampled_from((0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0))


def propose(rule, masks, weights, grads, step=0, key=0):
    new, _ = jax.jit(rule.propose)(step, jax.random.key(key), masks, weights, grads, ())
    return new


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [1.0, 2.0, 0.0]),
        ("gradient", [3.0, 0.5, 4.0]),
        ("inverted_gradient", [-3.0, -0.5, -4.0]),
        ("saliency", [3.0, 1.0, 0.0]),
    ],
)
def test_criteria(name, expected):
    weights, grads = jnp.array([-1.0, 2.0, 0.0]), jnp.array([3.0, -0.5, -4.0])
    scores = criteria.CRITERIA[name](jax.random.key(0), weights, grads)
    assert scores.tolist() == expected


def test_the_random_criterion_hardly_ties_in_bfloat16():
    weights = jnp.zeros((40, 50), jnp.bfloat16)
    scores = criteria.random(jax.random.key(0), weights, weights)
    assert scores.shape == (40, 50)
    assert np.unique(scores).size > 1990
    assert (scores != criteria.random(jax.random.key(1), weights, weights)).any()


# drop_grow


@given(masks_, arrays(TIED), arrays(TIED), fractions)
def test_drop_grow_equals_the_oracle(mask, weights, grow, fraction):
    """Ties are broken by the lower flat index, for dropping and for growing."""
    new = drop_grow(mask, np.abs(weights), grow, fraction)
    np.testing.assert_array_equal(new, oracle(mask, weights, grow, fraction))


@given(masks_, arrays(TIED), arrays(TIED), fractions)
def test_drop_grow_equals_the_official_code_but_for_active_zeros(
    mask, weights, grow, fraction
):
    n_keep = mask.sum() - int(np.float32(mask.sum()) * np.float32(fraction))
    assume((weights[mask] != 0).sum() >= n_keep)
    new = drop_grow(mask, np.abs(weights), grow, fraction)
    np.testing.assert_array_equal(new, oracle(mask, weights, grow, fraction, 0.0))


@given(masks_, arrays((*TIED, np.nan, np.inf)), st.floats(0, 1, width=32))
def test_the_result_has_exactly_as_many_active_weights_as_mask(mask, scores, fraction):
    new = drop_grow(mask, scores, -scores, fraction)
    assert new.sum() == mask.sum()


def test_drop_grow_by_hand():
    mask = jnp.array([True, True, False, True, False, True])
    drop = jnp.array([5.0, 1.0, 9.0, 2.0, 9.0, 3.0])
    grow = jnp.array([9.0, 7.0, 1.0, 0.0, 8.0, 9.0])
    new = drop_grow(mask, drop, grow, 0.5)
    # Keeps 0 and 5, drops 1 and 3, grows 4 and then 1 again.
    assert new.tolist() == [True, True, False, False, True, True]


def test_a_dropped_weight_is_eligible_for_growth():
    mask = jnp.array([True, True, False, False])
    new = drop_grow(mask, jnp.array([2.0, 1.0, 0, 0]), jnp.array([0, 1.0, 0, 0]), 0.5)
    assert new.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("n_active", "fraction", "n_drop"), [(100, 0.29, 29), (7, 0.3, 2)]
)
def test_n_drop_is_the_truncated_float32_product(n_active, fraction, n_drop):
    mask = jnp.arange(200) < n_active
    new = drop_grow(mask, jnp.ones(200), jnp.arange(200.0), fraction)
    assert (mask & ~new).sum() == n_drop


# Rules on trees


def test_rules_work_layer_by_layer_and_leave_dense_leaves():
    rng = np.random.default_rng(0)
    weights, grads = (
        {k: jnp.asarray(rng.standard_normal((6, 7), np.float32)) for k in "abc"}
        for _ in range(2)
    )
    masks = {
        "a": jnp.asarray(rng.random((6, 7)) < 0.5),
        "b": None,
        "c": jnp.asarray(rng.random((6, 7)) < 0.2),
    }
    new = propose(rules.rigl(always, schedules.constant(0.4)), masks, weights, grads)
    assert new["b"] is None
    for name in "ac":
        expected = oracle(masks[name], weights[name], np.abs(grads[name]), 0.4)
        np.testing.assert_array_equal(new[name], expected)


def test_the_fraction_follows_its_schedule():
    rule = rules.rigl(always, schedules.cosine(0.5, end=10))
    weights, grads = {"w": jnp.arange(1.0, 41.0)}, {"w": jnp.arange(40.0)}
    masks = {"w": jnp.arange(40) < 20}
    dropped = [
        int((masks["w"] & ~propose(rule, masks, weights, grads, t)["w"]).sum())
        for t in (0, 4, 10)
    ]
    # 20 x 0.25 (1 + cos(0.4 pi)) = 6.5
    assert dropped == [10, 6, 0]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_rigl_inverted_grows_exact_zero_gradients_in_index_order(zero):
    masks = {"w": jnp.array([False, False, True, False, True, False])}
    weights = {"w": jnp.array([0, 0, 3.0, 0, 2.0, 0])}
    grads = {"w": jnp.array([1e-30, zero, 0.0, 0.0, 5.0, zero])}
    rule = rules.rigl_inverted(always, schedules.constant(1.0))
    new = propose(rule, masks, weights, grads)["w"]
    assert new.tolist() == [False, True, True, False, False, False]


def test_a_nan_gradient_is_grown_last():
    masks = {"w": jnp.array([True, True, False, False])}
    weights = {"w": jnp.array([1.0, 2.0, 0, 0])}
    grads = {"w": jnp.array([0.0, 0.0, jnp.nan, 1e-6])}
    for make in (rules.rigl, rules.rigl_inverted):
        new = propose(make(always, schedules.constant(0.5)), masks, weights, grads)
        assert not new["w"][2]


def grown_by(rule, n_draws=2000):
    """How often each free position is grown; 5 active, the 3 weakest dropped."""
    masks = {"w": jnp.arange(20) < 5}
    weights = {"w": jnp.where(masks["w"], jnp.arange(20.0) + 1, 0.0)}
    keys = jax.random.split(jax.random.key(7), n_draws)
    one = functools.partial(rule.propose, jnp.int32(0))
    many = jax.jit(jax.vmap(lambda key: one(key, masks, weights, weights, ())))
    new = np.asarray(many(keys)[0]["w"])
    assert new[:, 3:5].all()  # the two largest stay
    return np.delete(new, [3, 4], axis=1)


def test_set_grows_uniformly_over_all_positions_not_kept():
    rule = rules.set_(always, schedules.constant(0.6))
    assert p_value_uniform(grown_by(rule), 3) > 1e-3


def test_the_test_of_uniformity_rejects_a_slight_bias():
    def biased(key, weights, grads):
        return criteria.random(key, weights, grads) + jnp.where(weights > 0, 0.1, 0.0)

    rule = rules.drop_and_grow(always, schedules.constant(0.6), grow=biased)
    assert p_value_uniform(grown_by(rule), 3) < 1e-6


def test_set_draws_differ_by_key_and_layer():
    masks = {k: jnp.arange(400) < 200 for k in "ab"}
    weights = {k: jnp.ones(400) for k in "ab"}
    rule = rules.set_(always, schedules.constant(0.5))
    first, again, other = (
        propose(rule, masks, weights, weights, key=k) for k in (0, 0, 1)
    )
    assert (first["a"] == again["a"]).all()
    assert (first["a"] != other["a"]).any()
    assert (first["a"] != first["b"]).any()


# Static and gradual pruning


def test_static_is_never_due_and_keeps_the_masks():
    rule = rules.static()
    assert not rule.is_due(jnp.arange(100, dtype=jnp.int32)).any()
    masks = {"w": jnp.array([True, False])}
    new, _ = rule.propose(jnp.int32(0), jax.random.key(0), masks, masks, masks, ())
    assert new is masks


def lenet5_pruning(**changes):
    arguments = dict(begin=3000, end=7000, interval=100)
    final = dict.fromkeys(LENET5, 0.95)
    return rules.gradual_pruning(**{**arguments, "final_sparsity": final, **changes})


def test_gradual_pruning_of_lenet5():
    rng = np.random.default_rng(0)
    masks = {k: jnp.ones(s, bool) for k, s in LENET5.items()}
    weights = {k: jnp.asarray(rng.random(s, np.float32)) for k, s in LENET5.items()}
    step = jax.jit(functools.partial(propose, lenet5_pruning()), static_argnames="key")
    for t in (3000, 3100, 4000, 5000, 7000):
        masks = step(masks, weights, weights, t)
        sparsity = 0.95 * (1 - (1 - (t - 3000) / 4000) ** 3)
        for name, w in weights.items():
            kept = np.zeros(w.size, bool)
            n = max(round(w.size * (1 - sparsity)), 1)
            kept[descending(np.ravel(w))[:n]] = True
            np.testing.assert_array_equal(masks[name].ravel(), kept)
    assert [int(m.sum()) for m in masks.values()] == [8, 120, 1536, 504, 42]


@pytest.mark.parametrize(
    ("size", "sparsity", "step", "kept"),
    [
        (5, 0.5, 7000, 2),
        (7, 0.5, 7000, 4),
        (3, 1.0, 7000, 1),
        (49688, 0.95, 3100, 46235),
    ],
)
def test_gradual_pruning_rounds_half_to_even_in_float64(size, sparsity, step, kept):
    """To one weight at least; in float32 the last of these counts is 46236."""
    rule = lenet5_pruning(final_sparsity={"w": sparsity})
    w = {"w": jnp.arange(1.0, size + 1)}
    new = propose(rule, {"w": jnp.ones(size, bool)}, w, w, step)
    assert new["w"].sum() == kept


def test_pruned_weights_never_return():
    rule = rules.gradual_pruning(begin=1, end=5, interval=1, final_sparsity={"w": 0.8})
    rng = np.random.default_rng(0)
    mask = {"w": jnp.ones((5, 9), bool)}
    for t in range(1, 6):
        w = {"w": jnp.asarray(rng.standard_normal((5, 9), np.float32))}
        new = propose(rule, mask, w, w, t)
        assert not (new["w"] & ~mask["w"]).any()
        mask = new
    assert mask["w"].sum() == 9


def test_gradual_pruning_is_due_from_begin_to_end():
    flags = lenet5_pruning().is_due(jnp.arange(12000, dtype=jnp.int32))
    assert np.flatnonzero(flags).tolist() == list(range(3000, 7001, 100))
