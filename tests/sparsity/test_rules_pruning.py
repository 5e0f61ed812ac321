"""Global gradual pruning and Han's pruning against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery_flow.sparsity import rules_pruning as lib
from lottery_flow.sparsity import schedules

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
SHAPES = {"a": (5, 9), "b": (3, 2, 4), "c": (7, 11)}
TIMES = dict(begin=10, end=20, interval=5)


def draw(seed, dtype=jnp.float32, decimals=9):
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(np.round(rng.standard_normal(s), decimals), dtype)
        for k, s in SHAPES.items()
    }


def full(names="abc"):
    return {k: jnp.ones(SHAPES[k], bool) if k in names else None for k in SHAPES}


def stepper(rule):
    def step(t, masks, weights):
        return rule.propose(t, jax.random.key(0), masks, weights, weights, ())[0]

    return jit(step)


def wide(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize(
    ("dtype", "decimals"),
    [(jnp.float32, 9), (jnp.bfloat16, 9), (jnp.float32, 0)],
    ids=["float32", "bfloat16", "ties"],
)
def test_global_pruning_keeps_the_largest_of_all_layers(dtype, decimals):
    """Exactly as many as the schedule says; ties go to the earlier layer and index."""
    rule = lib.global_gradual_pruning(**TIMES, final_sparsity=0.9, initial_sparsity=0.2)
    step, masks = stepper(rule), full("ac")
    alive = np.ones(45 + 77, bool)
    for t, left in ((10, 1.0), (15, 0.125), (20, 0.0)):
        weights = draw(t, dtype, decimals)
        masks = step(t, masks, weights)
        flat = np.concatenate([np.abs(wide(weights[k])).ravel() for k in "ac"])
        n = round(122 * (1 - (0.9 + (0.2 - 0.9) * left)))
        order = np.argsort(np.where(alive, -flat, 1.0), kind="stable")
        alive = np.isin(np.arange(122), order[:n])
        np.testing.assert_array_equal(masks["a"].ravel(), alive[:45])
        np.testing.assert_array_equal(masks["c"].ravel(), alive[45:])
        assert masks["b"] is None
    assert alive.sum() == 12


def test_global_pruning_ranks_layers_of_different_dtypes_and_scales():
    weights = draw(0) | {"b": draw(1, jnp.bfloat16)["b"] * 100}
    rule = lib.global_gradual_pruning(**TIMES, final_sparsity=1 - 20 / 146)
    masks = stepper(rule)(20, full(), weights)
    assert [int(masks[k].sum()) for k in "abc"] == [0, 20, 0]


def test_global_pruning_to_nothing_leaves_one_weight():
    rule = lib.global_gradual_pruning(**TIMES, final_sparsity=1.0)
    masks = stepper(rule)(20, full(), draw(0))
    assert sum(int(m.sum()) for m in masks.values()) == 1


def test_global_pruning_leaves_a_dense_network():
    rule = lib.global_gradual_pruning(**TIMES, final_sparsity=0.5)
    assert stepper(rule)(20, full(""), draw(0)) == full("")


def test_global_pruning_is_due_from_begin_to_end():
    rule = lib.global_gradual_pruning(**TIMES, final_sparsity=0.5)
    assert np.flatnonzero(rule.is_due(np.arange(40))).tolist() == [10, 15, 20]


@pytest.mark.parametrize("name", ["final_sparsity", "initial_sparsity"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_global_pruning_refuses_a_sparsity(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        lib.global_gradual_pruning(**TIMES, **{"final_sparsity": 0.5, name: value})


# Han et al.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_han_pruning_by_the_deviation_of_the_active_weights(dtype):
    quality = {"a": 0.5, "c": 1.5}
    step = stepper(lib.han_pruning(schedules.every(5), quality))
    masks, alive = full("ac"), {k: np.ones(SHAPES[k], bool) for k in "ac"}
    for t in (5, 10):
        weights = {k: w + jnp.ones((), dtype) for k, w in draw(t, dtype).items()}
        masks = step(t, masks, weights)
        for k, q in quality.items():
            w = wide(weights[k])
            alive[k] = alive[k] & (np.abs(w) >= q * w[alive[k]].std())
            np.testing.assert_array_equal(masks[k], alive[k])
            assert 0 < alive[k].sum() < w.size
        assert masks["b"] is None


def test_han_pruning_by_hand():
    masks = {"w": jnp.array([True, True, True, True, False])}
    weights = {"w": jnp.array([1.0, -1.0, 3.0, -3.0, 0.0])}
    # The mean is 0, the variance 5: 1 < 0.5 x 2.236 = 1.118 < 3.
    rule = lib.han_pruning(schedules.every(1), 0.5)
    new = rule.propose(1, jax.random.key(0), masks, weights, weights, ())[0]
    assert new["w"].tolist() == [False, False, True, True, False]


def test_a_weight_on_the_threshold_stays_and_an_empty_layer_is_no_error():
    rule = lib.han_pruning(schedules.every(1), 1.0)
    weights = {"v": jnp.array([2.0, -2.0]), "w": jnp.zeros(3)}
    masks = {"v": jnp.ones(2, bool), "w": jnp.zeros(3, bool)}
    new = rule.propose(1, jax.random.key(0), masks, weights, weights, ())[0]
    assert new["v"].all()
    assert not new["w"].any()


def test_han_pruning_refuses():
    with pytest.raises(ValueError, match="quality of a is -1"):
        lib.han_pruning(schedules.every(1), {"a": -1.0})
    rule = lib.han_pruning(schedules.every(1), {"a": 1.0})
    with pytest.raises(ValueError, match="quality has no layer c"):
        stepper(rule)(5, full("ac"), draw(0))
