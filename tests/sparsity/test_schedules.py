"""Schedules, by hand and from the published values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow.sparsity import schedules


def due_steps(due, until=31):
    return [t for t in range(until) if bool(due(jnp.int32(t)))]


# every


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ((10,), [0, 10, 20, 30]),
        ((10, 5), [5, 15, 25]),
        ((10, 5, 25), [5, 15, 25]),
        ((10, 5, 24), [5, 15]),
        ((10, 0, 0), [0]),
        ((7, 3, 10), [3, 10]),
        ((1, 28), [28, 29, 30]),
    ],
)
def test_every_includes_both_ends(arguments, steps):
    assert due_steps(schedules.every(*arguments)) == steps


def test_every_runs_traced_and_batched():
    due = schedules.every(10, begin=5, end=25)
    flags = jax.jit(jax.vmap(due))(jnp.arange(31, dtype=jnp.int32))
    assert np.flatnonzero(flags).tolist() == [5, 15, 25]
    assert flags.dtype == bool


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "interval=0: give 1 step or more"),
        ((-5,), "interval=-5"),
        ((10, -1), "begin=-1: the first step is 0"),
        ((10, 5, 4), "end=4 is before begin=5"),
    ],
)
def test_every_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.every(*arguments)


# Drop fractions


def test_constant():
    schedule = schedules.constant(0.3)
    assert schedule(jnp.int32(0)) == schedule(jnp.int32(9999)) == np.float32(0.3)


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.3), (100, 0.225), (150, 0.15), (200, 0.075), (300, 0.0), (1000, 0.0)],
)
def test_cosine(step, value):
    schedule = jax.jit(schedules.cosine(0.3, end=300))
    np.testing.assert_allclose(schedule(jnp.int32(step)), value, rtol=1e-6, atol=1e-9)


def test_cosine_ends_at_exactly_zero():
    assert schedules.cosine(0.3, end=300)(jnp.int32(300)) == 0.0


def test_follow_learning_rate():
    def rate(step):
        return jnp.where(step < 10, 0.4, jnp.where(step < 20, 0.2, 0.02))

    schedule = schedules.follow_learning_rate(0.3, rate)
    values = [schedule(jnp.int32(t)) for t in (0, 9, 10, 25)]
    np.testing.assert_allclose(values, [0.3, 0.3, 0.15, 0.015], rtol=1e-6)


def test_follow_learning_rate_on_a_cosine_is_the_cosine_fraction():
    follow = schedules.follow_learning_rate(0.3, optax.cosine_decay_schedule(0.05, 300))
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        values = [follow(jnp.int32(t)) for t in (0, 100, 150, 200, 300)]
    expected = [0.3, 0.225, 0.15, 0.075, 0.0]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(1.5), "fraction=1.5: give a fraction from 0 to 1"),
        (lambda: schedules.constant(float("nan")), "fraction=nan"),
        (lambda: schedules.cosine(-0.1, 10), "fraction=-0.1"),
        (lambda: schedules.cosine(0.3, 0), "end=0: a cosine needs 1 step or more"),
        (lambda: schedules.follow_learning_rate(2.0, lambda t: 1.0), "fraction=2.0"),
        (
            lambda: schedules.follow_learning_rate(0.3, lambda t: 0.0 * t),
            r"learning_rate\(0\)=0.0: .* take the cosine one with a warm-up",
        ),
    ],
)
def test_drop_fractions_reject(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Sparsity


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.0),
        (3000, 0.0),
        (3100, 0.0695),
        (3500, 0.3136),
        (4000, 0.5492),
        (5000, 0.8312),
        (6000, 0.9352),
        (7000, 0.95),
        (11719, 0.95),
    ],
)
def test_cubic_sparsity_of_the_paper(step, value):
    schedule = schedules.cubic_sparsity(0.0, 0.95, begin=3000, end=7000)
    assert round(float(schedule(step)), 4) == value


def test_cubic_sparsity_from_a_positive_start():
    schedule = schedules.cubic_sparsity(0.5, 0.9, begin=0, end=10)
    # Half way: 0.9 - 0.4 / 8.
    assert [schedule(0), schedule(5), schedule(10)] == [0.5, 0.9 - 0.4 * 0.125, 0.9]
    assert np.asarray(schedule(5)).dtype == np.float64


@pytest.mark.parametrize("end", [3, 2])
def test_cubic_sparsity_rejects_an_end_before_the_begin(end):
    with pytest.raises(ValueError, match=f"end={end} is not after begin=3"):
        schedules.cubic_sparsity(0.0, 0.9, begin=3, end=end)
