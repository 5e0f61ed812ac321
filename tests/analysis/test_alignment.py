"""Permutations that change no function, and matchings by brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow import models
from lottery_flow.analysis import alignment, geometry, results
from lottery_flow.sparsity import masks as masks_lib

LENET = ("conv1", "conv2", "fc1", "fc2", "fc3")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_like(tree, seed):
    """Standard normal numbers, as every weight should differ."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape), tree)


def sparse(params, seed, density=0.5):
    """Random masks of the kernels, and the masked parameters, in numpy."""
    rng = np.random.default_rng(seed)
    masks = jax.tree.map(
        lambda w: rng.random(w.shape) < density if w.ndim > 1 else None, params
    )
    return masks, masks_lib.tree_map(
        lambda m, w: w if m is None else np.where(m, w, 0.0), masks, params
    )


@functools.cache
def lenet():
    """A small LeNet-5 on 20 x 20 images: its flattened images have blocks of 2 x 2."""
    model = models.create("lenet5", (20, 20, 1), 3, widths=(3, 4, 7, 5))
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    return model, shapes


@functools.cache
def mlp():
    model = models.create("mlp", (3, 3, 1), 3, widths=(6, 5, 4))
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    return model, shapes


def shuffled(spec, params, seed):
    """A random permutation of all hidden units of a chain."""
    rng = np.random.default_rng(seed)
    sizes = {
        axes[-1]: masks_lib.named_leaves(params)[name].shape[-1]
        for name, axes in spec.items()
        if name in masks_lib.layers(params) and axes[-1] is not None
    }
    return {name: rng.permutation(n) for name, n in sizes.items()}


# Specifications


def test_the_specification_of_lenet5_is_that_of_a_chain():
    _, params = lenet()
    assert alignment.chain(params, LENET) == {
        "conv1": (None, None, None, "conv1"),
        "conv1/bias": ("conv1",),
        "conv2": (None, None, "conv1", "conv2"),
        "conv2/bias": ("conv2",),
        "fc1": ("conv2", "fc1"),
        "fc1/bias": ("fc1",),
        "fc2": ("fc1", "fc2"),
        "fc2/bias": ("fc2",),
        "fc3": ("fc2", None),
        "fc3/bias": (None,),
    }


def test_norms_follow_their_layer():
    net = network(norm=True)
    spec = alignment.chain(
        net.params, ("conv", "hidden", "logits"), norms={"conv": "norm"}
    )
    for leaf in ("scale", "bias", "mean", "var"):
        assert spec[f"norm/{leaf}"] == ("conv",)


@pytest.mark.parametrize(
    ("layers", "norms", "message"),
    [
        (("conv1", "conv2", "fc2", "fc1", "fc3"), {}, "fc2 has 7 inputs but follows"),
        (("conv1", "conv3"), {}, "no layer conv3"),
        (LENET, {"conv7": "norm"}, "no layer conv7"),
        (("conv1", "conv2", "fc1"), {}, "has None for fc2/bias"),
    ],
)
def test_a_wrong_chain_is_named(layers, norms, message):
    _, params = lenet()
    with pytest.raises(ValueError, match=message):
        alignment.chain(params, layers, norms)


# Permuting


def test_a_permutation_says_where_each_unit_comes_from():
    spec = {"a": (None, "p"), "b": ("p", None)}
    tree = {
        "a": {"kernel": np.array([[10, 20, 30]])},
        # Two blocks of three channels.
        "b": {"kernel": np.array([[1], [2], [3], [4], [5], [6]])},
    }
    found = alignment.permute(spec, {"p": np.array([2, 0, 1])}, tree)
    assert found["a"]["kernel"].tolist() == [[30, 10, 20]]
    assert found["b"]["kernel"].ravel().tolist() == [3, 1, 2, 6, 4, 5]


@pytest.mark.parametrize(("build", "layers"), [(lenet, LENET), (mlp, None)])
def test_the_function_stays_and_masks_follow_their_weights(build, layers):
    model, shapes = build()
    layers = layers or ("fc1", "fc2", "fc3", "fc4")
    spec = alignment.chain(shapes, layers)
    masks, params = sparse(random_like(shapes, 0), 1)
    permutations = shuffled(spec, params, 2)
    moved = alignment.permute(spec, permutations, params)
    moved_masks = alignment.permute(spec, permutations, masks)
    for name, leaf in masks_lib.named_leaves(moved).items():
        assert np.any(leaf != masks_lib.named_leaves(params)[name]) != (
            name == f"{layers[-1]}/bias"
        )
    for name, mask in masks_lib.named_leaves(moved_masks).items():
        if mask is not None:
            np.testing.assert_array_equal(
                masks_lib.named_leaves(moved)[name] != 0, mask
            )
    shape = (20, 20, 1) if build is lenet else (3, 3, 1)
    images = jnp.asarray(np.random.default_rng(3).standard_normal((2, *shape)))
    logits = jax.jit(lambda p: model.apply(p, {}, images, False)[0])
    assert np.std(logits(params)) > 0.1
    np.testing.assert_allclose(logits(moved), logits(params), rtol=1e-11, atol=1e-11)


def test_the_function_stays_with_norms_and_their_statistics():
    net = network(norm=True)
    spec = alignment.chain(
        net.params, ("conv", "hidden", "logits"), norms={"conv": "norm"}
    )
    permutations = {"conv": np.array([1, 2, 0]), "hidden": np.array([4, 2, 0, 1, 3])}
    moved, stats = (
        alignment.permute(spec, permutations, tree)
        for tree in (net.params, net.batch_stats)
    )
    apply = jax.jit(lambda p, s: net.model.apply(p, s, net.data["image"], False)[0])
    wanted = apply(net.params, net.batch_stats)
    np.testing.assert_allclose(apply(moved, stats), wanted, rtol=1e-12)
    assert np.max(np.abs(apply(moved, net.batch_stats) - wanted)) > 1e-3


def test_units_left_out_keep_their_places():
    _, shapes = mlp()
    spec = alignment.chain(shapes, ("fc1", "fc2", "fc3", "fc4"))
    params = random_like(shapes, 0)
    moved = alignment.permute(spec, {"fc2": np.array([1, 0, 2, 3, 4])}, params)
    np.testing.assert_array_equal(moved["fc1"]["kernel"], params["fc1"]["kernel"])
    np.testing.assert_array_equal(
        moved["fc2"]["bias"], params["fc2"]["bias"][[1, 0, 2, 3, 4]]
    )


@pytest.mark.parametrize(
    "permutation", [[0, 2], [0, 1, 2, 3], [0, 1, 2, 3, 3, 4], [6, 1, 2, 3, 4, 5]]
)
def test_what_is_no_permutation_is_refused(permutation):
    _, shapes = mlp()
    spec = alignment.chain(shapes, ("fc1", "fc2", "fc3", "fc4"))
    params = random_like(shapes, 0)
    with pytest.raises(ValueError, match="does not fit fc1"):
        alignment.permute(spec, {"fc1": np.array(permutation)}, params)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"a": (None, "p")}, "has None for b of shape"),
        ({"a": (None, "p"), "b": ("p",)}, r"has \('p',\) for b of shape"),
        ({"a": (None, "p"), "b": (None, "p")}, "p of 3 units does not fit axis 1 of b"),
    ],
)
def test_a_specification_that_does_not_fit_is_refused(spec, message):
    tree = {"a": np.zeros((2, 3)), "b": np.zeros((3, 4))}
    with pytest.raises(ValueError, match=message):
        alignment.permute(spec, {}, tree)


# Matching


def distance(a, b):
    frame = geometry.distances(a, b)
    return frame.loc[frame["layer"] == "all", "l2"].item()


@pytest.mark.parametrize(("build", "layers"), [(lenet, LENET), (mlp, None)])
@pytest.mark.parametrize("seed", range(5))
def test_a_permuted_copy_comes_back_to_the_bit(build, layers, seed):
    _, shapes = build()
    spec = alignment.chain(shapes, layers or ("fc1", "fc2", "fc3", "fc4"))
    _, a = sparse(random_like(shapes, seed), seed + 100)
    b = alignment.permute(spec, shuffled(spec, a, seed + 200), a)
    assert distance(a, b) > 1
    found = alignment.permute(spec, alignment.weight_matching(spec, a, b), b)
    jax.tree.map(np.testing.assert_array_equal, found, a)


def narrow(seed):
    """A chain whose first layer says little about the deeper ones, and its spec."""
    widths = (2, 12, 12, 12, 2)
    shapes = {
        f"fc{i}": {"kernel": np.zeros((m, n)), "bias": np.zeros(n)}
        for i, (m, n) in enumerate(itertools.pairwise(widths), start=1)
    }
    spec = alignment.chain(shapes, ("fc1", "fc2", "fc3", "fc4"))
    return spec, sparse(random_like(shapes, seed), seed + 100)[1]


@pytest.mark.parametrize("seed", range(5))
def test_a_permuted_copy_comes_back_where_a_start_at_the_identity_is_trapped(seed):
    spec, a = narrow(seed)
    b = alignment.permute(spec, shuffled(spec, a, seed + 200), a)
    found = alignment.permute(spec, alignment.weight_matching(spec, a, b), b)
    jax.tree.map(np.testing.assert_array_equal, found, a)


@pytest.mark.parametrize("seed", range(5))
def test_a_matched_network_is_not_farther_where_a_start_at_the_input_is_trapped(seed):
    spec, a = narrow(seed)
    # All units of the first layer alike, up to noise.
    a = {**a, "fc1": jax.tree.map(np.ones_like, a["fc1"])}
    noise = random_like(a, seed + 50)
    scale = {**dict.fromkeys(a, 0.01), "fc1": 0.3}
    b = {
        layer: jax.tree.map(
            lambda w, e, s=scale[layer]: w + s * e, a[layer], noise[layer]
        )
        for layer in a
    }
    matched = alignment.permute(spec, alignment.weight_matching(spec, a, b), b)
    assert distance(a, matched) <= distance(a, b)


def test_a_permuted_copy_comes_back_through_noise():
    _, shapes = lenet()
    spec = alignment.chain(shapes, LENET)
    a = random_like(shapes, 0)
    permutations = shuffled(spec, a, 1)
    noise = random_like(shapes, 2)
    near = jax.tree.map(lambda w, e: w + 0.1 * e, a, noise)
    b = alignment.permute(spec, permutations, near)
    found = alignment.weight_matching(spec, a, b)
    for name, permutation in permutations.items():
        np.testing.assert_array_equal(
            permutation[found[name]], np.arange(len(permutation))
        )


def test_one_hidden_layer_is_matched_as_brute_force_does():
    spec = {"a": (None, "p"), "a/bias": ("p",), "b": ("p", None)}
    shapes = {
        "a": {"kernel": np.zeros((2, 5)), "bias": np.zeros(5)},
        "b": {"kernel": np.zeros((5, 3))},
    }
    a, b = random_like(shapes, 0), random_like(shapes, 1)
    least = min(
        (distance(a, alignment.permute(spec, {"p": np.array(p)}, b)), p)
        for p in itertools.permutations(range(5))
    )
    found = alignment.weight_matching(spec, a, b)
    assert tuple(found["p"]) == least[1]
    assert least[1] != (0, 1, 2, 3, 4)


@pytest.mark.parametrize("seed", range(5))
def test_matching_ends_where_no_single_permutation_is_better(seed):
    _, shapes = mlp()
    spec = alignment.chain(shapes, ("fc1", "fc2", "fc3", "fc4"))
    a, b = random_like(shapes, seed), random_like(shapes, seed + 50)
    found = alignment.weight_matching(spec, a, b)
    matched = alignment.permute(spec, found, b)
    least = distance(a, matched)
    assert least < distance(a, b)
    # Each permutation of fc3's four units alone, and each exchange of two others.
    for p in itertools.permutations(range(4)):
        other = alignment.permute(spec, {"fc3": np.array(p)}, matched)
        assert distance(a, other) >= least - 1e-12
    for layer, n in (("fc1", 6), ("fc2", 5)):
        for i, j in itertools.combinations(range(n), 2):
            p = np.arange(n)
            p[[i, j]] = p[[j, i]]
            other = alignment.permute(spec, {layer: p}, matched)
            assert distance(a, other) >= least - 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_a_matched_network_stays_as_it_is(seed):
    _, shapes = lenet()
    spec = alignment.chain(shapes, LENET)
    a, b = random_like(shapes, seed), random_like(shapes, seed + 50)
    b = alignment.permute(spec, alignment.weight_matching(spec, a, b), b)
    for name, found in alignment.weight_matching(spec, a, b).items():
        np.testing.assert_array_equal(found, np.arange(len(found)), err_msg=name)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_units_keep_their_places_where_no_other_is_better(order):
    spec = {"a": (None, "p"), "b": ("p", None)}
    alike = {"a": np.ones((2, 3)), "b": np.zeros((3, 2))}
    other = {"a": np.ones((2, 1)) * np.array([order]) + 1.0, "b": np.zeros((3, 2))}
    found = alignment.weight_matching(spec, alike, other)
    np.testing.assert_array_equal(found["p"], np.arange(3))


def residual(params, x):
    """A stream of four, to which a branch of three adds twice."""
    stream = jnp.tanh(x @ params["in"]["kernel"])
    for name in ("one", "two"):
        inner = jnp.tanh(stream @ params[name]["up"] + params[name]["bias"][None])
        stream = stream + inner @ params[name]["down"]
    return stream @ params["out"]["kernel"]


RESIDUAL = {
    "in": (None, "stream"),
    "one/up": ("stream", "one"),
    "one/bias": ("one",),
    "one/down": ("one", "stream"),
    "two/up": ("stream", "two"),
    "two/bias": ("two",),
    "two/down": ("two", "stream"),
    "out": ("stream", None),
}


def residual_params(seed):
    block = {"up": np.zeros((4, 3)), "bias": np.zeros(3), "down": np.zeros((3, 4))}
    ends = {"in": {"kernel": np.zeros((5, 4))}, "out": {"kernel": np.zeros((4, 2))}}
    return random_like({"one": block, "two": block, **ends}, seed)


def test_a_residual_stream_has_one_permutation():
    params = residual_params(0)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 5)))
    permutations = {
        "stream": np.array([3, 0, 1, 2]),
        "one": np.array([1, 2, 0]),
        "two": np.array([2, 1, 0]),
    }
    moved = alignment.permute(RESIDUAL, permutations, params)
    np.testing.assert_allclose(residual(moved, x), residual(params, x), rtol=1e-12)
    found = alignment.weight_matching(RESIDUAL, params, moved)
    back = alignment.permute(RESIDUAL, found, moved)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_one_permutation_on_two_axes_of_a_leaf_cannot_be_matched():
    spec = {"in": (None, "p"), "loop": ("p", "p"), "out": ("p", None)}
    params = random_like(
        {"in": np.zeros((2, 3)), "loop": np.zeros((3, 3)), "out": np.zeros((3, 2))}, 0
    )
    moved = alignment.permute(spec, {"p": np.array([2, 0, 1])}, params)
    assert moved["loop"][0, 1] == params["loop"][2, 0]
    with pytest.raises(ValueError, match="p rules two axes of one leaf"):
        alignment.weight_matching(spec, params, moved)


def test_networks_of_two_models_are_not_matched():
    spec = {"a": (None, "p"), "b": ("p", None)}
    a = {"a": np.zeros((2, 3)), "b": np.zeros((3, 4))}
    with pytest.raises(ValueError, match="the networks differ at a"):
        alignment.weight_matching(spec, a, {**a, "a": np.zeros((2, 6))})


# Results


def test_distances_are_compared_saved_and_plotted(tmp_path):
    spec = {"a": (None, "p"), "b": ("p", None)}
    a = {"a": np.array([[1.0, 2.0]]), "b": np.array([[3.0], [4.0]])}
    b = {"a": np.array([[2.0, 1.0]]), "b": np.array([[4.0], [5.0]])}
    frame = alignment.compare(spec, a, b, {"p": np.array([1, 0])})
    assert frame["layer"].tolist() == ["a", "b", "all"] * 2
    assert frame["aligned"].tolist() == [False] * 3 + [True] * 3
    np.testing.assert_allclose(
        frame["l2"], [2**0.5, 2**0.5, 2.0, 0.0, 2.0, 2.0], rtol=1e-12
    )
    saved = results.load(results.save(tmp_path / "distances.csv", frame))
    np.testing.assert_allclose(saved["l2"], frame["l2"])
    figure = alignment.plot_compare(frame)
    assert isinstance(figure, Figure)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, frame["l2"])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["before", "after"]
