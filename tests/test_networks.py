"""VGG, MobileNet, ViT and Fixup: published sizes, and their values by other means."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import special
from test_counting import mobilenet

from lottery_flow import models
from lottery_flow.models.fixup import FixupBlock
from lottery_flow.models.layers import Conv, delta_orthogonal
from lottery_flow.models.resnet import he_fan_out
from lottery_flow.models.vit import ViT
from lottery_flow.sparsity import masks

IMAGENET = (224, 224, 3)
CIFAR = (32, 32, 3)


def params_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))["params"]


def shapes(model):
    return {k: v.shape for k, v in masks.layers(params_of(model)).items()}


def kernel_of(model, layer):
    """Of the start; nothing else is computed."""

    def draw(key):
        return masks.layers(model.init(key)["params"])[layer]

    return np.asarray(jax.jit(draw)(jax.random.key(0)))


# --- Sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_shape", "n_classes", "options", "count"),
    [
        # 14,710,464 weights of the convolutions, as in the original.
        ("vgg16", IMAGENET, 1000, {}, 14_710_464 + 513 * 1000),
        # The usual one for CIFAR-10 has 4,224 biases more.
        ("vgg16_bn", CIFAR, 10, {}, 14_728_266 - 4224),
        ("mobilenet_v1", IMAGENET, 1000, {}, 4_231_976),
        ("mobilenet_v1", IMAGENET, 1000, {"width": 0.5}, 1_331_592),
        ("vit_s16", IMAGENET, 1000, {}, 22_050_664),
        ("resnet20", CIFAR, 10, {}, 272_474),
        # No normalisation, but 8 numbers for each bottleneck and 2 for the network.
        ("resnet50", IMAGENET, 1000, {"norm": "fixup"}, 25_502_912 + 1000 + 16 * 7 + 2),
    ],
)
def test_published_parameter_counts(name, image_shape, n_classes, options, count):
    params = params_of(models.create(name, image_shape, n_classes, **options))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_layers_of_vgg16():
    model = models.create("vgg16", IMAGENET, 1000)
    channels = [c for n, c in ((2, 64), (2, 128), (3, 256), (6, 512)) for _ in range(n)]
    expected = [(3, 3, i, o) for i, o in zip([3, *channels], channels, strict=False)]
    assert list(shapes(model).values()) == [(512, 1000), *expected]
    # Pooling after four stages alone: the last one sees what the fourth leaves.
    sides = [224, 224, 112, 112, 56, 56, 56, 28, 28, 28, 14, 14, 14]
    found = [model.positions[k] for k in shapes(model) if k != "fc"]
    assert found == [side**2 for side in sides]


def test_layers_of_mobilenet_are_those_of_the_flop_tables():
    model = models.create("mobilenet_v1", IMAGENET, 1000)
    found = {k: (math.prod(s), model.positions[k]) for k, s in shapes(model).items()}
    for name, shape, side in mobilenet():
        kind, _, block = name.removeprefix("conv").lstrip("_").partition("_")
        own = {"1": "conv1", "preds": "fc"}.get(kind)
        own = own or f"block{block}_" + {"dw": "depthwise", "pw": "pointwise"}[kind]
        # The tables count a strided convolution on images that are padded already.
        side -= side in (113, 57, 29, 15, 8)
        assert found.pop(own) == (math.prod(shape), side**2)
    assert not found


def test_positions_of_tokens_are_no_layer():
    model = models.create("vit_s16", CIFAR, 10, depth=1)
    assert sorted(shapes(model)) == sorted(model.positions)
    assert model.positions["patches"] == 4
    assert model.positions["block1/attention/query"] == 5  # and the class token
    assert model.positions["fc"] == 1


# --- Values --------------------------------------------------------------------------


def test_groups_are_those_of_flax():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 6)), jnp.float32)
    for groups, features in ((6, 6), (2, 4), (3, 3)):
        ours = Conv(features, (3, 3), 2, 1, groups=groups)
        theirs = nn.Conv(features, (3, 3), 2, 1, feature_group_count=groups)
        variables = ours.init(jax.random.key(0), x)
        other = theirs.init(jax.random.key(0), x)
        jax.tree.map(assert_array_equal, variables, other)
        assert_allclose(
            ours.apply(variables, x), theirs.apply(other, x), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("options", [{"groups": 4}, {"groups": 0}])
def test_groups_divide_the_channels(options):
    images = jax.ShapeDtypeStruct((1, 4, 4, 6), jnp.float32)
    with pytest.raises(ValueError, match=f"groups={options['groups']} must divide"):
        jax.eval_shape(Conv(6, (3, 3), **options).init, jax.random.key(0), images)


def test_vit_is_its_formula():
    """Again in numpy and float64, with every parameter away from its start."""
    model = models.create("vit_s16", CIFAR, 10, depth=2, width=1 / 8)
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(p + 0.2 * rng.normal(size=p.shape), jnp.float32), params
    )
    images = rng.normal(size=(3, *CIFAR)).astype(np.float32)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def norm(x, layer):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)
        return x * layer["scale"] + layer["bias"]

    def attention(x, layer):
        q, k, v = (dense(x, layer[name]) for name in ("query", "key", "value"))
        out = np.zeros_like(x)
        for head in range(6):
            own = slice(head * 8, head * 8 + 8)
            scores = q[..., own] @ k[..., own].swapaxes(-1, -2) / np.sqrt(8)
            out[..., own] = special.softmax(scores, axis=-1) @ v[..., own]
        return dense(out, layer["out"])

    def gelu(x):
        return x * 0.5 * (1 + special.erf(x / np.sqrt(2)))

    cut = images.astype(np.float64).reshape(3, 2, 16, 2, 16, 3)
    cut = cut.transpose(0, 1, 3, 2, 4, 5).reshape(3, 4, -1)
    tokens = cut @ p["patches"]["kernel"].reshape(-1, 48) + p["patches"]["bias"]
    first = np.broadcast_to(p["class_token"], (3, 1, 48))
    x = np.concatenate([first, tokens], axis=1) + p["position_embedding"]
    for i in (1, 2):
        block = p[f"block{i}"]
        x = x + attention(norm(x, block["norm1"]), block["attention"])
        hidden = gelu(dense(norm(x, block["norm2"]), block["fc1"]))
        x = x + dense(hidden, block["fc2"])
    expected = dense(norm(x, p["norm"])[:, 0], p["fc"])
    actual, _ = jax.jit(model.apply, static_argnums=3)(params, {}, images, False)
    assert_allclose(actual, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_patches_that_do_not_fit():
    with pytest.raises(ValueError, match="patch=16 does not divide images of 28 x 28"):
        models.create("vit_s16", (28, 28, 1), 10)
    with pytest.raises(ValueError, match=r"width=0\.01: no dimension"):
        models.create("vit_s16", CIFAR, 10, width=0.01)
    assert ViT(n_classes=10).depth == 12


@pytest.mark.parametrize("inner", [None, 4])
def test_a_fixup_block_is_its_formula(inner):
    """By XLA's convolution, with every bias and the scale away from their start."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 5)), jnp.float32)

    def conv(features, size, stride, pad, **options):
        return nn.Conv(features, size, stride, pad, use_bias=False, **options)

    block = FixupBlock(8, inner, 2, conv, n_blocks=9)
    variables = block.init(jax.random.key(0), x)["params"]
    n = 2 if inner is None else 3
    assert not np.any(variables[f"conv{n}"]["kernel"])  # starts as its shortcut
    rng = np.random.default_rng(2)
    p = jax.tree.map(
        lambda v: jnp.asarray(v + 0.3 * rng.normal(size=v.shape), jnp.float32),
        variables,
    )

    def convolve(x, name, stride, pad):
        kernel = p[name]["kernel"]
        dims, pads = ("NHWC", "HWIO", "NHWC"), [(pad, pad)] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=dims
        )

    start = x + p["bias1a"]
    pads, strides = ((1, 1), (2, 1)) if inner is None else ((0, 1, 0), (1, 2, 1))
    y = x
    for i in range(1, n + 1):
        y = convolve(y + p[f"bias{i}a"], f"conv{i}", strides[i - 1], pads[i - 1])
        if i < n:
            y = jax.nn.relu(y + p[f"bias{i}b"])
    y = y * p["scale"] + p[f"bias{n}b"]
    expected = jax.nn.relu(y + convolve(start, "shortcut", 2, 0))
    actual = block.apply({"params": p}, x)
    assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "power"), [("resnet20", -1 / 2), ("resnet50", -1 / 4)]
)
def test_fixup_scales_kernels_by_the_number_of_blocks(name, power):
    model = models.create(name, CIFAR, 10, norm="fixup")
    n_blocks = 9 if name == "resnet20" else 16
    layer = "conv1" if power == -1 / 2 else "conv2"
    kernel = kernel_of(model, f"stage3_block2/{layer}")
    he = np.sqrt(2 / (9 * kernel.shape[-1]))
    assert kernel.std() == pytest.approx(he * n_blocks**power, rel=0.02)
    assert not np.any(kernel_of(model, "fc"))


@pytest.mark.parametrize("shape", [(3, 3, 5, 8), (3, 3, 8, 5), (1, 1, 6, 6)])
def test_delta_orthogonal_kernels(shape):
    kernel = np.asarray(delta_orthogonal(jax.random.key(0), shape))
    centre = kernel[(shape[0] - 1) // 2, (shape[1] - 1) // 2]
    assert np.count_nonzero(kernel) == np.count_nonzero(centre) == centre.size
    short = centre @ centre.T if shape[2] <= shape[3] else centre.T @ centre
    assert_allclose(short, np.eye(min(shape[2:])), atol=1e-5)
    if shape[2] <= shape[3]:  # lengths are kept
        x = np.random.default_rng(0).normal(size=(1, 4, 4, shape[2])).astype(np.float32)
        conv = Conv(shape[3], shape[:2], use_bias=False)
        y = conv.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x))
        assert_allclose(
            np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
        )


def test_kernel_inits_by_name_reach_the_convolutions():
    options = {"kernel_init": "delta_orthogonal", "width": 1 / 16}
    model = models.create("vgg16", CIFAR, 10, **options)
    assert np.count_nonzero(kernel_of(model, "stage1_conv2")) == 4 * 4
    assert models.options("vgg16") >= {"width", "kernel_init", "dtype", "lowering"}
    assert "normalized" not in models.options("vgg16")
    assert he_fan_out is models.KERNEL_INITS["he_fan_out"]


def test_networks_compute_in_bfloat16():
    for name, shape, options in (
        ("mobilenet_v1", CIFAR, {"width": 1 / 16}),
        ("vit_s16", CIFAR, {"width": 1 / 8, "depth": 1}),
        ("resnet20", CIFAR, {"width": 1 / 4, "norm": "fixup"}),
    ):
        model = models.create(name, shape, 10, dtype="bfloat16", **options)
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
        trace = jax.make_jaxpr(model.apply, static_argnums=3)(
            variables["params"], variables.get("batch_stats", {}), images, True
        )
        products = [
            eqn.outvars[0].aval.dtype
            for eqn in _equations(trace.jaxpr)
            if eqn.primitive.name in ("dot_general", "conv_general_dilated")
        ]
        assert products.count(jnp.float32) == 1  # the last layer alone
        assert products.count(jnp.bfloat16) == len(products) - 1 > 0
        assert trace.out_avals[0].dtype == jnp.float32


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
