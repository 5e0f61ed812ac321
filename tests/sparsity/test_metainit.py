"""MetaInit against explicit Hessians and a loop in numpy, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import metainit
from lottery_flow.sparsity.active import active_space

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(scale=1.0):
    """A sparse network of 6-8-3 units with a bias; each input has active weights."""
    rng = np.random.default_rng(0)
    params = {
        "one": {
            "bias": jnp.asarray(rng.normal(size=8)),
            "kernel": jnp.asarray(scale * rng.normal(size=(6, 8))),
        },
        "two": {"kernel": jnp.asarray(scale * rng.normal(size=(8, 3)))},
    }
    masks = {
        "one": {"bias": None, "kernel": jnp.asarray(rng.random((6, 8)) < 0.6)},
        "two": {"kernel": None},
    }
    return masks_lib.apply(masks, params), masks


def loss_fn(params, batch):
    inputs, labels = batch
    hidden = jnp.tanh(inputs @ params["one"]["kernel"] + params["one"]["bias"][None])
    z = hidden @ params["two"]["kernel"]
    own = jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - own)


def make_batch(key):
    inputs, labels = metainit.noise(key, (16, 6), 3)
    return inputs.astype(jnp.float64), labels


def kernels_only(masks, params):
    """Masks of the kernels' active weights, and nothing of the biases."""
    return masks_lib.tree_map(
        lambda m, kernel, p: (
            np.zeros(p.shape, bool)
            if not kernel
            else np.ones(p.shape, bool)
            if m is None
            else m
        ),
        masks,
        masks_lib.in_layers(params),
        params,
    )


def gradient_and_hessian(params, batch):
    space = kernels_only(network()[1], params)

    def loss(vector):
        moved = active_space(params, space).unflatten(vector)
        whole = jax.tree.map(
            lambda kernel, new, old: new if kernel else old,
            masks_lib.in_layers(params),
            moved,
            params,
        )
        return loss_fn(whole, batch)

    at = active_space(params, space).flatten(params)
    both = jax.jit(lambda v: (jax.grad(loss)(v), jax.hessian(loss)(v)))(at)
    return map(np.asarray, both)


@partial(jax.jit, static_argnames="eps")
def quotient(params, batch, eps=1e-5):
    _, masks = network()
    return metainit.gradient_quotient(loss_fn, params, masks, batch, eps=eps)


def test_the_quotient_equals_that_of_the_explicit_hessian():
    params, _ = network()
    batch = make_batch(KEY)
    g, h = gradient_and_hessian(params, batch)
    assert len(g) < 48 + 24  # without what is inactive
    sign = np.where(g >= 0, 1, -1)
    for eps in (1e-5, 0.1):
        expected = np.mean(np.abs(1 - (g - h @ g) / (g + eps * sign)))
        assert float(quotient(params, batch, eps)) == pytest.approx(expected, rel=1e-9)


def test_the_quotient_by_hand():
    # Loss a w^2 / 2: g = a w, H g = a^2 w, so |1 - (1 - a)| = a without eps.
    params, masks = {"w": jnp.array([[2.0, 5.0]])}, {"w": jnp.array([[True, False]])}

    def loss(params, a):
        return a * jnp.sum(params["w"] ** 2) / 2

    for a in (0.0, 0.25, 3.0):
        found = metainit.gradient_quotient(
            loss, params, masks, jnp.float64(a), eps=1e-12
        )
        # No gradient, no change: |1 - 0 / eps|.
        assert float(found) == pytest.approx(a or 1.0, rel=1e-9)


def loop(params, n_steps, learning_rate, momentum):
    """The algorithm in numpy, with slopes from finite differences."""
    norms = [np.linalg.norm(params[k]["kernel"]) for k in ("one", "two")]
    start, velocity = list(norms), [0.0, 0.0]

    def at(norms):
        new = {k: dict(v) for k, v in params.items()}
        for k, n, n0 in zip(("one", "two"), norms, start, strict=True):
            new[k]["kernel"] = params[k]["kernel"] * (n / n0)
        return new

    values = []
    for i in range(n_steps):
        batch = make_batch(jax.random.fold_in(KEY, i))
        values.append(float(quotient(at(norms), batch)))
        slopes = []
        for j in range(2):
            ends = []
            for e in (1e-6, -1e-6):
                moved = list(norms)
                moved[j] += e
                ends.append(float(quotient(at(moved), batch)))
            slopes.append(ends[0] - ends[1])
        for j, slope in enumerate(slopes):
            velocity[j] = momentum * velocity[j] - learning_rate * np.sign(slope)
            norms[j] += velocity[j]
    return at(norms), values


@pytest.fixture(scope="module")
def scaled():
    with jax.enable_x64(True):
        params, masks = network(scale=4.0)
        options = dict(learning_rate=0.1, n_steps=100)
        result = metainit.metainit(KEY, params, masks, loss_fn, make_batch, **options)
    return params, masks, result


def test_steps_equal_a_loop_in_numpy():
    params, masks = network(scale=2.0)
    options = dict(learning_rate=0.02, momentum=0.9, n_steps=6)
    result = metainit.metainit(KEY, params, masks, loss_fn, make_batch, **options)
    expected, values = loop(params, 6, 0.02, 0.9)
    np.testing.assert_allclose(result.quotients, values, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9),
        result.params,
        expected,
    )


def test_the_quotient_falls(scaled):
    params, _, result = scaled
    fresh = [make_batch(jax.random.key(100 + i)) for i in range(20)]
    before = np.median([float(quotient(params, b)) for b in fresh])
    after = np.median([float(quotient(result.params, b)) for b in fresh])
    assert after < 0.5 * before


def test_kernels_are_scaled_and_nothing_else_changes(scaled):
    params, masks, result = scaled
    new = result.params
    mask = np.asarray(masks["one"]["kernel"])
    inactive = np.asarray(new["one"]["kernel"])[~mask]
    assert not inactive.view(np.uint64).any()
    for k, active in (("one", mask), ("two", np.ones((8, 3), bool))):
        ratio = np.asarray(new[k]["kernel"] / params[k]["kernel"])[active]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
        assert ratio[0] > 0
        assert abs(ratio[0] - 1) > 0.01
    np.testing.assert_array_equal(new["one"]["bias"], params["one"]["bias"])


def test_chosen_layers_alone_are_scaled():
    params, masks = network()
    result = metainit.metainit(
        KEY,
        params,
        masks,
        loss_fn,
        make_batch,
        learning_rate=0.02,
        n_steps=3,
        is_scaled=lambda name, leaf: name == "two",
    )
    np.testing.assert_array_equal(
        result.params["one"]["kernel"], params["one"]["kernel"]
    )
    assert (result.params["two"]["kernel"] != params["two"]["kernel"]).all()


def test_a_kernel_of_zeros_stays_and_no_norm_crosses_zero():
    params, masks = network()
    params["one"]["kernel"] = jnp.zeros((6, 8))
    result = metainit.metainit(  # in steps far longer than the norm
        KEY, params, masks, loss_fn, make_batch, learning_rate=30.0, n_steps=20
    )
    assert not np.asarray(result.params["one"]["kernel"]).any()
    ratio = np.asarray(result.params["two"]["kernel"] / params["two"]["kernel"])
    assert (ratio > 0).all()
    assert abs(ratio[0, 0] - 1) > 0.01
    assert np.isfinite(result.quotients).all()


def test_noise_is_standard_normal_with_uniform_labels():
    with jax.enable_x64(False):
        inputs, labels = metainit.noise(KEY, (3000, 2), 5)
    assert inputs.dtype == jnp.float32
    assert labels.dtype == jnp.int32
    assert stats.kstest(np.ravel(inputs), "norm").pvalue > 1e-3
    assert stats.chisquare(np.bincount(labels, minlength=5)).pvalue > 1e-3
