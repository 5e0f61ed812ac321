"""Initialisers against the variances of their formulas, counted on the host."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import stats

from lottery_flow.sparsity import initializers, masks

DRAWS = 8
FANS = ("fan_in", "fan_out", "fan_avg")
DISTRIBUTIONS = ("normal", "uniform", "truncated")
NAMES = ("masked_dense", "layer_scaled", "per_neuron")
TRUNCATED_STD = stats.truncnorm(-2, 2).std()
FAN_INS = (0, 1, 2, 4, 8, 16)  # of output 0, 1, ..., and again


def uneven(shape):
    """Dead outputs, a dead input, very different fan-ins and fan-outs."""
    rng = np.random.default_rng(0)
    rows, n_out = int(np.prod(shape[:-1])), shape[-1]
    inputs = np.arange(rows) % shape[-2]
    mask = np.zeros((rows, n_out), bool)
    for o in range(n_out):
        p = inputs / inputs.sum()
        chosen = rng.choice(rows, FAN_INS[o % len(FAN_INS)], replace=False, p=p)
        mask[chosen, o] = True
    return mask.reshape(shape)


UNEVEN = {
    "conv": {"kernel": uneven((3, 3, 8, 300)), "bias": None},
    "dense": {"kernel": uneven((40, 300)), "bias": None},
}
EVEN = jax.tree.map(np.ones_like, UNEVEN)


def fresh_params(dtype=jnp.float32):
    return jax.tree.map(
        lambda mask: jnp.ones(mask.shape, dtype),
        {k: {"kernel": v["kernel"], "bias": np.ones(300)} for k, v in UNEVEN.items()},
    )


@functools.cache
def draws(name, **options):
    """Kernels of several keys, by layer, with a leading axis of draws."""
    mask_tree, params = jax.tree.map(jnp.asarray, UNEVEN), fresh_params()
    initialise = functools.partial(initializers.INITIALIZERS[name], **options)
    kernels = [initialise(jax.random.key(i), params, mask_tree) for i in range(DRAWS)]
    return {k: np.stack([np.asarray(x[k]["kernel"]) for x in kernels]) for k in UNEVEN}


def expected_std(name, mask, fan, gain):
    """The standard deviation of every weight, by the formulas of the paper."""
    spatial = tuple(range(mask.ndim - 2))
    counted = mask if name == "per_neuron" else np.ones_like(mask)
    fan_in = np.maximum(counted.sum(axis=(*spatial, -2)), 1)[None, :]
    fan_out = np.maximum(counted.sum(axis=(*spatial, -1)), 1)[:, None]
    fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    density = mask.mean() if name == "layer_scaled" else 1.0
    return np.broadcast_to(np.sqrt(gain / (fans[fan] * density)), mask.shape)


def worst_deviation(sample, mask, std):
    """Of the second moment of every kind of unit, in its standard errors.

    The kinds are the outputs of equal fan-in, and each input. One error is
    sqrt(2/n) for n normal draws, and less for the flatter ones.
    """
    square = np.square(sample / std).mean(axis=0) * mask
    flat, counts = (x.reshape(-1, *mask.shape[-2:]).sum(axis=0) for x in (square, mask))
    worst = 0.0
    for axis, period in ((1, mask.shape[-2]), (0, len(FAN_INS))):
        for unit in range(period):
            n = counts.sum(axis=axis)[unit::period].sum()
            moment = flat.sum(axis=axis)[unit::period].sum() / max(n, 1)
            worst = max(worst, abs(moment - 1) * np.sqrt(DRAWS * n / 2) if n else 0.0)
    return worst


# Variance: within 5 standard errors


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("fan", FANS)
@pytest.mark.parametrize("name", NAMES)
def test_variance_of_every_unit(name, fan, distribution):
    samples = draws(name, fan=fan, distribution=distribution, gain=1.5)
    for layer, sample in samples.items():
        mask = UNEVEN[layer]["kernel"]
        std = expected_std(name, mask, fan, 1.5)
        assert worst_deviation(sample, mask, std) < 5
        mean = (sample / std)[:, mask].mean()
        assert abs(mean) < 5 / np.sqrt(DRAWS * mask.sum())


@pytest.mark.parametrize("fan", FANS)
@pytest.mark.parametrize("name", NAMES)
def test_the_test_of_the_variance_rejects_every_other_formula(name, fan):
    sample = draws(name, fan=fan, distribution="normal", gain=1.5)["conv"]
    mask = UNEVEN["conv"]["kernel"]
    for other in itertools.product(NAMES, FANS):
        deviation = worst_deviation(
            sample, mask, expected_std(other[0], mask, other[1], 1.5)
        )
        assert (deviation > 5) == (other != (name, fan))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("masked_dense", dict(fan="fan_avg", distribution="uniform", gain=1.0)),
        ("layer_scaled", dict(fan="fan_in", distribution="truncated", gain=2.0)),
        ("per_neuron", dict(fan="fan_in", distribution="normal", gain=2.0)),
    ],
)
def test_defaults(name, options):
    by_default, explicit = draws(name), draws(name, **options)
    np.testing.assert_array_equal(by_default["conv"], explicit["conv"])


# Distribution


@pytest.mark.parametrize(
    ("distribution", "limit", "law"),
    [
        ("normal", np.inf, stats.norm()),
        ("uniform", np.sqrt(3), stats.uniform(-np.sqrt(3), 2 * np.sqrt(3))),
        (
            "truncated",
            2 / TRUNCATED_STD,
            stats.truncnorm(-2, 2, scale=1 / TRUNCATED_STD),
        ),
    ],
)
def test_support_and_law(distribution, limit, law):
    z = []
    for layer, sample in draws(
        "per_neuron", fan="fan_in", distribution=distribution, gain=1.5
    ).items():
        mask = UNEVEN[layer]["kernel"]
        z.append((sample / expected_std("per_neuron", mask, "fan_in", 1.5))[:, mask])
    z = np.concatenate([x.ravel() for x in z])
    assert np.abs(z).max() <= limit * (1 + 1e-6)
    assert np.abs(z).max() > 0.999 * min(limit, 4)
    assert stats.kstest(z, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("fan", FANS)
def test_for_a_full_mask_all_three_have_the_same_distribution(fan, distribution):
    """Given the same options even the same values."""
    key, params = jax.random.key(0), fresh_params()
    full = jax.tree.map(jnp.asarray, EVEN)
    options = dict(fan=fan, distribution=distribution, gain=2.0)
    first, *others = (
        initializers.INITIALIZERS[name](key, params, tree, **options)
        for name in NAMES
        for tree in (full, masks.dense(params))
    )
    for other in others:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), first, other
        )


def test_a_network_keeps_what_it_drew_itself():
    """Inactive weights aside; masked or not, biases keep their bits."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), fresh_params()
    )
    mask_tree = jax.tree.map(jnp.asarray, UNEVEN)
    mask_tree["conv"]["bias"] = jnp.zeros(300, bool)
    mask_tree["dense"]["kernel"] = None
    new = initializers.INITIALIZERS["module"](jax.random.key(0), params, mask_tree)
    kernel = np.where(UNEVEN["conv"]["kernel"], params["conv"]["kernel"], 0)
    np.testing.assert_array_equal(new["conv"]["kernel"], kernel)
    for layer, leaf in (("conv", "bias"), ("dense", "kernel"), ("dense", "bias")):
        np.testing.assert_array_equal(new[layer][leaf], params[layer][leaf])


# Guarantees on every draw


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_inactive_weights_are_exactly_zero_and_dead_units_give_no_nan(name, dtype):
    mask_tree = jax.tree.map(jnp.asarray, UNEVEN)
    mask_tree["dense"]["kernel"] = jnp.zeros((40, 300), bool)
    for fan in FANS:
        with jax.debug_nans(True), jax.debug_infs(True):  # on the way, too
            new = initializers.INITIALIZERS[name](
                jax.random.key(0), fresh_params(dtype), mask_tree, fan=fan
            )
        for layer in ("conv", "dense"):
            kernel = np.asarray(new[layer]["kernel"])
            assert kernel.dtype == dtype
            inactive = kernel[~np.asarray(mask_tree[layer]["kernel"])]
            assert not inactive.view(f"uint{8 * kernel.dtype.itemsize}").any()
            assert np.isfinite(kernel.astype(np.float32)).all()
        assert new["conv"]["kernel"][UNEVEN["conv"]["kernel"]].all()


@pytest.mark.parametrize("name", NAMES)
def test_biases_and_norm_parameters_keep_their_bits(name):
    bits = np.array([0x7FC01234, 0x80000000, 1], np.uint32)
    params, mask_tree = fresh_params(), jax.tree.map(jnp.asarray, UNEVEN)
    for layer in ("conv", "dense"):
        params[layer]["bias"] = jnp.asarray(bits.view(np.float32))
    new = initializers.INITIALIZERS[name](jax.random.key(0), params, mask_tree)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for layer in ("conv", "dense"):
        bias = np.asarray(new[layer]["bias"])
        np.testing.assert_array_equal(bias.view(np.uint32), bits)


@pytest.mark.parametrize("name", NAMES)
def test_draws_differ_by_key_and_by_layer(name):
    params = {k: jnp.ones((40, 300)) for k in "ab"}
    initialise = initializers.INITIALIZERS[name]
    first, again, other = (
        initialise(jax.random.key(i), params, masks.dense(params)) for i in (0, 0, 1)
    )
    assert (first["a"] == again["a"]).all()
    assert (first["a"] != other["a"]).mean() > 0.99
    assert (first["a"] != first["b"]).mean() > 0.99


def test_a_kernel_without_a_mask_is_drawn_as_a_full_one():
    params = fresh_params()
    mask_tree = jax.tree.map(jnp.asarray, UNEVEN)
    mask_tree["dense"]["kernel"] = None
    new = initializers.per_neuron(jax.random.key(0), params, mask_tree)
    full = initializers.per_neuron(
        jax.random.key(0), params, jax.tree.map(jnp.asarray, EVEN)
    )
    np.testing.assert_array_equal(new["dense"]["kernel"], full["dense"]["kernel"])


# Errors


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fan": "fanin"}, "fan='fanin': give fan_in, fan_out or fan_avg"),
        ({"distribution": "gauss"}, "distribution='gauss': give normal, uniform or"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_names_are_rejected(name, option, message, monkeypatch):
    # Off, for the test run's own type checks reject the names as well.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    params = fresh_params()
    with pytest.raises(ValueError, match=message):
        initializers.INITIALIZERS[name](
            jax.random.key(0), params, masks.dense(params), **option
        )
