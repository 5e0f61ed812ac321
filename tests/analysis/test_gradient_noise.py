"""Gradient noise against single examples, over a whole population, and by hand."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import gradient_noise as lib
from lottery_flow.analysis import results
from lottery_flow.analysis.objective import Objective
from lottery_flow.sparsity.active import active_space

STATISTICS = ("trace", "squared_norm", "noise_scale", "cosine_mean", "cosine_std")


def brute_force(gradients, layers):
    """All gradients [n k] at once, with the estimates in the form of the appendix."""
    n, rows = len(gradients), []
    for part in (slice(None), *layers.values()):
        g = gradients[:, part]
        small, big = np.mean(np.sum(g**2, 1)), np.sum(g.mean(0) ** 2)
        squared_norm = (n * big - small) / (n - 1)
        trace = (small - big) / (1 - 1 / n)
        cosines = g @ g.mean(0) / np.linalg.norm(g, axis=1) / big**0.5
        scale = trace / squared_norm if squared_norm > 0 else np.nan
        rows.append((trace, squared_norm, scale, cosines.mean(), cosines.std()))
    return np.array(rows).T


@functools.cache
def one_by_one(norm):
    """A network, an objective with a penalty, and the gradients of its examples."""
    net = network(norm=norm)
    objective = net.objective(weight_decay=0.1)
    space = active_space(net.params, net.masks)
    grad = jax.jit(jax.grad(objective))
    gradients = [
        space.flatten(grad(net.params, b)) for b in batches_lib.split(net.data, 1)
    ]
    return net, objective, np.array(gradients)


@pytest.mark.parametrize(
    ("norm", "size", "chunk"), [(False, 11, 4), (True, 4, 3), (True, 11, 32)]
)
def test_it_is_what_the_definitions_say(norm, size, chunk):
    with jax.enable_x64(True):
        net, objective, gradients = one_by_one(norm)
        cut = batches_lib.split(net.data, size)
        found = lib.gradient_noise(objective, net.params, net.masks, cut, chunk=chunk)
        space = active_space(net.params, net.masks)
    wanted = brute_force(gradients, space.layers)
    for name, values in zip(STATISTICS, wanted, strict=True):
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.mean, gradients.mean(0), rtol=1e-10, atol=1e-14)
    assert found.layer.tolist() == ["all", *space.layers]
    assert found.mean.dtype == np.float64


def linear(params, batch):
    """A criterion that makes each example its own gradient."""
    return sum(batch[k] @ w for k, w in params.items())


LINEAR = Objective(linear, lambda values, batch: values)
ZEROS = {"a": jnp.zeros(2), "b": jnp.zeros(1)}


def noise(a, b, **options):
    batch = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return lib.gradient_noise(LINEAR, ZEROS, None, [batch], **options)


def test_the_estimates_are_unbiased():
    """Averaged over every sample of three of a population, with replacement."""
    population = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 0.0], [2.0, 1.0, 3.0]])
    samples = [
        noise(x[:, :2], x[:, 2:])
        for x in (population[list(i)] for i in itertools.product(range(3), repeat=3))
    ]
    trace = np.mean([s.trace for s in samples], axis=0)
    squared_norm = np.mean([s.squared_norm for s in samples], axis=0)
    variances, means = population.var(0), population.mean(0) ** 2
    parts = ([0, 1, 2], [0, 1], [2])
    np.testing.assert_allclose(trace, [variances[p].sum() for p in parts], rtol=1e-6)
    np.testing.assert_allclose(squared_norm, [means[p].sum() for p in parts], rtol=1e-6)
    plain = np.mean([np.sum(s.mean**2) for s in samples])
    assert plain > 1.2 * means.sum()


def test_the_variance_does_not_cancel_against_the_mean():
    rng = np.random.default_rng(0)
    a = (3e4 + rng.standard_normal((500, 2))).astype(np.float32)
    found = noise(a, np.ones((500, 1)))
    wanted = a.astype(np.float64).var(0, ddof=1).sum()
    np.testing.assert_allclose(found.trace[:2], wanted, rtol=1e-4)
    np.testing.assert_allclose(found.trace[2], 0, atol=1e-12)
    squares = jnp.mean(jnp.sum(a * a, 1)) - jnp.sum(jnp.mean(a, 0) ** 2)
    assert abs(squares / wanted - 1) > 0.5  # what must not be done


def test_what_has_no_direction_has_no_cosine():
    found = noise([[1, 0], [0, 0], [0, 1]], [[0], [0], [0]])
    # The mean is (1, 1)/3; the second example is left out.
    np.testing.assert_allclose(found.cosine_mean[:2], 0.5**0.5, rtol=1e-6)
    np.testing.assert_allclose(found.cosine_std[:2], 0, atol=1e-6)
    assert np.isnan(found.cosine_mean[2])
    assert np.isnan(found.cosine_std[2])
    assert found.trace[2] == found.squared_norm[2] == 0
    assert np.isnan(found.noise_scale[2])


def test_gradients_that_cancel_have_no_noise_scale():
    found = noise([[1, 0], [-1, 0]], [[1], [2]])
    # Sigma: 2 and 0.5; |G|^2: 0 - 1 and 2.25 - 0.25, together 1.
    np.testing.assert_allclose(found.trace, [2.5, 2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.squared_norm, [1, -1, 2], rtol=1e-6)
    np.testing.assert_allclose(found.noise_scale, [2.5, np.nan, 0.25], rtol=1e-6)


def test_masked_parameters_do_not_count():
    masks = {"a": jnp.array([True, False]), "b": jnp.array([False])}
    batch = {"a": jnp.array([[1.0, 50.0], [3.0, -9.0]]), "b": jnp.array([[7.0], [8.0]])}
    found = lib.gradient_noise(LINEAR, ZEROS, masks, [batch])
    np.testing.assert_allclose(found.trace, [2, 2, 0], rtol=1e-6)
    np.testing.assert_allclose(found.squared_norm, [3, 3, 0], rtol=1e-6)
    assert found.mean.tolist() == [2.0]


def test_a_chunk_is_all_that_memory_holds():
    n, k = 64, 4096
    batch = {"a": jnp.ones((n, k)), "b": jnp.ones((n, 1))}
    params = {"a": jnp.ones(k), "b": jnp.ones(1)}
    mean, indices = [params["a"], params["b"]], (None, None)

    def square(p, b):  # its gradients are not the batch itself
        return jnp.mean(0.5 * linear(p, b) ** 2)

    def temporary(chunk):
        args = square, chunk, params, indices, mean, batch
        analysis = lib._deviations.lower(*args).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporary(n) > n * k * 4
    assert temporary(4) < n * k


def test_a_new_mask_of_as_many_weights_compiles_nothing():
    traces = []

    def logits(params, batch):
        traces.append(1)
        return linear(params, batch)

    objective = Objective(logits, lambda values, batch: values)
    batch = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 1))}
    for first in (True, False):
        masks = {"a": jnp.array([first, not first]), "b": None}
        lib.gradient_noise(objective, ZEROS, masks, [batch])
        if first:
            n = len(traces)
    assert len(traces) == n > 0


def test_wrong_inputs():
    a, b = np.ones((2, 2)), np.ones((2, 1))
    with pytest.raises(ValueError, match="give 2 examples"):
        noise(a[:1], b[:1])
    with pytest.raises(ValueError, match="chunk=0"):
        noise(a, b, chunk=0)
    objective = dataclasses.replace(LINEAR, separable=False)
    with pytest.raises(ValueError, match="norms='frozen'"):
        lib.gradient_noise(objective, ZEROS, None, [{"a": a, "b": b}])


def test_the_result_is_saved_and_shown(tmp_path):
    result = noise([[1, 0], [2, 1]], [[1], [2]])
    path = results.save(tmp_path / "noise.npz", result)
    again = results.load(path, lib.GradientNoise)
    np.testing.assert_array_equal(again.mean, result.mean)
    frame = again.frame()
    pd.testing.assert_frame_equal(frame, result.frame())
    assert list(frame) == ["layer", *STATISTICS]
    assert frame["noise_scale"].tolist() == result.noise_scale.tolist()
    fig = lib.plot_gradient_noise(result)
    assert isinstance(fig, Figure)
    bars = [bar.get_height() for bar in fig.axes[0].patches]
    assert bars == result.noise_scale.tolist()
    points = fig.axes[1].lines[0].get_ydata()
    np.testing.assert_array_equal(points, result.cosine_mean)
