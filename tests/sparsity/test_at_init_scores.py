"""Scores at initialisation against numpy, explicit Hessians and finite differences.

A network of 4 inputs, 5 tanh units and 3 classes, in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lottery_flow.sparsity import at_init_scores as scores_lib
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.at_init_scores import Network

KEY = jax.random.key(0)
CUTS = ([6], [1, 3, 2])  # the same six examples in batches
PENALTY = 0.3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


def logits(params, batch):
    return dense(params["b"], jnp.tanh(dense(params["a"], batch["image"])))


def criterion(logits, batch):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, batch["label"][:, None], axis=1)[:, 0]


def penalty(params):
    return 0.5 * PENALTY * sum(jnp.sum(params[k]["kernel"] ** 2) for k in "ab")


NETWORK = Network(logits, criterion)


def make_params(shapes=((4, 5), (5, 3)), seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[-1:])}
        for name, shape in zip("abcd", shapes, strict=False)
    }


def make_batches(sizes=(6,)):
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(6, 4)), rng.integers(0, 3, 6)
    ends = np.cumsum(sizes)
    return [
        {"image": images[end - size : end], "label": labels[end - size : end]}
        for end, size in zip(ends, sizes, strict=True)
    ]


def full(params):
    return masks_lib.full(params, masks_lib.layers(params))


def half(params, seed=2):
    """Masks with about half of the weights, and the masked parameters."""
    rng = np.random.default_rng(seed)
    named = {k: rng.random(w.shape) < 0.5 for k, w in masks_lib.layers(params).items()}
    masks = masks_lib.from_named(named, params)
    return masks, jax.device_get(masks_lib.apply(masks, params))


def example_gradients(params, batch, temperature=1.0):
    """Kernel gradients of each example's loss, worked out by hand, in numpy."""
    a, b = params["a"], params["b"]
    grads = []
    for x, y in zip(batch["image"], batch["label"], strict=True):
        h = np.tanh(x @ a["kernel"] + a["bias"])
        z = (h @ b["kernel"] + b["bias"]) / temperature
        p = np.exp(z) / np.exp(z).sum()
        d_out = (p - np.eye(3)[y]) / temperature
        d_in = (b["kernel"] @ d_out) * (1 - h**2)
        grads.append({"a": np.outer(x, d_in), "b": np.outer(h, d_out)})
    return {k: np.stack([g[k] for g in grads]) for k in "ab"}


def assert_scores(scores, expected, where=None):
    """Scores of the kernels; biases have none."""
    for name, value in expected.items():
        assert scores[name]["bias"] is None
        chosen = np.ones(value.shape, bool) if where is None else where[name]["kernel"]
        got = np.asarray(scores[name]["kernel"])[chosen]
        np.testing.assert_allclose(got, value[chosen], rtol=1e-9, atol=1e-14)


def test_magnitude():
    params = make_params()
    scores = scores_lib.magnitude(KEY, params, full(params))
    assert_scores(scores, {k: np.abs(params[k]["kernel"]) for k in "ab"})


def test_random_scores_differ_between_weights_layers_and_keys():
    params = {k: {"kernel": np.zeros((30, 40))} for k in "ab"}
    draw = jax.jit(functools.partial(scores_lib.random, masks=full(params)))
    first, other = (draw(jax.random.key(i), params) for i in (0, 1))
    values = np.concatenate(
        [np.ravel(tree[k]["kernel"]) for tree in (first, other) for k in "ab"]
    )
    assert values.dtype == np.float32
    assert np.unique(values).size > 4790  # of 4,800
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 5 * 12**-0.5 / 4800**0.5


@pytest.mark.parametrize("sizes", CUTS)
def test_snip_is_the_mean_gradient_times_the_weight(sizes):
    """The scores don't depend on how the examples are cut into batches."""
    params = make_params()
    grads = example_gradients(params, *make_batches())
    expected = {k: np.abs(g.mean(0) * params[k]["kernel"]) for k, g in grads.items()}
    scores = scores_lib.snip(KEY, params, full(params), NETWORK, make_batches(sizes))
    assert_scores(scores, expected)


def test_snip_counts_a_penalty():
    params = make_params()
    grads = example_gradients(params, *make_batches())
    expected = {}
    for k, g in grads.items():
        w = params[k]["kernel"]
        expected[k] = np.abs((g.mean(0) + PENALTY * w) * w)
    network = NETWORK._replace(penalty=penalty)
    scores = scores_lib.snip(KEY, params, full(params), network, make_batches([2, 4]))
    assert_scores(scores, expected)


@pytest.mark.parametrize("sizes", CUTS)
def test_fisher_is_the_mean_of_squared_gradients(sizes):
    """The scores don't depend on how the examples are cut into batches."""
    params = make_params()
    grads = example_gradients(params, *make_batches())
    expected = {
        k: params[k]["kernel"] ** 2 * np.mean(g**2, 0) / 2 for k, g in grads.items()
    }
    scores = scores_lib.fisher(KEY, params, full(params), NETWORK, make_batches(sizes))
    assert_scores(scores, expected)


# GraSP


@functools.lru_cache(maxsize=1)
def flow_and_curvature():
    """`(kernels, params, temperature) -> (g, H)` over the flattened kernels."""
    (batch,) = make_batches()

    def loss(flat, unravel, params, temperature):
        kernels = unravel(flat)
        merged = {k: {**params[k], "kernel": kernels[k]} for k in "ab"}
        return jnp.mean(criterion(logits(merged, batch) / temperature, batch))

    def both(kernels, params, temperature):
        flat, unravel = ravel_pytree(kernels)
        args = flat, unravel, params, temperature
        return jax.grad(loss)(*args), jax.hessian(loss)(*args)

    return jax.jit(both)


def kernels_of(params):
    return {k: params[k]["kernel"] for k in "ab"}


def hessian_times_gradient(params, temperature, active):
    """H g over the active weights, from the whole matrix."""
    kernels = kernels_of(params)
    g, h = (np.asarray(x) for x in flow_and_curvature()(kernels, params, temperature))
    on = np.concatenate([np.ravel(active[k]) for k in "ab"])
    return jax.device_get(ravel_pytree(kernels)[1](jnp.asarray(h @ (g * on))))


@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("sizes", CUTS)
def test_grasp_keeps_by_the_hessian_times_the_gradient(temperature, sizes):
    """The scores don't depend on how the examples are cut into batches."""
    params = make_params()
    options = {} if temperature is None else {"temperature": temperature}
    masks = full(params)
    scores = scores_lib.grasp(
        KEY, params, masks, NETWORK, make_batches(sizes), **options
    )
    product = hessian_times_gradient(
        params, temperature or 200.0, {k: masks[k]["kernel"] for k in "ab"}
    )
    expected = {k: params[k]["kernel"] * product[k] for k in "ab"}
    scale = max(np.abs(x).max() for x in expected.values())
    scaled = jax.tree.map(lambda x: x / scale, scores)
    assert_scores(scaled, {k: x / scale for k, x in expected.items()})


def test_grasp_of_a_sparse_network_is_about_its_active_weights_alone():
    masks, params = half(make_params())
    scores = scores_lib.grasp(
        KEY, params, masks, NETWORK, make_batches(), temperature=1.0
    )
    active = {k: masks[k]["kernel"] for k in "ab"}
    product = hessian_times_gradient(params, 1.0, active)
    expected = {k: params[k]["kernel"] * product[k] for k in "ab"}
    assert_scores(scores, expected, masks)


def test_twice_the_score_of_grasp_is_the_loss_of_gradient_flow():
    """Shrinking a weight by 1e-5 of itself, one weight after another."""
    params, step = make_params(), 1e-5
    (batch,) = make_batches()
    scores = scores_lib.grasp(
        KEY, params, full(params), NETWORK, [batch], temperature=1.0
    )

    def squared_norm(temperature=1.0, **kernels):
        changed = {k: {**params[k], "kernel": kernels[k]} for k in "ab"}
        grads = example_gradients(changed, batch, temperature)
        return sum(np.sum(g.mean(0) ** 2) for g in grads.values())

    for name in "ab":
        for at in np.ndindex(params[name]["kernel"].shape):
            norms = []
            for sign in (-1, 1):
                kernels = {k: w.copy() for k, w in kernels_of(params).items()}
                kernels[name][at] *= 1 - sign * step
                norms.append(squared_norm(**kernels))
            loss_of_flow = (norms[0] - norms[1]) / (2 * step)
            score = float(scores[name]["kernel"][at])
            np.testing.assert_allclose(2 * score, loss_of_flow, rtol=1e-5, atol=1e-8)


def test_removing_what_grasp_scores_lowest_leaves_the_most_gradient_flow():
    """A hundredth of each of the ten lowest, or of the ten highest, is taken away."""
    params = make_params()
    (batch,) = make_batches()
    masks = full(params)
    scores = scores_lib.grasp(KEY, params, masks, NETWORK, [batch], temperature=1.0)
    flat, unravel = ravel_pytree(kernels_of(params))
    order = np.argsort(ravel_pytree(kernels_of(scores))[0])

    def flow(removed):
        kernels = unravel(flat.at[removed].mul(0.99))
        changed = {k: {**params[k], "kernel": np.asarray(kernels[k])} for k in "ab"}
        grads = example_gradients(changed, batch)
        return sum(np.sum(g.mean(0) ** 2) for g in grads.values())

    whole = flow(order[:0])
    assert flow(order[:10]) > whole > flow(order[-10:])


# SynFlow


SHAPES = ((4, 5), (5, 6), (6, 3))


def flow_logits(biases, params):
    x = jnp.ones((1, 4))
    for i, layer in enumerate(params.values()):
        x = jax.nn.relu(x) if i else x
        x = dense(layer, x) if biases else x @ layer["kernel"]
    return x


@pytest.fixture(scope="module")
def flows():
    """Networks for SynFlow alone, by whether they have biases."""
    return {
        biases: NETWORK._replace(ones=functools.partial(flow_logits, biases))
        for biases in (False, True)
    }


def flow_oracle(params, biases):
    """Scores and R by products of absolute matrices."""
    kernels = [np.abs(layer["kernel"]) for layer in params.values()]
    offsets = [np.abs(layer["bias"]) * biases for layer in params.values()]
    into = [np.ones(4)]
    for w, b in zip(kernels, offsets, strict=True):
        into.append(into[-1] @ w + b)
    out_of = [np.ones(3)]
    for w in kernels[:0:-1]:
        out_of.insert(0, w @ out_of[0])
    scores = [
        x[:, None] * w * y for x, w, y in zip(into, kernels, out_of, strict=False)
    ]
    return dict(zip(params, scores, strict=True)), into[-1].sum()


@pytest.mark.parametrize("biases", [False, True])
def test_synflow_is_a_product_of_absolute_matrices(flows, biases):
    params = make_params(SHAPES)
    scores = scores_lib.synflow(KEY, params, full(params), flows[biases])
    assert_scores(scores, flow_oracle(params, biases)[0])


def test_synflow_is_conserved_by_every_layer_and_hidden_unit(flows):
    """The scores of each layer add up to R; of a sparse network too."""
    masks, params = half(make_params(SHAPES))
    tree = scores_lib.synflow(KEY, params, masks, flows[False])
    scores = {k: np.asarray(layer["kernel"]) for k, layer in tree.items()}
    total = flow_oracle(params, False)[1]
    assert total > 1
    for layer in scores.values():
        np.testing.assert_allclose(layer.sum(), total, rtol=1e-12)
    for before, after in (("a", "b"), ("b", "c")):
        through = scores[before].sum(axis=0)
        np.testing.assert_allclose(through, scores[after].sum(axis=1), rtol=1e-12)


def test_synflow_of_a_smaller_input_and_smaller_logits_is_smaller(flows):
    params = make_params(SHAPES)

    def ones(params):
        first = {"a": {**params["a"], "kernel": 1e-3 * params["a"]["kernel"]}}
        return 1e-2 * flow_logits(False, {**params, **first})

    network = NETWORK._replace(ones=ones)
    scores = scores_lib.synflow(KEY, params, full(params), network)
    expected = scores_lib.synflow(KEY, params, full(params), flows[False])
    assert_scores(scores, {k: 1e-5 * v["kernel"] for k, v in expected.items()})


def test_synflow_needs_a_network_for_ones():
    params = make_params()
    with pytest.raises(ValueError, match=r"network\.ones is None"):
        scores_lib.synflow(KEY, params, full(params), NETWORK)


# all


@pytest.mark.parametrize("name", ["snip", "grasp", "fisher"])
def test_scores_of_no_examples(name):
    params = make_params()
    with pytest.raises(ValueError, match="batches is empty"):
        getattr(scores_lib, name)(KEY, params, full(params), NETWORK, [])


def test_scores_of_a_network_in_bfloat16_are_float32_and_work_under_jit():
    params = jax.tree.map(
        lambda x: jnp.asarray(0.2 * x, jnp.bfloat16), make_params(SHAPES)
    )
    masks = {k: {"kernel": None, "bias": None} for k in "abc"}
    masks["b"]["kernel"] = jnp.ones((5, 6), bool)
    images = jnp.ones((2, 4), jnp.bfloat16)
    batch = {"image": images, "label": jnp.array([0, 2])}

    def forward(params, batch):
        x = batch["image"]
        for layer in params.values():
            x = jnp.tanh(dense(layer, x))
        return x

    def ones(params):
        return forward(params, {"image": images[:1]})

    network = Network(forward, criterion, ones)
    scorers = scores_lib.snip, scores_lib.grasp, scores_lib.synflow, scores_lib.fisher

    @jax.jit
    def score(params):
        return [fn(KEY, params, masks, network, [batch]) for fn in scorers]

    for scores in score(params):
        leaves = jax.tree.leaves(scores)
        assert [(x.shape, x.dtype) for x in leaves] == [((5, 6), jnp.float32)]
        assert jnp.all(jnp.isfinite(leaves[0]))
        assert jnp.any(leaves[0] != 0)
