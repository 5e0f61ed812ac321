"""One round of pruning, against sorting on the host."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery_flow.sparsity import ticket_masks
from lottery_flow.sparsity.ticket_masks import prune_round

SHAPES = {"a": (2, 3, 5), "b": (6, 10), "c": (10, 4)}
RATES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.99)


def tree(arrays):
    return {k: {"bias": None, "kernel": jnp.asarray(v)} for k, v in arrays.items()} | {
        "dense": {"kernel": None}
    }


def kernels(masks):
    return {k: np.asarray(masks[k]["kernel"]) for k in SHAPES}


def example(seed):
    """Masks of about two thirds, and scores with many ties."""
    rng = np.random.default_rng(seed)
    masks = {k: rng.random(shape) < 0.66 for k, shape in SHAPES.items()}
    scores = {
        k: rng.integers(-4, 5, shape).astype(np.float32) for k, shape in SHAPES.items()
    }
    return masks, scores


def keep_best(score, mask, n_keep):
    """A stable sort of the active ones: high first, then low index."""
    order = np.lexsort((-score.ravel(), ~mask.ravel()))
    kept = np.zeros(mask.size, bool)
    kept[order[:n_keep]] = True
    return kept.reshape(mask.shape)


def n_kept(n, rate):
    percent = round(100 * rate)  # the decimal that is written
    return n - n * percent // 100


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), rate=st.sampled_from(RATES))
def test_a_round_by_layer_equals_a_stable_sort(seed, rate):
    masks, scores = example(seed)
    new = kernels(prune_round(tree(masks), tree(scores), rate))
    for k, mask in masks.items():
        expected = keep_best(scores[k], mask, n_kept(mask.sum(), rate))
        np.testing.assert_array_equal(new[k], expected)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), rate=st.sampled_from(RATES))
def test_a_global_round_equals_a_stable_sort_of_everything(seed, rate):
    masks, scores = example(seed)
    new = kernels(prune_round(tree(masks), tree(scores), rate, scope="global"))
    flat = [np.concatenate([x.ravel() for x in d.values()]) for d in (scores, masks)]
    expected = keep_best(*flat, n_kept(flat[1].sum(), rate))
    found = np.concatenate([new[k].ravel() for k in SHAPES])
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_layers_with_a_rate_of_their_own_are_ranked_alone(seed):
    masks, scores = example(seed)
    both = {}
    for scope in ("layer", "global"):
        both[scope] = kernels(
            prune_round(
                tree(masks), tree(scores), 0.5, scope=scope, layer_rates={"b": 0.1}
            )
        )
        expected = keep_best(scores["b"], masks["b"], n_kept(masks["b"].sum(), 0.1))
        np.testing.assert_array_equal(both[scope]["b"], expected)
    n = masks["a"].sum() + masks["c"].sum()
    assert both["global"]["a"].sum() + both["global"]["c"].sum() == n_kept(n, 0.5)
    assert both["layer"]["a"].sum() == n_kept(masks["a"].sum(), 0.5)


def test_pruned_weights_never_return_and_their_scores_are_not_read():
    masks, scores = example(1)
    for k in SHAPES:
        scores[k] = np.where(masks[k], scores[k], np.float32(np.inf))
    for scope in ("layer", "global"):
        new = kernels(prune_round(tree(masks), tree(scores), 0.3, scope=scope))
        for k in SHAPES:
            assert not (new[k] & ~masks[k]).any()


@pytest.mark.parametrize(("rate", "n_left"), [(0.1, 27), (0.29, 22), (0.7, 9)])
def test_a_rate_means_the_decimal_that_is_written(rate, n_left):
    # In binary 1 - 0.9 is below 0.1, and 0.7 * 30 below 21.
    scores = {"w": jnp.arange(30, dtype=jnp.float32).reshape(5, 6)}
    ones = {"w": jnp.ones((5, 6), bool)}
    assert int(prune_round(ones, scores, rate)["w"].sum()) == n_left


def test_a_global_round_can_empty_a_layer():
    masks = {"a": jnp.ones((2, 2), bool), "b": jnp.ones((2, 2), bool)}
    scores = {"a": jnp.full((2, 2), -1.0), "b": jnp.ones((2, 2))}
    new = prune_round(masks, scores, 0.5, scope="global")
    assert not new["a"].any()
    assert new["b"].all()


def test_scores_of_different_dtypes_are_ranked_together():
    masks = {"a": jnp.ones((1, 2), bool), "b": jnp.ones((1, 2), bool)}
    scores = {
        "a": jnp.array([[1, 4]], jnp.bfloat16),
        "b": jnp.array([[3, 2]], jnp.float32),
    }
    new = prune_round(masks, scores, 0.5, scope="global")
    assert new["a"].tolist() == [[False, True]]
    assert new["b"].tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, r"rate=1\.0: give a fraction in \[0, 1\)"),
        ({"rate": -0.1}, r"rate=-0\.1"),
        ({"layer_rates": {"z": 0.1}}, "no masked layer z; they are a, b, c"),
        ({"layer_rates": {"dense": 0.1}}, "no masked layer dense"),
        ({"layer_rates": {"a": 1.5}}, r"layer_rates of a=1\.5"),
    ],
)
def test_errors(options, message):
    masks, scores = example(0)
    with pytest.raises(ValueError, match=message):
        prune_round(tree(masks), tree(scores), **{"rate": 0.2} | options)


def test_an_unknown_scope():
    masks, _ = example(0)
    with pytest.raises(ValueError, match="scope='network': give layer or global"):
        ticket_masks.check_round(tree(masks), 0.2, "network", None)


@pytest.mark.parametrize(
    ("sparsity", "rate", "expected"),
    [
        (0.0, 0.2, 0),
        (0.2, 0.2, 1),
        (0.2001, 0.2, 2),
        (0.36, 0.2, 2),
        (0.75, 0.5, 2),
        (0.99, 0.9, 2),  # in binary (1 - 0.9)^2 is above 1 - 0.99
        (0.95, 0.2, 14),  # 0.8^13 = 0.055, 0.8^14 = 0.044
    ],
)
def test_rounds_to_a_sparsity(sparsity, rate, expected):
    assert ticket_masks.rounds_to(sparsity, rate) == expected


def test_densities():
    assert ticket_masks.densities(3, 0.2) == [1.0, 0.8, 0.64, 0.512]


def test_a_rate_of_zero_never_arrives():
    assert ticket_masks.rounds_to(0.0, 0.0) == 0
    with pytest.raises(ValueError, match="rate=0 never reaches"):
        ticket_masks.rounds_to(0.5, 0.0)
    with pytest.raises(ValueError, match=r"sparsity=1\.0"):
        ticket_masks.rounds_to(1.0, 0.5)
