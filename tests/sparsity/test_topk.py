"""topk_mask against a stable sort on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lottery_flow.sparsity import topk
from lottery_flow.sparsity.topk import topk_mask

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SHAPE = (3, 7)
SIZE = 21
# Few values, so that nearly every example has ties.
VALUES = (0.0, -0.0, 1.0, -1.0, 1.5, -2.0, np.inf, -np.inf, np.nan, -np.nan, 3e-5)
LARGEST = np.finfo(np.float32).max

topk_jit = jax.jit(topk_mask)


@jax.jit
def topk_by_bisection(scores, k, where=None):
    """What accelerators run, which no CPU would choose."""
    with pytest.MonkeyPatch.context() as patch:  # while it is traced
        patch.setattr(topk, "_radix", topk._bisection)
        return topk_mask(scores, k, where)


both_ways = pytest.mark.parametrize("select", [topk_jit, topk_by_bisection])


def oracle(scores, k, where=None):
    """Full stable sort: eligible, then not NaN, then large, then low index."""
    flat = np.asarray(scores).astype(np.float64).ravel()
    eligible = np.ones(flat.size, bool) if where is None else np.ravel(where)
    nan = np.isnan(flat)
    order = np.lexsort((np.where(nan, 0.0, -flat), nan, ~eligible))
    chosen = np.zeros(flat.size, bool)
    chosen[order[: min(max(k, 0), eligible.sum())]] = True
    return chosen.reshape(np.shape(scores))


def scores_of(dtype, values=VALUES):
    element = st.sampled_from(values) | st.floats(-100, 100).filter(
        lambda x: x == 0 or abs(x) > 1e-4
    )
    return st.lists(element, min_size=SIZE, max_size=SIZE).map(
        lambda xs: np.array(xs, np.float64).astype(dtype).reshape(SHAPE)
    )


flags = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE).map(
    lambda xs: np.array(xs).reshape(SHAPE)
)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), k=st.integers(-1, SIZE + 3))
def test_equals_a_stable_sort(select, dtype, data, k):
    scores = data.draw(scores_of(dtype))
    chosen = select(jnp.asarray(scores), jnp.int32(k))
    np.testing.assert_array_equal(chosen, oracle(scores, k))


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), where=flags, k=st.integers(-1, SIZE + 3))
def test_equals_a_stable_sort_of_the_eligible(select, dtype, data, where, k):
    scores = data.draw(scores_of(dtype))
    chosen = select(jnp.asarray(scores), jnp.int32(k), jnp.asarray(where))
    np.testing.assert_array_equal(chosen, oracle(scores, k, where))


@given(data=st.data(), where=flags, k=st.integers(0, SIZE + 3))
def test_guarantees(data, where, k):
    """Each guarantee on its own, in the words of the docstring."""
    scores = data.draw(scores_of(np.float32))
    chosen = np.asarray(topk_jit(scores, jnp.int32(k), where))
    # Exactly min(k, number of eligible entries) entries are True.
    assert chosen.sum() == min(k, where.sum())
    # No entry outside `where` is True.
    assert not chosen[~where].any()
    # No chosen score is smaller than an eligible score left out.
    rank = np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-LARGEST)
    left = where & ~chosen
    if chosen.any() and left.any():
        assert rank[chosen].min() >= rank[left].max()
    # Among equal scores the lower flat index is chosen first.
    for value in np.unique(rank[where]):
        same = (rank == value).ravel()[where.ravel()]
        picks = chosen.ravel()[where.ravel()][same]
        assert (np.sort(picks)[::-1] == picks).all()


def test_float16_denormals_keep_their_order():
    scores = np.array([0, 6e-8, 1.2e-7, -6e-8, 5.9e-5], np.float16)
    for k in range(6):
        np.testing.assert_array_equal(topk_jit(scores, jnp.int32(k)), oracle(scores, k))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_denormals_keep_their_order(dtype):
    """No chosen score is smaller than one left out, below the normal range too."""
    scores = np.array([0, 1e-40, -3e-40, 3e-40, -1e-40], np.float32).astype(dtype)
    assert (scores.astype(np.float64) != 0).sum() == 4
    for k in range(6):
        np.testing.assert_array_equal(topk_jit(scores, jnp.int32(k)), oracle(scores, k))


@both_ways
@pytest.mark.parametrize("k", [0, 1, 3, 5, 6, 9])
def test_float64(select, k):
    scores = np.array([1.0, 1.0 + 1e-12, np.nan, -np.inf, 1.0 - 1e-12, 1.0])
    where = np.array([True, True, True, True, True, False])
    with jax.enable_x64(True):
        chosen = select(jnp.asarray(scores), jnp.int32(k), jnp.asarray(where))
    np.testing.assert_array_equal(chosen, oracle(scores, k, where))


def test_nan_is_the_lowest_and_equal_to_itself():
    scores = jnp.array([-jnp.nan, -jnp.inf, jnp.nan, -3.0])
    assert topk_jit(scores, 2).tolist() == [False, True, False, True]
    assert topk_jit(scores, 3).tolist() == [True, True, False, True]


def test_minus_zero_equals_zero():
    scores = jnp.array([-0.0, 0.0, -0.0, 0.0, -1.0])
    assert topk_jit(scores, 3).tolist() == [True, True, True, False, False]


@both_ways
@pytest.mark.parametrize(
    "shape", [(1,), (1023,), (1024,), (1025,), (3, 683), (2, 2, 520)]
)
def test_ties_across_rows_go_to_the_lower_flat_index(select, shape):
    size = int(np.prod(shape))
    rng = np.random.default_rng(size)
    scores = rng.integers(0, 2, shape).astype(np.float32)
    where = rng.random(shape) < 0.8
    n = int(where.sum())
    for k in sorted({0, 1, n // 3, n - 1, n, n + 1, size}):
        chosen = select(scores, jnp.int32(k), where)
        np.testing.assert_array_equal(chosen, oracle(scores, k, where))


@pytest.mark.parametrize("k", [0, 1, 1024, 1025, 2048, 4000])
def test_only_ties(k):
    chosen = np.asarray(topk_jit(jnp.zeros(4000), jnp.int32(k)))
    assert (chosen == (np.arange(4000) < k)).all()


def test_a_scalar_and_no_entry_at_all():
    assert topk_jit(jnp.float32(2.0), 1).tolist() is True
    assert topk_jit(jnp.zeros((0, 3)), 2).shape == (0, 3)


def test_nothing_is_eligible():
    assert not topk_jit(jnp.ones(SHAPE), 2, jnp.zeros(SHAPE, bool)).any()


def test_k_may_be_traced_under_jit_and_vmap():
    rng = np.random.default_rng(0)
    scores = rng.integers(-2, 3, (6, 4, 5)).astype(np.float32)
    where = rng.random((6, 4, 5)) < 0.7
    ks = np.array([0, 1, 5, 13, 20, 25], np.int32)
    chosen = jax.jit(jax.vmap(topk_mask))(scores, ks, where)
    expected = [oracle(s, k, w) for s, k, w in zip(scores, ks, where, strict=True)]
    np.testing.assert_array_equal(chosen, expected)


LAYERS = {"a": (5, 5, 1, 6), "b": (0, 3), "c": (70, 31), "d": (), "e": (1024,)}


@both_ways
@pytest.mark.parametrize("group", [1, 2000, 1 << 22])
def test_the_arrays_of_a_tree_are_selected_each_on_its_own(select, group, monkeypatch):
    monkeypatch.setattr(topk, "_GROUP", group)
    rng = np.random.default_rng(group)
    draw = rng.standard_normal
    scores = {k: np.asarray(draw(v), np.float32) for k, v in LAYERS.items()}
    scores["c"] = np.round(scores["c"])  # ties, several rows of them
    scores["e"] = scores["e"].astype(jnp.bfloat16)
    for fraction in (0.0, 0.3, 1.0):
        ks = {k: np.int32(fraction * v.size) for k, v in scores.items()}
        where = {k: np.asarray(rng.random(v.shape) < 0.7) for k, v in scores.items()}
        jax.clear_caches()  # the group size is read while tracing
        chosen = select(scores, ks, where)
        for name, mask in chosen.items():
            expected = oracle(scores[name], ks[name], where[name])
            np.testing.assert_array_equal(mask, expected, err_msg=name)


def test_no_array_at_all():
    assert topk_mask([], []) == []


def test_the_program_has_no_sort():
    text = topk_jit.lower(jnp.zeros((300, 20)), 7).compile().as_text()
    assert "scatter" in text
    assert " sort(" not in text
    assert "TopK" not in text


def test_runs_without_jit():
    """As one does to debug."""
    with jax.disable_jit():
        assert topk_mask(jnp.array([1.0, 3.0, 2.0]), 2).tolist() == [False, True, True]


def test_counts_beyond_the_integers_of_float32():
    """2^24 + 3 ones, which float32 takes for 2^24 + 4."""
    scores = np.ones(2**24 + 6, np.float32)
    scores[[4, 7, 9]] = 0.0
    chosen = np.asarray(topk_jit(scores, jnp.int32(2**24 + 4)))
    assert np.flatnonzero(~chosen).tolist() == [7, 9]


def test_where_must_have_the_shape_of_the_scores():
    with pytest.raises(ValueError, match=r"where has shape \(3,\), scores \(2, 3\)"):
        topk_mask(jnp.zeros((2, 3)), 1, jnp.ones(3, bool))
