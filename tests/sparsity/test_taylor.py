"""Taylor scores against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from lottery_flow.sparsity import taylor

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 6)])
def test_maps_equal_numpy(shape):
    z, g = (RNG.normal(size=shape).astype(np.float32) for _ in range(2))
    by_example = (z * g).reshape(5, -1, 6).mean(axis=1)
    score = np.abs(by_example).mean(axis=0)
    found = taylor.taylor_maps(jnp.asarray(z), jnp.asarray(g))
    np.testing.assert_allclose(found, score / np.linalg.norm(score), rtol=1e-5)


def test_maps_by_hand_examples_do_not_cancel_but_positions_do():
    # Unit 0: opposite examples. Unit 1: opposite positions in each.
    z = jnp.array([[[3.0, 1.0], [3.0, -1.0]], [[-3.0, 1.0], [-3.0, -1.0]]])
    score = taylor.taylor_maps(z, jnp.ones_like(z))
    assert score.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("factor", [1e-30, 64.0])
def test_scaling_the_gradients_changes_nothing(factor):
    z, g = (jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32) for _ in range(2))
    one, two = taylor.taylor_maps(z, g), taylor.taylor_maps(z, g * factor)
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_a_layer_without_gradients_scores_zero():
    zeros = jnp.zeros((3, 2, 2, 4))
    assert taylor.taylor_maps(zeros, zeros).tolist() == [0, 0, 0, 0]


def test_weights_by_hand():
    weights, grads = jnp.array([[1.0, -2.0], [3.0, 0.0]]), jnp.array([[2.0, 2], [1, 5]])
    assert taylor.taylor_weights(weights, grads).tolist() == [[4, 16], [9, 0]]
