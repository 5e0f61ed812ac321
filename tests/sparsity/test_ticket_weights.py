"""Treatments and perturbations of a ticket's weights: what changes, what must not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lottery_flow.sparsity import initializers, masks, ticket_weights

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
SHAPES = {"conv": (3, 3, 4, 30), "fc": (40, 50)}


def network(dtype=jnp.float32):
    params = {
        k: {
            "bias": jnp.asarray(RNG.normal(size=shape[-1]), dtype),
            "kernel": jnp.asarray(2 * RNG.normal(size=shape), dtype),
        }
        for k, shape in SHAPES.items()
    }
    mask = {
        k: {"bias": None, "kernel": jnp.asarray(RNG.random(shape) < 0.4)}
        for k, shape in SHAPES.items()
    }
    mask["conv"]["kernel"] = mask["conv"]["kernel"].at[..., 7].set(False)
    return params, mask


PARAMS, MASKS = network()
STD = ticket_weights.layer_std(PARAMS, MASKS)
CALLS = {
    "rewind": ticket_weights.rewind,
    "shuffle": ticket_weights.shuffle,
    "shuffle_filter": partial(ticket_weights.shuffle, within="filter"),
    "shuffle_magnitudes": partial(ticket_weights.shuffle, keep_signs=True),
    "shuffle_filter_magnitudes": partial(
        ticket_weights.shuffle, within="filter", keep_signs=True
    ),
    "sign_constant": partial(ticket_weights.sign_constant, std=STD),
    "flip_signs": ticket_weights.flip_signs,
    "add_noise": partial(ticket_weights.add_noise, scale=0.5, std=STD),
}


@jax.jit
def _all(key, params, mask):
    return {name: fn(key, params, mask) for name, fn in CALLS.items()}


RESULTS = _all(KEY, PARAMS, MASKS)
every = pytest.mark.parametrize("name", CALLS)
each_layer = pytest.mark.parametrize("layer", SHAPES)


def before_after(name, layer):
    """Active weights before and after, and the mask."""
    mask = np.asarray(MASKS[layer]["kernel"])
    arrays = (PARAMS[layer]["kernel"], RESULTS[name][layer]["kernel"])
    return *(np.asarray(x)[mask] for x in arrays), mask


def test_every_treatment_is_tested():
    assert set(ticket_weights.TREATMENTS) <= set(CALLS)


@every
@each_layer
def test_inactive_weights_are_exactly_zero_and_other_leaves_keep_their_bits(
    name, layer
):
    new = RESULTS[name][layer]
    inactive = np.asarray(new["kernel"])[~np.asarray(MASKS[layer]["kernel"])]
    assert not inactive.view(np.uint32).any()
    np.testing.assert_array_equal(new["bias"], PARAMS[layer]["bias"])


@each_layer
def test_rewound_weights_keep_their_bits(layer):
    before, after, _ = before_after("rewind", layer)
    np.testing.assert_array_equal(before, after)


@each_layer
def test_shuffled_weights_are_the_same_multiset(layer):
    before, after, _ = before_after("shuffle", layer)
    np.testing.assert_array_equal(np.sort(before), np.sort(after))
    assert np.mean(before != after) > 0.99


@each_layer
def test_shuffled_magnitudes_are_the_same_multiset_and_signs_stay(layer):
    before, after, _ = before_after("shuffle_magnitudes", layer)
    np.testing.assert_array_equal(np.sign(before), np.sign(after))
    np.testing.assert_array_equal(np.sort(np.abs(before)), np.sort(np.abs(after)))
    assert np.mean(before != after) > 0.99


@each_layer
@pytest.mark.parametrize("name", ["shuffle_filter", "shuffle_filter_magnitudes"])
def test_weights_shuffled_in_filters_are_the_same_multiset_of_each(name, layer):
    before, after, mask = before_after(name, layer)
    filters = np.nonzero(mask)[-1]
    for i in range(mask.shape[-1]):
        b, a = before[filters == i], after[filters == i]
        np.testing.assert_array_equal(np.sort(np.abs(b)), np.sort(np.abs(a)))
        if name == "shuffle_filter":
            np.testing.assert_array_equal(np.sort(b), np.sort(a))
        else:
            np.testing.assert_array_equal(np.sign(b), np.sign(a))
    assert np.mean(before != after) > 0.8


@each_layer
def test_a_shuffle_of_the_layer_mixes_filters(layer):
    before, after, mask = before_after("shuffle", layer)
    filters = np.nonzero(mask)[-1]
    same = [
        np.array_equal(np.sort(before[filters == i]), np.sort(after[filters == i]))
        for i in np.unique(filters)
    ]
    assert not any(same)


def test_every_permutation_of_the_active_weights_is_equally_likely():
    params = {"w": jnp.array([[9.0, 1.0, 2.0], [9.0, 9.0, 3.0]])}
    mask = {"w": params["w"] < 9}
    draw = jax.jit(jax.vmap(lambda key: ticket_weights.shuffle(key, params, mask)))
    drawn = np.asarray(draw(jax.random.split(KEY, 6000))["w"])[
        :, *np.nonzero(mask["w"])
    ]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


def test_filters_of_equal_weights_are_shuffled_differently():
    column = jnp.arange(50.0)[:, None]
    params = {"w": jnp.concatenate([column, column], axis=1)}
    mask = {"w": jnp.ones((50, 2), bool)}
    shuffle = jax.jit(partial(ticket_weights.shuffle, within="filter"))
    new = shuffle(KEY, params, mask)["w"]
    assert np.mean(new[:, 0] != new[:, 1]) > 0.8


@each_layer
def test_a_sign_constant_has_one_magnitude_and_each_weight_its_sign(layer):
    before, after, _ = before_after("sign_constant", layer)
    np.testing.assert_array_equal(np.sign(before), np.sign(after))
    assert len(np.unique(np.abs(after))) == 1
    assert np.abs(after[0]) == pytest.approx(np.std(before), rel=1e-5)


@each_layer
def test_flipped_signs_keep_magnitudes_and_half_of_the_signs(layer):
    before, after, _ = before_after("flip_signs", layer)
    np.testing.assert_array_equal(np.abs(before), np.abs(after))
    n_flipped = int((np.sign(before) != np.sign(after)).sum())
    assert stats.binomtest(n_flipped, len(before), 0.5).pvalue > 1e-3


def test_probabilities_zero_and_one_flip_nothing_and_everything():
    flip = ticket_weights.flip_signs
    kept = masks.apply(MASKS, PARAMS)
    none = flip(KEY, PARAMS, MASKS, probability=0.0)
    jax.tree.map(np.testing.assert_array_equal, none, kept)
    new = flip(KEY, PARAMS, MASKS, probability=1.0)
    np.testing.assert_array_equal(new["fc"]["kernel"], -kept["fc"]["kernel"])


@each_layer
def test_noise_is_gaussian_of_the_given_size(layer):
    before, after, _ = before_after("add_noise", layer)
    noise = (after - before) / (0.5 * np.std(before))
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert stats.kstest(noise, "norm", (0, 1.5)).pvalue < 1e-3
    assert abs(stats.pearsonr(noise, before).statistic) < 0.15


def test_noise_is_in_proportion_to_its_scale():
    add = partial(ticket_weights.add_noise, KEY, PARAMS, MASKS, std=STD)
    kept, one, three = (add(scale=s)["fc"]["kernel"] for s in (0.0, 1.0, 3.0))
    np.testing.assert_array_equal(kept, masks.apply(MASKS, PARAMS)["fc"]["kernel"])
    np.testing.assert_allclose(three - kept, 3 * (one - kept), atol=1e-5)


def test_layers_and_keys_have_draws_of_their_own():
    leaf = jnp.ones((20, 30))
    params, mask = {"a": leaf, "b": leaf}, {"a": leaf > 0, "b": leaf > 0}
    flip = jax.jit(ticket_weights.flip_signs)
    one, two = (flip(jax.random.key(i), params, mask) for i in range(2))
    for x, y in ((one["a"], one["b"]), (one["a"], two["a"])):
        assert 0.3 < np.mean(np.asarray(x) == np.asarray(y)) < 0.7


def test_reinit_draws_everything_again_and_masks_it():
    params, mask = PARAMS, MASKS
    fresh, _ = network()
    treatment = ticket_weights.reinit(lambda key: jax.tree.map(lambda x: x + 1, fresh))
    new = treatment(KEY, params, mask)
    expected = masks.apply(mask, jax.tree.map(lambda x: x + 1, fresh))
    jax.tree.map(np.testing.assert_array_equal, new, expected)


def test_initializers_are_treatments():
    new = jax.eval_shape(initializers.per_neuron, KEY, PARAMS, MASKS)
    assert jax.tree.structure(new) == jax.tree.structure(RESULTS["rewind"])


def test_layer_std_is_of_the_active_weights_and_zero_without_any():
    mask = np.asarray(MASKS["fc"]["kernel"])
    expected = np.std(np.asarray(PARAMS["fc"]["kernel"])[mask])
    assert STD == {"conv": STD["conv"], "fc": pytest.approx(expected, rel=1e-6)}
    empty = {"w": jnp.zeros((2, 2), bool)}
    assert ticket_weights.layer_std({"w": jnp.ones((2, 2))}, empty) == {"w": 0.0}


def test_a_frozen_offset_completes_the_active_weights_exactly():
    offset = ticket_weights.frozen_offset(PARAMS, MASKS)
    active = masks.apply(MASKS, PARAMS)
    whole = jax.tree.map(jnp.add, active, offset)
    jax.tree.map(np.testing.assert_array_equal, whole, PARAMS)
    assert not np.asarray(offset["fc"]["bias"]).any()
    assert not np.asarray(offset["fc"]["kernel"])[
        np.asarray(MASKS["fc"]["kernel"])
    ].any()


@pytest.mark.parametrize("name", ["sign_constant", "add_noise"])
def test_narrow_weights_stay_narrow(name):
    params, mask = network(jnp.bfloat16)
    new = CALLS[name](KEY, params, mask)["fc"]["kernel"]
    assert new.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(new, np.float32)).all()


def test_errors():
    with pytest.raises(ValueError, match="std has no layer fc; take layer_std"):
        ticket_weights.sign_constant(KEY, PARAMS, MASKS, std={"conv": 1.0})
