"""Signal propagation in numpy again, the masks by count, and the paper's curves."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow import models
from lottery_flow.analysis import results
from lottery_flow.analysis import signal as lib
from lottery_flow.sparsity import initializers
from lottery_flow.sparsity import masks as masks_lib

LAYERS = ["conv", "hidden", "logits"]


def forward(net, images, added):
    """The small network with its running statistics, in numpy; outputs by layer."""
    p, stats = jax.tree.map(np.asarray, (net.params, net.batch_stats))
    outputs = {}

    def layer(name, x):
        y = np.tensordot(x, p[name]["kernel"], p[name]["kernel"].ndim - 1)
        outputs[name] = y + p[name]["bias"] + added.get(name, 0)
        return outputs[name]

    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), (1, 2))
    x = layer("conv", np.moveaxis(windows[:, ::2, ::2], 3, -1))
    if "norm" in p:
        x = (x - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
        x = x * p["norm"]["scale"] + p["norm"]["bias"]
    x = np.tanh(layer("hidden", np.tanh(x).reshape(len(x), -1)))
    return layer("logits", x), outputs


def loss(net, added):
    """The cross-entropies of all examples together."""
    z, _ = forward(net, net.data["image"], added)
    return np.sum(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), net.data["label"]])


def finite_differences(net, name, shape, h=1e-5):
    gradient = np.zeros(shape)
    for i in np.ndindex(shape):
        step = np.zeros(shape)
        step[i] = h
        up, down = loss(net, {name: step}), loss(net, {name: -step})
        gradient[i] = (up - down) / (2 * h)
    return gradient


def tracer(net):
    def trace(params, batch, perturbations):
        args = params, net.batch_stats, batch["image"], False
        return net.model.trace(*args, perturbations)

    return trace


def given(key, params, masks):
    """No draw at all."""
    return params


def half(key, params, sparsity):
    return masks_lib.random(
        key, params, {k: v.size // 2 for k, v in masks_lib.layers(params).items()}
    )


@pytest.mark.parametrize("norm", [False, True])
def test_it_is_what_numpy_finds(norm):
    with jax.enable_x64(True):
        net = network(norm=norm)
        args = tracer(net), given, half, net.params, net.data, [0.5]
        found = lib.signal_propagation(*args, n_draws=2, key=jax.random.key(0))
        logits, outputs = forward(net, net.data["image"], {})
    assert found.layer.tolist() == LAYERS == list(outputs)
    assert found.sparsity.tolist() == [0.5]
    neurons = np.concatenate([outputs[k].std(0) for k in ("hidden", "logits")])
    gradients = [finite_differences(net, k, y.shape) for k, y in outputs.items()]
    for draw in range(2):
        at = 0, draw
        np.testing.assert_allclose(found.logit_std[at], logits.std(), rtol=1e-10)
        np.testing.assert_allclose(found.neuron_std[at], neurons.mean(), rtol=1e-10)
        stds = [y.std() for y in outputs.values()]
        np.testing.assert_allclose(found.activation_std[at], stds, rtol=1e-10)
        stds = [g.std() for g in gradients]
        np.testing.assert_allclose(found.gradient_std[at], stds, rtol=1e-7)


def dense_trace(params, batch, perturbations):
    """Two layers, named against the alphabet."""
    outputs = {}

    def layer(name, x):
        outputs[name] = x @ params[name] + perturbations.get(name, jnp.float32(0))
        return outputs[name]

    return layer("a", jax.nn.relu(layer("z", batch["image"]))), outputs


WEIGHTS = {"z": jnp.zeros((20, 30)), "a": jnp.zeros((30, 4))}


def inputs(n=16):
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((n, 20)).astype(np.float32),
        "label": rng.integers(0, 4, n).astype(np.int32),
    }


def propagate(batch, sparsities, trace=dense_trace, init=initializers.per_neuron, **k):
    options = {"n_draws": 3, "key": jax.random.key(0)} | k
    return lib.signal_propagation(
        trace, init, lib.uneven_masks, WEIGHTS, batch, sparsities, **options
    )


def test_every_draw_has_masks_and_weights_of_its_own():
    found = propagate(inputs(), np.array([0.5, 0.5]))
    assert found.logit_std.shape == found.neuron_std.shape == (2, 3)
    assert found.activation_std.shape == found.gradient_std.shape == (2, 3, 2)
    assert found.layer.tolist() == ["z", "a"]  # in the order of the computation
    assert len(set(found.logit_std.ravel().tolist())) == 6
    again = propagate(inputs(), [0.5, 0.5])
    np.testing.assert_array_equal(again.logit_std, found.logit_std)
    other = propagate(inputs(), [0.5, 0.5], key=jax.random.key(1))
    assert not np.isin(other.logit_std, found.logit_std).any()

    def ones(key, params, masks):
        return masks_lib.apply(masks, jax.tree.map(jnp.ones_like, params))

    same_weights = propagate(inputs(), [0.5], init=ones)
    assert len(set(same_weights.logit_std.ravel().tolist())) == 3
    same_masks = propagate(inputs(), [0.0])
    assert len(set(same_masks.logit_std.ravel().tolist())) == 3


def test_one_program_for_all_sparsities():
    traces = []

    def trace(*args):
        traces.append(1)
        return dense_trace(*args)

    propagate(inputs(), [0.0], trace=trace)
    n = len(traces)
    propagate(inputs(), [0.0, 0.3, 0.6, 0.9], trace=trace)
    assert len(traces) == n + 1  # one more, for the names of the layers


def test_gradients_do_not_depend_on_the_size_of_the_batch():
    batch = inputs()
    twice = {k: np.concatenate([v, v]) for k, v in batch.items()}
    one, two = propagate(batch, [0.5]), propagate(twice, [0.5])
    np.testing.assert_allclose(one.gradient_std, two.gradient_std, rtol=1e-5)


def test_no_dense_layer_no_neurons():
    def trace(params, batch, perturbations):
        outputs = dense_trace(params, batch, {})[1]
        cubes = {"a": outputs["a"].reshape(16, 2, 2) + perturbations.get("a", 0.0)}
        return cubes["a"].reshape(16, 4), cubes

    assert np.isnan(propagate(inputs(), [0.5], trace=trace).neuron_std).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.07, 0.5, 0.98])
@pytest.mark.parametrize("shape", [(5, 5, 3, 6), (84, 10), (2, 2)])
def test_uneven_masks_are_exact(sparsity, shape):
    params = {"layer": {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(3)}}
    masks = lib.uneven_masks(jax.random.key(0), params, sparsity)
    assert masks["layer"]["bias"] is None
    mask, size = np.asarray(masks["layer"]["kernel"]), math.prod(shape)
    assert mask.dtype == bool
    assert mask.shape == shape
    n_zeros = math.floor(sparsity * size) + 1 if sparsity else 0
    assert (~mask).sum() == n_zeros


def test_uneven_masks_leave_the_first_units_few_inputs():
    n_out, n_in, sparsity = 6, 400, 0.6
    params = {"w": jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)}
    keys = jax.random.split(jax.random.key(0), 20)
    masks = jax.vmap(lambda k: lib.uneven_masks(k, params, sparsity))(keys)
    densities = np.asarray(masks["w"]).mean((0, 1))
    # The threshold t at which the densities max(0, 1 - t / (c + 1)) have the mean 0.4.
    t = np.linspace(0, n_out, 100_001)[:, None]
    expected = np.maximum(0, 1 - t / np.arange(1, n_out + 1))
    expected = expected[np.argmin(np.abs(expected.mean(1) - (1 - sparsity)))]
    np.testing.assert_allclose(densities, expected, atol=0.03)  # 5 standard deviations
    assert expected[0] == 0
    assert expected[-1] > 0.6
    assert len(np.unique(np.asarray(masks["w"]), axis=0)) == 20


def test_uniform_masks_are_uniform():
    params = {"w": jnp.zeros((400, 6)), "bias": jnp.zeros(6)}
    keys = jax.random.split(jax.random.key(0), 20)
    masks = jax.vmap(lambda k: lib.uniform_masks(k, params, 0.6))(keys)
    assert masks["bias"] is None
    assert masks["w"].sum((1, 2)).tolist() == [960] * 20
    np.testing.assert_allclose(np.asarray(masks["w"]).mean((0, 1)), 0.4, atol=0.03)
    assert lib.uniform_masks(keys[0], params, 0.0)["w"].all()


def test_wrong_inputs():
    with pytest.raises(ValueError, match="0 sparsities"):
        propagate(inputs(), [])
    with pytest.raises(ValueError, match="n_draws=0"):
        propagate(inputs(), [0.5], n_draws=0)
    with pytest.raises(ValueError, match="sparsity"):
        propagate(inputs(), [1.5])
    with pytest.raises(ValueError, match="no outputs"):
        propagate(inputs(), [0.5], trace=lambda p, b, e: (b["image"], {}))


def test_the_result_is_saved_and_shown(tmp_path):
    result = propagate(inputs(), [0.2, 0.9])
    path = results.save(tmp_path / "signal.npz", result)
    again = results.load(path, lib.SignalPropagation)
    frame = again.frame()
    pd.testing.assert_frame_equal(frame, result.frame())
    assert list(frame) == ["sparsity", "draw", "layer", "quantity", "value"]
    assert len(frame) == 2 * 3 * (2 + 2 * 2)

    def value(**where):
        rows = frame
        for column, wanted in where.items():
            rows = rows[rows[column] == wanted]
        (found,) = rows["value"]
        return found

    at = {"sparsity": 0.9, "draw": 2}
    row = at | {"layer": "a", "quantity": "gradient_std"}
    assert value(**row) == result.gradient_std[1, 2, 1]
    row = at | {"layer": "all", "quantity": "logit_std"}
    assert value(**row) == result.logit_std[1, 2]

    fig = lib.plot_signal_propagation(result)
    assert isinstance(fig, Figure)
    logits, forward, backward = fig.axes
    np.testing.assert_allclose(
        logits.lines[0].get_ydata(), result.logit_std.mean(1), rtol=1e-6
    )
    for ax, values in (
        (forward, result.activation_std),
        (backward, result.gradient_std),
    ):
        shown = [line.get_ydata() for line in ax.lines]
        np.testing.assert_allclose(shown, values.mean(1).T, rtol=1e-6)
        assert ax.lines[0].get_xdata().tolist() == [0.2, 0.9]
        assert [line.get_label() for line in ax.lines] == ["z", "a"]


@functools.cache
def lenet5():
    """LeNet-5 with N(0, 1) inputs as in the paper, but a batch of 50."""
    model = models.create("lenet5", (28, 28, 3), 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    images = jax.random.normal(jax.random.key(1), (50, 28, 28, 3))
    batch = {"image": images, "label": jnp.arange(50, dtype=jnp.int32) % 10}

    def trace(params, batch, perturbations):
        # The released notebook has a ReLU after the last layer, too.
        images = batch["image"]
        logits, outputs = model.trace(params, {}, images, True, perturbations)
        return jax.nn.relu(logits), outputs

    return trace, params, batch


def of_lenet5(init, make_masks, sparsities):
    trace, params, batch = lenet5()
    return lib.signal_propagation(
        trace,
        init,
        make_masks,
        params,
        batch,
        sparsities,
        n_draws=8,
        key=jax.random.key(2),
    )


def distance(draws, published):
    """Between logarithms, in standard deviations of one draw."""
    logs = np.log(draws)
    return (np.log(published) - logs.mean(1)) / logs.std(1, ddof=1)


# Read off the published curves: uneven masks, sparsities of .14, .42 and .77.
PUBLISHED = {
    "masked_dense": [0.191, 0.0869, 0.00622],
    "per_neuron": [1.55, 1.11, 1.27],
}


def test_lenet5_propagates_as_published():
    sparsities = [0.14, 0.42, 0.77]
    found = {
        name: of_lenet5(
            initializers.INITIALIZERS[name], lib.uneven_masks, sparsities
        ).logit_std
        for name in PUBLISHED
    }
    for name, curve in PUBLISHED.items():
        assert np.abs(distance(found[name], curve)).max() < 2.5
        assert np.abs(distance(found[name], curve).mean()) < 1.25
    assert distance(found["masked_dense"], PUBLISHED["per_neuron"]).min() > 4


def test_only_the_per_neuron_initialisation_keeps_the_signal():
    """By how much a signal shrinks from density 0.9 to 0.05, forward and backward."""
    depth = np.arange(1, 6)
    of_a_layer = (0.05 / 0.9) ** 0.5  # fan-ins fall, variances do not rise
    expected = {
        ("masked_dense", "activation_std"): of_a_layer**depth,
        ("masked_dense", "gradient_std"): of_a_layer ** (5 - depth),
        ("masked_dense", "logit_std"): of_a_layer**5,
        ("per_neuron", "activation_std"): np.ones(5),
        ("per_neuron", "gradient_std"): np.ones(5),
        ("per_neuron", "logit_std"): 1,
    }
    found = {
        name: of_lenet5(initializers.INITIALIZERS[name], lib.uniform_masks, [0.1, 0.95])
        for name in PUBLISHED
    }
    for (name, quantity), wanted in expected.items():
        many, few = np.log(getattr(found[name], quantity)).mean(1)
        np.testing.assert_allclose(np.exp(few - many), wanted, rtol=0.4)
