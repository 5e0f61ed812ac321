"""Criteria of tickets against numpy and cases worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery_flow.sparsity import ticket_criteria
from lottery_flow.sparsity.ticket_criteria import TICKET_CRITERIA

KEY = jax.random.key(0)
INITIAL = np.array([[1.0, -2.0, 0.5], [3.0, -0.25, 9.0]], np.float32)
FINAL = np.array([[-4.0, -1.0, 1.0], [3.5, 0.0, 0.0]], np.float32)
MASK = np.array([[True, True, True], [True, True, False]])
# Medians of the active: |w_i| 1, |w_f| 1, so that here a = 1.
BY_HAND = {
    "large_final": [[4, 1, 1], [3.5, 0, 0]],
    "small_final": [[-4, -1, -1], [-3.5, 0, 0]],
    "large_init": [[1, 2, 0.5], [3, 0.25, 9]],
    "small_init": [[-1, -2, -0.5], [-3, -0.25, -9]],
    "large_init_large_final": [[1, 1, 0.5], [3, 0, 0]],
    "small_init_small_final": [[-4, -2, -1], [-3.5, -0.25, -9]],
    "magnitude_increase": [[3, -1, 0.5], [0.5, -0.25, -9]],
    "movement": [[5, 1, 0.5], [0.5, 0.25, 9]],
}
# np.nan: a score of zero, in random order below the others.
NONE = np.nan
BY_SIGN = {
    "large_final_same_sign": [[NONE, 1, 1], [3.5, NONE, NONE]],
    "large_final_diff_sign": [[4, NONE, NONE], [NONE, NONE, NONE]],
    "magnitude_increase_same_sign": [[NONE, NONE, 0.5], [0.5, NONE, NONE]],
    "magnitude_increase_diff_sign": [[3, NONE, NONE], [NONE, NONE, NONE]],
    "movement_same_sign": [[NONE, 1, 0.5], [0.5, NONE, NONE]],
    "movement_diff_sign": [[5, NONE, NONE], [NONE, NONE, NONE]],
}


@jax.jit
def all_scores(key, initial, final, mask):
    return {k: fn(key, initial, final, mask) for k, fn in TICKET_CRITERIA.items()}


def scores_of(initial=INITIAL, final=FINAL, mask=MASK, key=KEY):
    arrays = jnp.asarray(initial), jnp.asarray(final), jnp.asarray(mask)
    return jax.tree.map(np.asarray, all_scores(key, *arrays))


def test_every_criterion_is_tested():
    assert set(BY_HAND) | set(BY_SIGN) | {"random"} == set(TICKET_CRITERIA)


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    np.testing.assert_array_equal(scores_of()[name], BY_HAND[name])


@pytest.mark.parametrize("name", BY_SIGN)
def test_chosen_signs_keep_their_positive_score_and_the_others_come_after(name):
    score, expected = scores_of()[name], np.array(BY_SIGN[name])
    chosen = ~np.isnan(expected)
    np.testing.assert_array_equal(score[chosen], expected[chosen])
    assert (score[~chosen] < 0).all()
    assert (score[~chosen] >= -1).all()


def test_the_rest_is_in_random_order():
    shape = (40, 25)
    zeros, mask = np.zeros(shape, np.float32), np.ones(shape, bool)
    scores = [
        scores_of(zeros, zeros, mask, jax.random.key(i))["movement_same_sign"].ravel()
        for i in range(2)
    ]
    assert len(np.unique(scores[0])) > 990
    index = np.arange(1000)
    for a, b in (scores, (scores[0], index)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15  # 0.03 for independent ones


def test_tiny_values_keep_their_sign():
    tiny = np.full((2, 3), 1e-30, np.float32)
    mask = np.ones((2, 3), bool)
    assert (scores_of(tiny, tiny, mask)["large_final_same_sign"] > 0).all()


def test_magnitudes_are_aligned_by_the_medians_of_active_weights():
    rng = np.random.default_rng(0)
    initial = rng.normal(size=(7, 9)).astype(np.float32)
    final = (30 * rng.normal(size=(7, 9))).astype(np.float32)
    mask = rng.random((7, 9)) < 0.5
    initial[~mask], final[~mask] = 1e4, 1e-4  # what is inactive plays no part
    scores = scores_of(initial, final, mask)
    before, after = np.abs(initial), np.abs(final)
    after = after * (np.median(before[mask]) / np.median(after[mask]))
    both = np.minimum(before, after)
    np.testing.assert_allclose(scores["large_init_large_final"], both, rtol=1e-6)
    neither = -np.maximum(before, after)
    np.testing.assert_allclose(scores["small_init_small_final"], neither, rtol=1e-6)


def test_alignment_survives_layers_of_zeros_and_without_active_weights():
    zeros, none = np.zeros_like(FINAL), np.zeros_like(MASK)
    for scores in (scores_of(final=zeros), scores_of(mask=none)):
        assert np.isfinite(scores["large_init_large_final"]).all()


def test_random_scores_depend_on_the_key_alone():
    a, b = scores_of()["random"], scores_of(-FINAL, 2 * INITIAL)["random"]
    np.testing.assert_array_equal(a, b)
    assert (a != scores_of(key=jax.random.key(1))["random"]).all()


def tree(array):
    return {"fc": {"bias": jnp.zeros(3), "kernel": jnp.asarray(array)}}


def test_scores_of_a_tree():
    masks = {"fc": {"bias": None, "kernel": MASK}}
    for criterion in ("movement", ticket_criteria.movement):
        scores = ticket_criteria.ticket_scores(
            criterion, KEY, masks, tree(INITIAL), tree(FINAL)
        )
        assert scores["fc"]["bias"] is None
        np.testing.assert_array_equal(scores["fc"]["kernel"], BY_HAND["movement"])


def test_layers_draw_their_own_random_scores():
    mask = jnp.ones((3, 3), bool)
    leaf = jnp.ones((3, 3))
    scores = ticket_criteria.ticket_scores(
        "random",
        KEY,
        {"a": mask, "b": mask},
        dict(a=leaf, b=leaf),
        dict(a=leaf, b=leaf),
    )
    assert (scores["a"] != scores["b"]).all()


def test_narrow_numbers_are_widened_before_they_are_subtracted():
    # Both magnitudes are 256 times the differences: bfloat16 would round them away.
    initial = jnp.full((2, 3), 1.0, jnp.bfloat16)
    final = jnp.array([[-0.00390625, 0.00390625, 3], [1, 1, 1]], jnp.bfloat16)
    score = ticket_criteria.ticket_scores(
        "movement", KEY, {"w": jnp.ones((2, 3), bool)}, {"w": initial}, {"w": final}
    )["w"]
    assert score.dtype == jnp.float32
    assert score[0].tolist() == [1.00390625, 0.99609375, 2]


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"criterion='biggest': give one of large_f"):
        ticket_criteria.named_criterion("biggest")
