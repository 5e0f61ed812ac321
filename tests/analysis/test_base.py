"""The space of active parameters, batches, objectives, and files of results."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow.analysis import batches, curvature, figures, objective, results
from lottery_flow.analysis.lanczos import Density
from lottery_flow.sparsity.active import active_space


def test_coordinates_are_the_active_entries_leaf_by_leaf():
    params = {"a": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 3))}}
    kernel = np.array([[True, False, True], [False, False, True]])
    space = active_space(params, {"a": {"bias": None, "kernel": kernel}})
    assert space.n == 5
    assert space.layers == {"a/bias": slice(0, 2), "a": slice(2, 5)}
    tree = {
        "a": {
            "bias": jnp.array([1.0, 2.0]),
            "kernel": jnp.array([[3.0, np.nan, 4.0], [5.0, 6.0, 7.0]]),
        }
    }
    vector = space.flatten(tree)
    np.testing.assert_array_equal(vector, [1, 2, 3, 4, 7])
    back = space.unflatten(vector)
    np.testing.assert_array_equal(back["a"]["kernel"], [[3, 0, 4], [0, 0, 7]])
    np.testing.assert_array_equal(back["a"]["bias"], [1, 2])


def test_no_masks_and_layers_without_active_weights():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((1, 2))}
    assert active_space(params).n == 6
    space = active_space(params, {"a": None, "b": np.zeros((1, 2), bool)})
    assert space.n == 4
    np.testing.assert_array_equal(space.unflatten(jnp.ones(4))["b"], [[0, 0]])
    with pytest.raises(ValueError, match="no parameter is active"):
        active_space({"b": params["b"]}, {"b": np.zeros((1, 2), bool)})
    with pytest.raises(ValueError, match="layer b has shape"):
        active_space(params, {"a": None, "b": np.zeros((2, 2), bool)})


def test_batches_cover_the_data_once_and_means_are_over_examples():
    data = {"x": np.arange(7.0), "y": np.arange(14).reshape(7, 2)}
    cut = batches.split(data, 3)
    assert [batches.size(b) for b in cut] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in cut]), data["x"])
    assert batches.total(cut) == 7
    mean = batches.mean(lambda b: {"m": np.mean(b["x"])}, cut)
    np.testing.assert_allclose(mean["m"], 3.0)
    for wrong, message in (
        ({"x": np.zeros(2), "y": np.zeros(3)}, r"found \[2, 3\]"),
        ({"x": np.zeros(0)}, r"at least 1; found \[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            batches.size(wrong)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches.split(data, 0)
    with pytest.raises(ValueError, match="batches is empty"):
        batches.mean(lambda b: 0.0, [])
    with pytest.raises(ValueError, match=r"a dict, .* write batches\.split\(data"):
        batches.total(data)


def test_vectors_are_float32_at_least_whatever_the_leaves_are():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    space = active_space(params)
    vector = space.flatten(params)
    assert vector.dtype == space.dtype == np.float32
    kinds = jax.tree.map(lambda x: x.dtype, space.unflatten(vector))
    assert kinds == {"a": jnp.bfloat16, "b": jnp.float32}
    half = {"a": jnp.ones(2, jnp.bfloat16)}
    assert active_space(half).dtype == np.float32

    def loss(p, batch):
        return jnp.sum(p["a"].astype(jnp.float32) ** 2) + jnp.sum(p["b"] ** 2)

    operator = curvature.hessian(loss, params, None, [np.ones(1)])
    np.testing.assert_array_equal(operator(vector), [2.0] * 5)


def test_the_objective_is_cross_entropy_and_the_penalty_half_the_squares_of_kernels():
    with jax.enable_x64(True):
        net = network()
        logits = net.objective().logits(net.params, net.data)
        z = np.asarray(logits)
        own = z[np.arange(11), net.data["label"]]
        wanted = np.mean(np.log(np.exp(z).sum(axis=1)) - own)
        found = net.objective()(net.params, net.data)
        np.testing.assert_allclose(found, wanted)
        with_penalty = net.objective(weight_decay=0.2)(net.params, net.data)
        kernels = [w for w in jax.tree.leaves(net.params) if w.ndim >= 2]
        penalty = 0.1 * sum(np.sum(np.square(w)) for w in kernels)
        np.testing.assert_allclose(with_penalty - found, penalty)


def test_norms_are_said_and_only_those_of_the_batch_couple_examples():
    with jax.enable_x64(True):
        net = network(norm=True)
        assert net.objective().separable
        assert not net.objective(norms="batch").separable
        assert network().objective(norms="batch").separable  # there are none
        some = jax.tree.map(lambda x: x[:5], net.data)
        for norms, alike in (("frozen", True), ("batch", False)):
            fn = net.objective(norms=norms).logits
            part, whole = fn(net.params, some), fn(net.params, net.data)[:5]
            assert np.allclose(part, whole) == alike


def test_images_go_through_preprocess():
    fn = objective.classification(
        lambda p, stats, images, train: (images @ p, stats),
        {},
        preprocess=lambda images: 2.0 * images,
    )
    batch = {"image": jnp.ones((1, 2)), "label": jnp.zeros(1, jnp.int32)}
    np.testing.assert_array_equal(fn.logits(jnp.eye(2), batch), [[2, 2]])


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    density = Density(np.zeros((1, 2)), np.ones((1, 2)) / 2, 3)
    path = results.save(tmp_path / "new" / "a.npz", density)
    assert isinstance(results.load(path, Density), Density)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.save(path, density._replace(n=4))
    assert path.read_bytes() == before


def test_frames_and_figures_are_files_too(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    path = results.save(tmp_path / "a.csv", frame)
    pd.testing.assert_frame_equal(results.load(path), frame)
    fig, axes = figures.new(2, 2)
    assert isinstance(fig, Figure)
    assert axes.shape == (2, 2)
    assert results.save(tmp_path / "a.png", fig).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"write \.npz, \.csv or \.png"):
        results.save(tmp_path / "a.pkl", frame)
