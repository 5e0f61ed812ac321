"""Both lowerings against flax, against each other and against numpy, differentiated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from lottery_flow import models
from lottery_flow.models.layers import LOWERINGS, Conv, choose_lowering, max_pool

PATHS = ("convolution", "patches")
PADDINGS = ("SAME", "VALID", 1, ((0, 2), (1, 0)), (1, 2))


def draw(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def close(actual, expected, tolerance=1e-5):
    """Equal to rounding, relative to the largest entry of each leaf."""

    def leaf(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-6))

    jax.tree.map(leaf, actual, expected)


def derivatives(module, params, x, cotangent):
    """Output and the gradients for the parameters and the input, as one program."""

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(module.apply, params, x)
        return y, pull(cotangent.astype(y.dtype))

    return run(params, x)


CASES = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "strides": st.sampled_from([1, 2, (1, 3), (2, 1)]),
        "padding": st.sampled_from(PADDINGS),
        "use_bias": st.booleans(),
        "size": st.tuples(st.integers(3, 7), st.integers(3, 7)),
        "channels": st.integers(1, 3),
        "dtype": st.sampled_from([None, jnp.float32, jnp.bfloat16]),
    }
)


@settings(max_examples=8)
@given(case=CASES)
def test_both_lowerings_are_those_of_flax(case):
    options = {k: case[k] for k in ("strides", "padding", "use_bias", "dtype")}
    (x,) = draw(0, (2, *case["size"], case["channels"]))
    reference = nn.Conv(4, case["kernel"], **options)
    params = reference.init(jax.random.key(0), x)
    (cotangent,) = draw(1, reference.apply(params, x).shape)
    expected = derivatives(reference, params, x, cotangent)
    tolerance = 4e-2 if case["dtype"] == jnp.bfloat16 else 1e-5
    for lowering in PATHS:
        module = Conv(4, case["kernel"], lowering=lowering, **options)
        actual = derivatives(module, params, x, cotangent)
        assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(
            jnp.result_type, expected
        )
        close(actual, expected, tolerance)


@pytest.mark.parametrize("use_bias", [True, False])
def test_parameters_and_their_initial_values_are_those_of_flax(use_bias):
    class Network(nn.Module):
        conv: type
        options: dict

        @nn.compact
        def __call__(self, x):
            options = {"use_bias": use_bias, **self.options}
            x = self.conv(5, (3, 2), **options, name="a")(x)
            he = nn.initializers.he_normal()
            return self.conv(2, (1, 1), kernel_init=he, **options, name="b")(x)

    x = jnp.ones((1, 6, 6, 3))
    expected = Network(nn.Conv, {}).init(jax.random.key(3), x)
    for lowering in LOWERINGS:
        network = Network(Conv, {"lowering": lowering, "dtype": jnp.bfloat16})
        actual = network.init(jax.random.key(3), x)
        jax.tree.map(assert_array_equal, actual, expected)


def convolve(x, kernel, bias, stride):
    """[b h w c] and [kh kw c o] in float64, without padding."""
    x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    kh, kw = kernel.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]
    return np.einsum("bpqcij,ijco->bpqo", windows, kernel) + bias


@pytest.mark.parametrize("lowering", PATHS)
@pytest.mark.parametrize("stride", [1, 2])
def test_output_and_gradients_agree_with_numpy(lowering, stride):
    x, kernel, bias = draw(2, (2, 6, 5, 2), (3, 2, 2, 3), (3,))
    module = Conv(3, (3, 2), stride, "VALID", lowering=lowering)
    params = {"params": {"kernel": kernel, "bias": bias}}
    expected = convolve(x, kernel, bias, stride)
    (cotangent,) = draw(3, expected.shape)
    y, (grads, grad_x) = derivatives(module, params, x, cotangent)
    close(y, expected, 1e-6)

    def gradient(fn, value):
        """The output is linear in each of its arguments: unit vectors will do."""
        basis = np.eye(value.size).reshape(-1, *value.shape)
        zero = fn(np.zeros(value.shape))
        sums = [np.sum(np.asarray(cotangent) * (fn(e) - zero)) for e in basis]
        return np.reshape(sums, value.shape)

    close(grad_x, gradient(lambda v: convolve(v, kernel, bias, stride), x))
    kernel_grad = gradient(lambda v: convolve(x, v, bias, stride), kernel)
    bias_grad = gradient(lambda v: convolve(x, kernel, v, stride), bias)
    close(grads["params"], {"kernel": kernel_grad, "bias": bias_grad})


def loss_fn(lowering):
    module = Conv(4, (3, 3), padding="SAME", lowering=lowering)

    def loss(kernel, bias, x):
        params = {"params": {"kernel": kernel, "bias": bias}}
        y = nn.relu(module.apply(params, x))
        return jnp.mean(jnp.square(max_pool(y, (2, 2), (2, 2))))

    return loss


ARGUMENTS = ((3, 3, 2, 4), (4,), (3, 6, 6, 2))


@pytest.mark.parametrize("shared", [False, True])
def test_a_population_has_the_gradients_of_its_members(shared):
    n = 3
    kernel, bias, x = draw(4, *((n, *shape) for shape in ARGUMENTS))
    grad = jax.jit(jax.grad(loss_fn("convolution"), (0, 1, 2)))
    members = [grad(kernel[i], bias[i], x[0 if shared else i]) for i in range(n)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    population = jax.jit(
        jax.vmap(jax.grad(loss_fn("patches"), (0, 1, 2)), (0, 0, None if shared else 0))
    )
    arguments = (kernel, bias, x[0] if shared else x)
    close(population(*arguments), expected)
    hlo = population.lower(*arguments).compile().as_text()
    assert " convolution(" not in hlo
    assert " dot(" in hlo or "ynn_fusion" in hlo


def test_inside_scan():
    kernel, bias, x = draw(5, *ARGUMENTS)

    def train(lowering):
        def step(params, _):
            grads = jax.grad(loss_fn(lowering), (0, 1))(*params, x)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

        return jax.jit(lambda params: jax.lax.scan(step, params, length=3)[0])

    close(train("patches")((kernel, bias)), train("convolution")((kernel, bias)))


def test_forward_over_reverse():
    primals, tangents = (draw(seed, *ARGUMENTS) for seed in (6, 7))

    def hvp(lowering):
        grad = jax.grad(loss_fn(lowering), (0, 1, 2))
        return jax.jit(lambda p, t: jax.jvp(grad, p, t))(
            tuple(primals), tuple(tangents)
        )

    close(hvp("patches"), hvp("convolution"))


@pytest.mark.parametrize("lowering", ["", "Patches", "im2col"])
def test_unknown_lowering(lowering):
    message = f"lowering='{lowering}': choose one of auto, convolution, patches"
    with pytest.raises(ValueError, match=message):
        models.create("lenet5", (28, 28, 1), 10, lowering=lowering)


def test_unknown_padding():
    with pytest.raises(ValueError, match="padding='CIRCULAR'"):
        Conv(1, (3, 3), padding="CIRCULAR").init(
            jax.random.key(0), jnp.ones((1, 4, 4, 1))
        )


@pytest.mark.parametrize(
    ("kernel_shape", "expected"),
    [
        ((5, 5, 1, 6), "patches"),
        ((5, 5, 6, 16), "patches"),
        ((1, 1, 3, 16), "convolution"),
        ((3, 3, 16, 16), "convolution"),
        ((7, 7, 3, 64), "convolution"),
    ],
)
def test_auto_takes_patches_for_few_channels_on_cpus(
    kernel_shape, expected, monkeypatch
):
    assert choose_lowering("auto", kernel_shape) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_lowering("auto", kernel_shape) == "convolution"
    assert choose_lowering("patches", kernel_shape) == "patches"


def test_lenet5_hands_its_lowering_to_its_convolutions():
    x, cotangent = draw(8, (2, 28, 28, 1), (2, 10))

    def run(lowering):
        model = models.create("lenet5", (28, 28, 1), 10, lowering=lowering)
        params = jax.jit(model.init)(jax.random.key(0))["params"]

        def apply(params):
            return model.apply(params, {}, x, False)[0]

        @jax.jit
        def run(params):
            logits, pull = jax.vjp(apply, params)
            return logits, pull(cotangent)

        return run(params), run.lower(params).compile().as_text()

    (expected, convolution), (actual, patches) = map(run, PATHS)
    assert " convolution(" in convolution
    assert " convolution(" not in patches
    close(actual, expected)


POOLS = st.fixed_dictionaries(
    {
        "window": st.sampled_from([(2, 2), (3, 3), (1, 2), (3, 2)]),
        "strides": st.sampled_from([None, (2, 2), (1, 1)]),
        "size": st.tuples(st.integers(3, 7), st.integers(3, 7)),
        "seed": st.integers(0, 99),
        "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
    }
)


@settings(max_examples=10)
@given(case=POOLS)
def test_max_pool_is_that_of_flax_ties_and_nan_included(case):
    window, strides = case["window"], case["strides"] or case["window"]
    rng = np.random.default_rng(case["seed"])
    x = rng.integers(-1, 2, (2, *case["size"], 2)).astype(float)  # many ties
    holed = np.where(rng.uniform(size=x.shape) < 0.1, np.nan, x)

    def run(pool):
        @jax.jit
        def outputs(x, holed):
            y, pull = jax.vjp(lambda x: pool(x, window, strides=strides), x)
            # Whole numbers, all different.
            cotangent = jnp.arange(y.size).reshape(y.shape).astype(y.dtype)
            return y, pull(cotangent)[0], pool(holed, window, strides=strides)

        outputs = outputs(
            jnp.asarray(x, case["dtype"]), jnp.asarray(holed, case["dtype"])
        )
        assert outputs[0].dtype == outputs[1].dtype == case["dtype"]
        return jax.tree.map(lambda a: np.asarray(a, np.float32), outputs)

    jax.tree.map(assert_array_equal, run(max_pool), run(nn.max_pool))


def test_max_pool_on_other_backends(monkeypatch):
    (x,) = draw(9, (2, 4, 4, 3))
    expected = max_pool(x, (2, 2), (2, 2))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_array_equal(max_pool(x, (2, 2), (2, 2)), expected)
