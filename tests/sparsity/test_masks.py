"""Masks: creation, bookkeeping and storage."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from uniformity import p_value_uniform

from lottery_flow.sparsity import masks as masks_lib

DRAWS = 2000


def params(dtype=jnp.float32):
    return {
        "block": {"conv1": {"kernel": jnp.ones((2, 2, 3, 4), dtype)}},
        "dense": {"bias": jnp.ones(5, dtype), "kernel": jnp.ones((6, 5), dtype)},
        "norm": {"scale": jnp.ones(4, dtype)},
        "table": jnp.ones((3, 2), dtype),
    }


def two_masks():
    return {
        "a": {"bias": None, "kernel": jnp.array([[True, True], [False, False]])},
        "b": {"bias": None, "kernel": jnp.array([[True, False, False]])},
        "c": {"bias": None, "kernel": None},
    }


def two_params():
    return {
        "a": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))},
        "b": {"bias": jnp.zeros(3), "kernel": jnp.zeros((1, 3))},
        "c": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))},
    }


# Names


def test_layers_are_named_by_their_path_without_kernel():
    assert list(masks_lib.layers(params())) == ["block/conv1", "dense", "table"]


def test_layers_are_floating_and_have_two_dimensions():
    tree = {"ids": jnp.ones((2, 2), jnp.int32), "w": jnp.ones((2, 2)), "v": jnp.ones(3)}
    assert list(masks_lib.layers(tree)) == ["w"]


def test_embeddings_are_no_layers():
    tree = {"position_embedding": jnp.ones((4, 3)), "fc": {"kernel": jnp.ones((3, 2))}}
    assert list(masks_lib.layers(tree)) == ["fc"]
    expected = {"position_embedding": False, "fc": {"kernel": True}}
    assert masks_lib.in_layers(tree) == expected
    assert masks_lib.in_layers(jax.eval_shape(lambda: tree)) == expected


def test_layers_take_shapes_and_a_choice_of_their_own():
    shapes = jax.eval_shape(params)
    assert masks_lib.layers(shapes)["dense"].shape == (6, 5)
    chosen = masks_lib.layers(shapes, lambda name, leaf: name.endswith("bias"))
    assert list(chosen) == ["dense/bias"]


def test_named_leaves_keep_none():
    named = masks_lib.named_leaves(two_masks())
    assert list(named) == ["a/bias", "a", "b/bias", "b", "c/bias", "c"]
    assert named["a/bias"] is None
    assert named["c"] is None


def test_tree_leaves_at_the_masks():
    leaves = masks_lib.tree_leaves_at(two_masks(), two_params())
    assert [leaf.shape for leaf in leaves] == [(2, 2), (1, 3)]


# apply


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_inactive_entries_are_exactly_zero_also_at_nan_or_inf(dtype):
    mask = {"w": jnp.array([[False, False], [False, True]]), "b": None}
    tree = {
        "w": jnp.array([[jnp.nan, jnp.inf], [-jnp.inf, 2.0]], dtype),
        "b": jnp.array([jnp.nan], dtype),
    }
    out = masks_lib.apply(mask, tree)
    assert out["w"].dtype == dtype
    assert np.asarray(out["w"]).tobytes() == np.array([0, 0, 0, 2], dtype).tobytes()


def test_apply_active_entries_and_dense_leaves_keep_their_bits():
    # A NaN with a payload, a minus zero, a denormal.
    bits = np.array([[0x7FC01234, 0x80000000], [1, 0x3F800001]], np.uint32)
    leaf = jnp.asarray(bits.view(np.float32))
    out = masks_lib.apply(
        {"w": jnp.ones((2, 2), bool), "b": None}, dict(w=leaf, b=leaf)
    )
    for name in ("w", "b"):
        np.testing.assert_array_equal(np.asarray(out[name]).view(np.uint32), bits)


def test_the_gradient_through_apply_is_masked_without_nan():
    mask = {"w": jnp.array([True, False])}
    grads = jax.grad(lambda w: masks_lib.apply(mask, {"w": jnp.log(w)})["w"].sum())(
        jnp.array([2.0, 1.0])
    )
    assert grads.tolist() == [0.5, 0.0]


# Creation


def test_dense_has_no_mask():
    assert jax.tree.leaves(masks_lib.dense(params())) == []


def test_full_masks_the_named_layers_only():
    masks = masks_lib.named_leaves(masks_lib.full(params(), {"dense": 0}))
    assert masks.pop("dense").all()
    assert set(masks.values()) == {None}


def test_random_has_exactly_the_given_number_of_active_weights():
    wanted = {"block/conv1": 7, "dense": 0, "table": 6}
    masks = masks_lib.random(jax.random.key(0), params(), wanted)
    named = masks_lib.named_leaves(masks)
    assert int(named["block/conv1"].sum()) == 7
    assert int(named["dense"].sum()) == 0
    assert named["table"] is None  # all of its weights: stays dense
    assert named["dense/bias"] is None


@given(n=st.integers(0, 29), seed=st.integers(0, 2**31 - 1))
def test_random_counts_are_exact(n, seed):
    masks = masks_lib.random(jax.random.key(seed), jax.eval_shape(params), {"dense": n})
    assert int(masks["dense"]["kernel"].sum()) == n


def test_random_depends_on_the_key_and_on_the_layer():
    tree = {"a": jnp.ones((6, 6)), "b": jnp.ones((6, 6))}
    wanted = {"a": 18, "b": 18}
    first, second = (masks_lib.random(jax.random.key(i), tree, wanted) for i in (0, 1))
    assert (first["a"] != second["a"]).any()
    assert (first["a"] != first["b"]).any()


def test_random_is_uniform_over_positions():
    tree = {"w": jnp.ones((4, 5))}

    def draw(key):
        return masks_lib.random(key, tree, {"w": 6})["w"].ravel()

    masks = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(1), DRAWS)))
    assert p_value_uniform(masks, 6) > 1e-3


def test_the_test_of_uniformity_rejects_a_slight_bias():
    rng = np.random.default_rng(0)
    scores = rng.random((DRAWS, 20)) + 0.1 * (np.arange(20) < 5)
    masks = scores.argsort(axis=1).argsort(axis=1) >= 14
    assert p_value_uniform(masks, 6) < 1e-6


@pytest.mark.parametrize("n", [-1, 31])
def test_random_rejects_impossible_counts(n):
    with pytest.raises(ValueError, match=f"layer dense has 30 weights, not {n}"):
        masks_lib.random(jax.random.key(0), params(), {"dense": n})


@pytest.mark.parametrize("make", [masks_lib.full, None])
def test_unknown_layers_are_named(make):
    make = make or (lambda tree, n: masks_lib.random(jax.random.key(0), tree, n))
    with pytest.raises(ValueError, match="no layer named head; the layers are block"):
        make(params(), {"head": 3})


def test_shuffle_keeps_counts_and_dense_leaves():
    masks = masks_lib.random(
        jax.random.key(0), params(), {"block/conv1": 9, "dense": 8}
    )
    shuffled = masks_lib.shuffle(jax.random.key(1), masks)
    before, after = masks_lib.named_leaves(masks), masks_lib.named_leaves(shuffled)
    assert (before["dense"] != after["dense"]).any()
    assert {k for k, m in after.items() if m is not None} == {"block/conv1", "dense"}
    for name, n in (("block/conv1", 9), ("dense", 8)):
        assert after[name].shape == before[name].shape
        assert int(after[name].sum()) == n


def test_shuffle_differs_by_layer():
    masks = {k: jnp.arange(36).reshape(6, 6) < 18 for k in "ab"}
    shuffled = masks_lib.shuffle(jax.random.key(0), masks)
    assert (shuffled["a"] != shuffled["b"]).any()


def test_shuffle_is_uniform_over_all_entries():
    mask = jnp.arange(12).reshape(3, 4) < 4

    def draw(key):
        return masks_lib.shuffle(key, {"w": mask})["w"].ravel()

    masks = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(2), DRAWS)))
    assert p_value_uniform(masks, 4) > 1e-3


# Bookkeeping, by hand


def test_count_and_density():
    masks, tree = two_masks(), two_params()
    count = masks_lib.count(masks)
    assert {k: int(v) for k, v in count.items()} == {"a": 2, "b": 1}
    assert all(v.dtype == jnp.int32 for v in count.values())
    assert masks_lib.counts(masks, tree) == {"a": 2, "b": 1, "c": 4}
    assert masks_lib.density(masks, tree) == {"a": 0.5, "b": 1 / 3, "c": 1.0}
    assert masks_lib.total_density(masks, tree) == 7 / 11


def test_empty_outputs():
    masks = two_masks()
    found = [masks_lib.empty_outputs(masks[k]["kernel"]).tolist() for k in "ab"]
    assert found == [[False, False], [False, True, True]]
    assert masks_lib.count_empty_outputs(masks) == {"a": 0, "b": 2}


def test_empty_outputs_are_those_of_a_loop():
    n_active = {"block/conv1": 6, "dense": 4}
    masks = masks_lib.random(jax.random.key(3), params(), n_active)
    kernel, dense = masks["block"]["conv1"]["kernel"], masks["dense"]["kernel"]
    filters = [not np.asarray(kernel)[..., i].any() for i in range(4)]
    units = [not any(row[i] for row in np.asarray(dense)) for i in range(5)]
    assert masks_lib.empty_outputs(kernel).tolist() == filters
    assert masks_lib.empty_outputs(dense).tolist() == units
    counts = {"block/conv1": sum(filters), "dense": sum(units)}
    assert masks_lib.count_empty_outputs(masks) == counts
    assert 0 < sum(units) < 5


def test_overlap():
    a = {
        "w": jnp.array([[True, True, False, False]]),
        "e": jnp.zeros((1, 2), bool),
        "d": jnp.ones((1, 2), bool),
        "n": None,
    }
    b = {
        "w": jnp.array([[True, False, True, False]]),
        "e": jnp.zeros((1, 2), bool),
        "d": None,
        "n": jnp.ones((1, 2), bool),
    }
    ratios = masks_lib.overlap(a, b)
    assert set(ratios) == {"w", "e"}
    assert ratios["w"] == np.float32(1 / 3)
    assert ratios["e"] == 1.0
    assert masks_lib.overlap(a, a)["w"] == 1.0


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (3, 3), (2, 2, 3, 5)])
def test_pack_and_unpack_round_trip(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    masks = {"w": jnp.asarray(mask), "b": None}
    packed = masks_lib.pack(masks)
    assert packed["w"].dtype == jnp.uint8
    assert packed["w"].shape == (-(-mask.size // 8),)
    tree = {"w": jnp.ones(shape), "b": jnp.ones(1)}
    restored = masks_lib.unpack(packed, tree)
    assert restored["b"] is None
    assert restored["w"].dtype == bool
    np.testing.assert_array_equal(restored["w"], mask)


# check


def test_check_accepts_masks_that_fit():
    masks_lib.check(two_masks(), two_params())
    masks_lib.check(two_masks(), jax.eval_shape(two_params))


def wrong(**changes):
    return {**two_masks(), **changes}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({k: two_masks()[k] for k in "ab"}, "the masks have no leaf c"),
        (wrong(a={"bias": None}), "the masks have no leaf a"),
        (wrong(d=None), "the parameters have no leaf d"),
        (wrong(b={"bias": None, "kernel": jnp.ones((3, 1), bool)}), r"layer b .*3, 1"),
        (wrong(b={"bias": None, "kernel": jnp.ones((1, 3))}), "layer b .*mask float32"),
    ],
)
def test_check_names_the_layer(masks, message, monkeypatch):
    # Off, for the test run's own type checks reject a mask of floats as well.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        masks_lib.check(masks, two_params())


def test_check_sees_a_layer_replaced_by_none():
    with pytest.raises(ValueError, match=r"(layer|leaf) conv"):
        masks_lib.check({"conv": None}, {"conv": {"kernel": jnp.ones((2, 2))}})
