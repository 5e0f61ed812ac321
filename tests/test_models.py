"""Parameter counts, shapes and positions by hand; LeNet-5 again in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lottery_flow import models

MNIST = (28, 28, 1)
LENET5 = {
    "conv1/kernel": (5, 5, 1, 6),
    "conv1/bias": (6,),
    "conv2/kernel": (5, 5, 6, 16),
    "conv2/bias": (16,),
    "fc1/kernel": (256, 120),
    "fc1/bias": (120,),
    "fc2/kernel": (120, 84),
    "fc2/bias": (84,),
    "fc3/kernel": (84, 10),
    "fc3/bias": (10,),
}
MLP = {
    "fc1/kernel": (784, 300),
    "fc1/bias": (300,),
    "fc2/kernel": (300, 100),
    "fc2/bias": (100,),
    "fc3/kernel": (100, 10),
    "fc3/bias": (10,),
}


def shapes(name, image_shape=MNIST, **options):
    model = models.create(name, image_shape, 10, **options)
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    return {k: v.shape for k, v in traverse_util.flatten_dict(params, sep="/").items()}


def n_parameters(*args, **options) -> int:
    return sum(int(np.prod(s)) for s in shapes(*args, **options).values())


@pytest.mark.parametrize(("name", "expected"), [("lenet5", LENET5), ("mlp", MLP)])
def test_layer_shapes(name, expected):
    assert shapes(name) == expected


@pytest.mark.parametrize(
    ("name", "widths", "count"),
    [
        ("lenet5", (6, 16, 120, 84), 44_426),
        ("mlp", (300, 100), 266_610),
        ("lenet5", (3, 3, 27, 20), 2_399),
        ("mlp", (8, 8), 6_442),
    ],
)
def test_parameter_counts_of_the_paper(name, widths, count):
    assert n_parameters(name, widths=widths) == count


@pytest.mark.parametrize(("name", "count"), [("lenet5", 44_426), ("mlp", 266_610)])
def test_default_widths_are_those_of_the_paper(name, count):
    assert n_parameters(name) == count


def test_kernels_alone():
    kernels = [s for k, s in shapes("lenet5").items() if k.endswith("kernel")]
    assert sum(int(np.prod(s)) for s in kernels) == 44_190


@pytest.mark.parametrize(
    ("name", "image_shape", "positions"),
    [
        ("lenet5", MNIST, {"conv1": 576, "conv2": 64, "fc1": 1, "fc2": 1, "fc3": 1}),
        (
            "lenet5",
            (32, 32, 3),
            {"conv1": 784, "conv2": 100, "fc1": 1, "fc2": 1, "fc3": 1},
        ),
        ("mlp", MNIST, {"fc1": 1, "fc2": 1, "fc3": 1}),
    ],
)
def test_positions(name, image_shape, positions):
    assert models.create(name, image_shape, 10).positions == positions


@pytest.mark.parametrize("name", models.MODELS)
def test_the_classifier_gives_the_logits(name):
    model = models.create(name, (32, 32, 3), 7)
    shape = jax.eval_shape(model.init, jax.random.key(0))["params"]
    kernel = traverse_util.flatten_dict(shape, sep="/")[f"{model.classifier}/kernel"]
    assert kernel.shape[-1] == 7


def test_positions_of_nested_modules(monkeypatch):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3), strides=(2, 2), name="conv")(x)

    class Nested(nn.Module):
        n_classes: int

        @nn.compact
        def __call__(self, images, train=False):
            x = nn.BatchNorm(use_running_average=not train)(Block(name="block")(images))
            return nn.Dense(self.n_classes, name="head")(x.mean((1, 2)))

    monkeypatch.setitem(models.MODELS, "nested", Nested)
    model = models.create("nested", (9, 8, 1), 3)
    assert model.positions == {"block/conv": 5 * 4, "head": 1}


def conv(x, p):
    """A valid convolution of stride 1, as a sum over shifted images."""
    kernel = p["kernel"]
    h, w = (n - k + 1 for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    return p["bias"] + sum(
        x[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(5) for j in range(5)
    )


def pool(x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def lenet5(params, images):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(images, np.float64)
    for name in ("conv1", "conv2"):
        x = pool(np.maximum(conv(x, p[name]), 0))
    x = x.reshape(len(x), -1)
    for name in ("fc1", "fc2"):
        x = np.maximum(x @ p[name]["kernel"] + p[name]["bias"], 0)
    return x @ p["fc3"]["kernel"] + p["fc3"]["bias"]


def test_lenet5_agrees_with_numpy():
    model = models.create("lenet5", MNIST, 10)
    rng = np.random.default_rng(0)
    shaped = jax.eval_shape(model.init, jax.random.key(0))["params"]
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), jnp.float32), shaped
    )
    images = jnp.asarray(rng.uniform(size=(5, *MNIST)), jnp.float32)
    logits, stats = model.apply(params, {}, images, False)
    np.testing.assert_allclose(logits, lenet5(params, images), rtol=1e-4, atol=1e-5)
    assert stats == {}
    trained, _ = model.apply(params, {}, images, True, jax.random.key(1))
    np.testing.assert_array_equal(trained, logits)


def test_rectangular_rgb_images_and_class_numbers():
    model = models.create("mlp", (4, 5, 3), 7, widths=(3, 2, 2))
    params = model.init(jax.random.key(0))["params"]
    assert [params[f"fc{i}"]["kernel"].shape for i in (1, 2, 3, 4)] == [
        (60, 3),
        (3, 2),
        (2, 2),
        (2, 7),
    ]
    logits, _ = model.apply(params, {}, jnp.zeros((2, 4, 5, 3)), False)
    assert logits.shape == (2, 7)


def test_trace_gives_the_outputs_of_layers():
    model = models.create("mlp", (2, 2, 1), 3, widths=(5, 4))
    params = model.init(jax.random.key(0))["params"]
    params = jax.tree.map(lambda w: w + 0.1, params)
    images = jax.random.normal(jax.random.key(1), (6, 2, 2, 1))
    shift = jnp.linspace(-1, 1, 24).reshape(6, 4)
    for perturbations in ({}, {"fc2": shift}):
        logits, outputs = model.trace(params, {}, images, False, perturbations)
        assert list(outputs) == ["fc1", "fc2", "fc3"]
        x = np.asarray(images).reshape(6, -1)
        for name, output in outputs.items():
            p = jax.tree.map(np.asarray, params[name])
            y = x @ p["kernel"] + p["bias"] + perturbations.get(name, 0)
            np.testing.assert_allclose(output, y, rtol=1e-5, atol=1e-6)
            x = np.maximum(y, 0)
        np.testing.assert_array_equal(logits, outputs["fc3"])
    plain, _ = model.apply(params, {}, images, False)
    np.testing.assert_array_equal(plain, model.trace(params, {}, images, False, {})[0])


class Block(nn.Module):
    """A layer in a module, a norm, dropout."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(images)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(2, name="dense")(x)


class Nested(nn.Module):
    """Two blocks, named against the alphabet, or one that is used twice."""

    shared: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        first = Block(name="second")
        second = first if self.shared else Block(name="first")
        return second(first(images.mean((1, 2)), train), train)


def test_trace_of_nested_modules_in_training():
    model = models.from_module(Nested(), (3, 3, 2))
    variables = model.init(jax.random.key(0))
    params, stats = variables["params"], variables["batch_stats"]
    images = jax.random.normal(jax.random.key(1), (6, 3, 3, 2))
    args = params, stats, images, True
    logits, outputs = model.trace(*args, {}, jax.random.key(2))
    assert list(outputs) == ["second/dense", "first/dense"]
    assert outputs.keys() == model.positions.keys()
    wanted, _ = model.apply(*args, jax.random.key(2))
    np.testing.assert_array_equal(logits, wanted)
    with pytest.raises(ValueError, match="no layer first; the layers are"):
        model.trace(*args, {"first": 0.0}, jax.random.key(2))
    shared = models.from_module(Nested(shared=True), (3, 3, 2))
    with pytest.raises(ValueError, match="second/dense is called twice"):
        shared.trace(*args, {}, jax.random.key(2))
