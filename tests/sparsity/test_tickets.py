"""The loop of iterative pruning around a training that is a formula."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import ticket_weights, tickets

KEY = jax.random.key(0)
RATE = 0.2


def initial():
    rng = np.random.default_rng(0)
    return {
        "a": {"bias": jnp.ones(4), "kernel": jnp.asarray(_normal(rng, (5, 4)))},
        "b": {"bias": jnp.ones(6), "kernel": jnp.asarray(_normal(rng, (4, 6)))},
    }


def _normal(rng, shape):
    return rng.normal(size=shape).astype(np.float32)


PARAMS = initial()
MASKS = masks_lib.full(PARAMS, masks_lib.layers(PARAMS))
# What "training" adds: from it follow the final weights and those at step k.
DRIFT = jax.tree.map(
    lambda x: jnp.asarray(_normal(np.random.default_rng(x.size), x.shape)), PARAMS
)


def plus(params, masks, times):
    moved = jax.tree.map(lambda p, d: p + times * d, params, DRIFT)
    return masks_lib.apply(masks, moved)


class Recorder:
    """A training that adds the drift, a tenth of it by step k; it notes its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, params, masks, level):
        self.calls.append((params, masks, level))
        return plus(params, masks, 1.0), plus(params, masks, 0.1)


def run(**options):
    train = Recorder()
    defaults = dict(key=KEY, n_rounds=3, rate=RATE)
    levels = list(tickets.iterative_pruning(train, PARAMS, MASKS, **defaults | options))
    return levels, train


def active(masks):
    return {k: np.asarray(masks[k]["kernel"]) for k in ("a", "b")}


def counts(levels):
    return [{k: int(m.sum()) for k, m in active(x.masks).items()} for x in levels]


def equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_masks_are_nested_and_counted_layer_by_layer():
    levels, _ = run(scope="layer")
    # 20 - 4, 16 - 3, 13 - 2; 24 - 4, 20 - 4, 16 - 3
    expected = [{"a": 20, "b": 24}, {"a": 16, "b": 20}, {"a": 13, "b": 16}]
    assert counts(levels) == [*expected, {"a": 11, "b": 13}]
    for old, new in itertools.pairwise(levels):
        for k, mask in active(new.masks).items():
            assert not (mask & ~active(old.masks)[k]).any()


def test_a_global_ranking_and_rates_of_layers():
    levels, _ = run()
    assert [sum(n.values()) for n in counts(levels)] == [44, 36, 29, 24]
    levels, _ = run(layer_rates={"b": 0.1})
    assert [n["b"] for n in counts(levels)] == [24, 22, 20, 18]
    assert [n["a"] for n in counts(levels)] == [20, 16, 13, 11]


def test_the_weights_removed_are_the_smallest_of_the_trained_ones():
    levels, _ = run(n_rounds=1)
    size = np.concatenate(
        [np.abs(levels[0].params[k]["kernel"]).ravel() for k in ("a", "b")]
    )
    kept = np.concatenate([m.ravel() for m in active(levels[1].masks).values()])
    assert size[~kept].max() < size[kept].min()
    assert kept.sum() == 36


def test_weights_are_rewound_to_what_level_zero_remembered():
    levels, train = run(rewind="weights")
    equal(train.calls[0][0], PARAMS)
    for params, masks, level in train.calls[1:]:
        equal(params, plus(PARAMS, masks, 0.1))
        equal(levels[level].start, params)
        assert levels[level].level == level


@pytest.mark.parametrize("rewind", ["learning_rate", "fine_tune"])
def test_the_final_weights_are_kept(rewind):
    levels, train = run(rewind=rewind)
    for level in (1, 2, 3):
        params, masks, _ = train.calls[level]
        equal(params, masks_lib.apply(masks, levels[level - 1].params))


def test_rewinding_to_step_zero_starts_from_the_initial_weights():
    def train(params, masks, level):
        return plus(params, masks, 1.0), params

    levels = list(
        tickets.iterative_pruning(train, PARAMS, MASKS, key=KEY, n_rounds=2, rate=RATE)
    )
    for level in levels:
        equal(level.start, masks_lib.apply(level.masks, PARAMS))


def test_a_treatment_changes_the_starts_above_level_zero():
    std = ticket_weights.layer_std(PARAMS, MASKS)
    levels, _ = run(treatment=partial(ticket_weights.sign_constant, std=std))
    equal(levels[0].start, PARAMS)
    for level in levels[1:]:
        mask = active(level.masks)["a"]
        start = np.asarray(level.start["a"]["kernel"])
        np.testing.assert_allclose(np.abs(start[mask]), std["a"], rtol=1e-6)
        assert not start[~mask].any()


def test_random_treatments_differ_from_level_to_level():
    shuffled, _ = run(treatment=jax.jit(ticket_weights.shuffle), n_rounds=2, rate=0.0)
    one, two = (np.asarray(x.start["a"]["kernel"]) for x in shuffled[1:])
    np.testing.assert_array_equal(np.sort(one.ravel()), np.sort(two.ravel()))
    assert (one != two).any()


def test_the_criterion_sees_the_start_and_the_end_of_the_level():
    seen = []

    def criterion(key, first, last, mask):
        seen.append((first, last, mask))
        return jnp.abs(last)

    levels, _ = run(criterion=criterion, rewind="learning_rate", n_rounds=2)
    for i, name in ((0, "a"), (1, "b")):
        level = levels[1]
        first, last, mask = seen[2 + i]
        np.testing.assert_array_equal(first, level.start[name]["kernel"])
        np.testing.assert_array_equal(last, level.params[name]["kernel"])
        np.testing.assert_array_equal(mask, level.masks[name]["kernel"])


def test_a_random_criterion_draws_anew_at_every_level_and_repeats_with_its_key():
    one, two, other = (
        [
            active(x.masks)["a"]
            for x in run(criterion="random", key=jax.random.key(k))[0]
        ]
        for k in (0, 0, 1)
    )
    equal(one, two)
    assert any((x != y).any() for x, y in zip(one, other, strict=True))


def test_levels_are_trained_when_they_are_asked_for():
    train = Recorder()
    levels = tickets.iterative_pruning(
        train, PARAMS, MASKS, key=KEY, n_rounds=5, rate=RATE
    )
    assert train.calls == []
    next(levels)
    next(levels)
    assert [level for *_, level in train.calls] == [0, 1]


def test_inactive_weights_of_the_first_masks_are_zero_in_the_first_start():
    masks = jax.tree.map(lambda m: m.at[0].set(False), MASKS)
    train = Recorder()
    first = next(
        tickets.iterative_pruning(train, PARAMS, masks, key=KEY, n_rounds=0, rate=RATE)
    )
    assert not np.asarray(first.start["a"]["kernel"])[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_rounds": -1}, "n_rounds=-1: give 0 or more"),
        ({"rate": 1.0}, r"rate=1\.0"),
        ({"criterion": "biggest"}, "criterion='biggest'"),
        ({"layer_rates": {"c": 0.1}}, "no masked layer c"),
    ],
)
def test_mistakes_are_found_before_any_training(options, message):
    train = Recorder()
    with pytest.raises(ValueError, match=message):
        tickets.iterative_pruning(
            train, PARAMS, MASKS, **dict(key=KEY, n_rounds=1, rate=RATE) | options
        )
    assert train.calls == []


def test_masks_that_do_not_fit():
    with pytest.raises(ValueError, match="masks do not fit"):
        tickets.iterative_pruning(
            Recorder(), PARAMS, MASKS["a"], key=KEY, n_rounds=1, rate=RATE
        )


@pytest.mark.parametrize(
    ("rewind", "level", "expected"),
    [
        ("weights", 0, 0),
        ("learning_rate", 0, 0),
        ("fine_tune", 0, 0),
        ("weights", 2, 30),
        ("learning_rate", 1, 30),
        ("fine_tune", 1, 100),
    ],
)
def test_the_step_of_the_schedule_that_a_level_begins_at(rewind, level, expected):
    first = tickets.first_step(rewind, level, rewind_step=30, n_steps=100)
    assert first == expected


def test_a_rewind_beyond_the_end():
    with pytest.raises(ValueError, match="rewind_step=101: give a step from 0 to"):
        tickets.first_step("weights", 1, rewind_step=101, n_steps=100)
