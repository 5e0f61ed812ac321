"""Published parameter counts, layers against an independent table, a step of each."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet50_shapes
from numpy.testing import assert_allclose, assert_array_equal

from lottery_flow import models
from lottery_flow.models.resnet import he_fan_out
from lottery_flow.models.wide_resnet import WideResNet
from lottery_flow.sparsity import masks

IMAGENET = (224, 224, 3)
CIFAR = (32, 32, 3)
NAMES = ("resnet20", "resnet50", "wrn16_4", "vgg16", "mobilenet_v1", "vit_s16")


def n_parameters(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shapes(model):
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    return {name: leaf.shape for name, leaf in masks.layers(params).items()}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_published_parameter_counts_for_imagenet(name, count):
    module = models.MODELS[name](n_classes=1000)
    images = jax.ShapeDtypeStruct((1, *IMAGENET), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert n_parameters(params) == count


@pytest.mark.parametrize(
    ("depth", "widen", "count"),
    [(16, 2, 691_674), (16, 4, 2_748_890), (40, 2, 2_243_546), (28, 10, 36_479_194)],
)
def test_published_parameter_counts_of_wide_networks(depth, widen, count):
    module = WideResNet(n_classes=10, depth=depth, widen=widen)
    images = jax.ShapeDtypeStruct((1, *CIFAR), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert n_parameters(params) == count


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_layers_of_resnet50_are_those_of_the_flop_tables(width):
    model = models.create("resnet50", IMAGENET, 1000, width=width)
    actual = shapes(model)
    expected = resnet50_shapes.shapes(width)
    sides = {name: side for name, _, side in resnet50_shapes.layers()}
    # The table counts the first convolution on images already padded.
    sides["conv1"] = 112
    assert len(actual) == 54
    assert Counter((actual[k], model.positions[k]) for k in actual) == Counter(
        (expected[k], sides[k] ** 2) for k in expected
    )


def test_layers_of_wide_networks():
    model = models.create("wrn22_2", CIFAR, 10)
    blocks = [f"stage{i}_block{j}" for i in (1, 2, 3) for j in (1, 2, 3)]
    names = ["conv1", "fc"]
    names += [f"{block}/conv{k}" for block in blocks for k in (1, 2)]
    # The first block of each stage changes the number of channels.
    names += [f"stage{i}_block1/shortcut" for i in (1, 2, 3)]
    assert sorted(shapes(model)) == sorted(model.positions) == sorted(names)
    assert shapes(model)["stage3_block1/shortcut"] == (1, 1, 64, 128)
    assert shapes(model)["stage3_block1/conv1"] == (3, 3, 64, 128)
    positions = {f"stage{i}_block1/conv1": (32 // 2**i * 2) ** 2 for i in (1, 2, 3)}
    assert positions.items() <= model.positions.items()


# Fewer blocks than they have: compiling them takes most of the time.
SMALL = {
    "resnet18": {"n_blocks": (1, 1), "width": 1 / 16},
    "resnet50": {"n_blocks": (1, 1), "width": 1 / 16},
    "wrn16_4": {"depth": 10, "width": 1 / 16},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("resnet50", jnp.float32),
        ("wrn16_4", jnp.bfloat16),
    ],
)
def test_a_step(name, dtype):
    model = models.create(name, CIFAR, 10, dtype=dtype, **SMALL[name])
    variables = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(4, *CIFAR)), jnp.float32)

    @jax.jit
    def step(variables, images):
        def loss(params):
            logits, stats = model.apply(params, variables["batch_stats"], images, True)
            return -jnp.mean(jax.nn.log_softmax(logits)[:, 3]), (logits, stats)

        grads, (logits, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        evaluated = model.apply(
            variables["params"], variables["batch_stats"], images, False
        )
        return grads, logits, stats, evaluated

    grads, logits, stats, (evaluated, kept) = step(variables, images)
    assert logits.dtype == evaluated.dtype == jnp.float32
    assert logits.shape == evaluated.shape == (4, 10)
    leaves = jax.tree.leaves((variables, grads, stats))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    assert bool(jnp.any(grads["conv1"]["kernel"] != 0))
    # Evaluation leaves the statistics alone, training moves each of them.
    jax.tree.map(assert_array_equal, kept, variables["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), stats, kept)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_blocks_start_as_their_shortcuts(name):
    model = models.create(name, CIFAR, 10, **SMALL[name])
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    last = 3 if name == "resnet50" else 2
    for block in (p for k, p in params.items() if k.startswith("stage")):
        scales = {k: v["scale"] for k, v in block.items() if "norm" in k}
        for k, scale in scales.items():
            assert_array_equal(scale, jnp.full_like(scale, float(k != f"norm{last}")))


def test_kernels_start_with_the_variance_of_the_fan_out():
    kernel = he_fan_out(jax.random.key(0), (3, 3, 128, 64))
    assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_lowerings_reach_the_layers(name):
    with pytest.raises(ValueError, match="lowering='fft'"):
        models.create(name, CIFAR, 10, lowering="fft")


def test_impossible_sizes():
    with pytest.raises(ValueError, match="width=-1"):
        models.create("resnet18", CIFAR, 10, width=-1.0)
    with pytest.raises(ValueError, match="depth=20"):
        models.create("wrn16_4", CIFAR, 10, depth=20)
