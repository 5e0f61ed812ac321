"""Variational dropout and Bayesian compression: quadrature, draws and formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, stats

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import variational_parameterizations as methods

DRAWS = 2000
STEP = jnp.int32(0)


def exact_kl(log_alpha):
    """From the log-uniform prior, by quadrature; 0 at alpha = infinity."""
    std = np.exp(log_alpha / 2)

    def integrand(z):
        return np.log(abs(1 + std * z)) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)

    # The logarithm is infinite where the weight is zero: the pieces end there.
    zero = np.clip(-1 / std, -12, 12)
    pieces = np.unique([-12, -1, zero, 0, 1, 12])
    mean_log = sum(
        integrate.quad(integrand, a, b, limit=200)[0]
        for a, b in itertools.pairwise(pieces)
    )
    constant = -(np.euler_gamma + np.log(2)) / 2  # the mean of log|N(0, 1)|
    return mean_log - log_alpha / 2 - constant


def fitted_kl(log_alpha):
    """As the source writes it."""
    sigmoid = 1 / (1 + np.exp(-(1.8732 + 1.48695 * log_alpha)))
    fit = 0.63576 * sigmoid - 0.5 * np.log(1 + np.exp(-log_alpha)) - 0.63576
    return -fit


def test_kl_against_quadrature():
    log_alphas = np.linspace(-8, 8, 33).astype(np.float32)
    exact = np.array([exact_kl(float(a)) for a in log_alphas])
    approximate = np.asarray(methods.dropout_kl(jnp.asarray(log_alphas)))
    assert np.abs(approximate - exact).max() < 0.01
    assert np.abs(exact[:-1] - exact[1:]).min() > 1e-4  # no two alphas are alike
    np.testing.assert_allclose(approximate, fitted_kl(log_alphas), atol=1e-5)
    assert exact[0] > 4
    assert 0 < exact[-1] < 1e-3


def worst(sample, mean, std):
    """Deviations of means and standard deviations of draws, in standard errors."""
    of_mean = np.abs(sample.mean(axis=0) - mean) / (std / DRAWS**0.5)
    of_std = np.abs(sample.std(axis=0) / std - 1) * (2 * DRAWS) ** 0.5
    return of_mean.max(), of_std.max()


def draws(p, raw):
    keys = jax.random.split(jax.random.key(5), DRAWS)
    run = jax.jit(jax.vmap(lambda key, raw: p.weights(raw, key, True), (0, None)))
    return np.asarray(run(keys, raw)["fc"]["kernel"])


# Variational dropout


def dropout(dtype=jnp.float32, **options):
    """A layer of 48 weights, log alpha from about -6 to 8; some of them zero."""
    p = methods.variational_dropout(**{"kl_scale": 0.01} | options)
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(8, 6)) + np.sign(rng.normal(size=(8, 6)))
    theta[:2, 0] = 0
    params = {"fc": {"kernel": jnp.asarray(theta, dtype)}}
    raw = p.init(jax.random.key(0), params, masks_lib.full(params, {"fc": 0}))
    log_sigma2 = {"fc": {"kernel": jnp.asarray(rng.uniform(-6, 8, (8, 6)), dtype)}}
    return p, raw._replace(sparse={**raw.sparse, "log_sigma2": log_sigma2})


def log_alpha_of(raw):
    theta, log_sigma2 = (
        np.asarray(raw.sparse[k]["fc"]["kernel"]) for k in ("theta", "log_sigma2")
    )
    return theta, np.clip(log_sigma2 - np.log(theta**2 + 1e-8), -8, 8)


def test_noise_has_the_mean_and_the_variance():
    p, raw = dropout()
    theta, log_alpha = log_alpha_of(raw)
    sample, alive = draws(p, raw), theta != 0
    assert not sample[:, ~alive].any()
    z, theta = sample[:, alive], theta[alive]
    std = np.exp(log_alpha[alive] / 2) * np.abs(theta)
    of_mean, of_std = worst(z, theta, std)
    assert of_mean < 5
    assert of_std < 5
    assert worst(z, theta, 1.15 * std)[1] > 5
    assert worst(z, theta + 0.2 * std, std)[0] > 5
    pooled = ((z - theta) / std).ravel()
    assert stats.kstest(pooled, stats.norm.cdf).pvalue > 1e-3
    noise = np.corrcoef(((z - theta) / std).T) - np.eye(len(theta))
    assert np.abs(noise).max() < 5.5 / DRAWS**0.5  # of 1035 pairs


@pytest.mark.parametrize("threshold", [3.0, 0.0])
def test_evaluation_drops_what_is_mostly_noise(threshold):
    p, raw = dropout(threshold=threshold)
    theta, log_alpha = log_alpha_of(raw)
    shown = np.asarray(p.weights(raw, None, False)["fc"]["kernel"])
    active = log_alpha < threshold
    assert 0 < active.sum() < active.size
    np.testing.assert_array_equal(shown, np.where(active, theta, 0))
    np.testing.assert_array_equal(p.masks(raw)["fc"]["kernel"], active)


def test_dropout_penalty_and_its_warm_up():
    p, raw = dropout(kl_scale=0.02, warmup=optax.linear_schedule(0.0, 1.0, 10))
    expected = 0.02 * fitted_kl(log_alpha_of(raw)[1]).sum()
    penalty_fn = jax.jit(p.penalty)
    for step, factor in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        penalty = penalty_fn(raw, jnp.int32(step))
        np.testing.assert_allclose(penalty, factor * expected, rtol=1e-4)


def test_gradient_of_log_sigma2_stops_at_the_clip():
    """Beyond it, the penalty's and the noise's alike; within, the fit's slope."""
    p, raw = dropout(kl_scale=1.0)
    _, log_alpha = log_alpha_of(raw)

    def both(raw):
        noise = p.weights(raw, jax.random.key(6), True)["fc"]["kernel"]
        return jnp.stack([p.penalty(raw, STEP), jnp.sum(noise)])

    grads = jax.jit(jax.jacrev(both))(raw).sparse["log_sigma2"]["fc"]["kernel"]
    of_penalty, of_noise = np.asarray(grads)
    clipped = np.abs(log_alpha) >= 8
    assert clipped.any()
    for grad in (of_penalty, of_noise):
        assert not grad[clipped].any()
    alive = log_alpha_of(raw)[0] != 0
    assert (of_penalty[~clipped] != 0).all()
    assert (of_noise[~clipped & alive] != 0).all()
    slope = (fitted_kl(log_alpha + 1e-3) - fitted_kl(log_alpha - 1e-3)) / 2e-3
    np.testing.assert_allclose(
        of_penalty[~clipped], slope[~clipped], rtol=1e-2, atol=1e-3
    )


# Bayesian compression


def compression(**options):
    """A convolution with 5 inputs, the second and the fourth mostly noise."""
    p = methods.bayesian_compression(**{"kl_scale": 0.01} | options)
    rng = np.random.default_rng(1)

    def leaf(x):
        return {"fc": {"kernel": jnp.asarray(x, jnp.float32)}}

    params = leaf(rng.normal(size=(2, 1, 5, 3)))
    raw = p.init(jax.random.key(0), params, masks_lib.full(params, {"fc": 0}))
    return p, raw._replace(
        sparse={
            "mean": raw.sparse["mean"],
            "log_variance": leaf(rng.uniform(-3, 0, (2, 1, 5, 3))),
            "group_mean": leaf([1.0, 0.3, -1.2, 0.2, 0.7]),
            "group_log_variance": leaf([-4.5, -2.0, -5.0, -1.0, -4.2]),
        }
    )


def quantities(raw):
    names = ("mean", "log_variance", "group_mean", "group_log_variance")
    mean, log_variance, *group = (
        np.asarray(raw.sparse[k]["fc"]["kernel"], np.float64) for k in names
    )
    z_mean, z_log_variance = (x[None, None, :, None] for x in group)
    return mean, np.exp(log_variance), z_mean, np.exp(z_log_variance)


def test_compressed_weights_have_the_moments_of_the_product():
    p, raw = compression()
    mean, variance, z_mean, z_variance = quantities(raw)
    sample = draws(p, raw)
    of_product = mean * z_mean
    std = np.sqrt((mean**2 + variance) * (z_mean**2 + z_variance) - of_product**2)
    of_mean = np.abs(sample.mean(axis=0) - of_product) / (std / DRAWS**0.5)
    assert of_mean.max() < 5
    # Products have heavier tails than normals: the error is estimated from the draws.
    square = (sample - of_product) ** 2
    error = square.std(axis=0) / DRAWS**0.5
    assert (np.abs(square.mean(axis=0) - std**2) / error).max() < 5
    without_group = np.sqrt(variance) * np.abs(z_mean)
    assert (np.abs(square.mean(axis=0) - without_group**2) / error).max() > 5


def test_weights_of_an_input_share_its_noise():
    p, raw = compression()
    still = jax.tree.map(lambda x: jnp.full_like(x, -60.0), raw.sparse["log_variance"])
    raw = raw._replace(sparse={**raw.sparse, "log_variance": still})
    mean, _, z_mean, z_variance = quantities(raw)
    z = draws(p, raw) / mean
    assert np.ptp(z, axis=(1, 2, 4)).max() < 1e-5
    group = (z[:, 0, 0, :, 0] - z_mean.ravel()) / np.sqrt(z_variance.ravel())
    assert stats.kstest(group.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(group.T) - np.eye(5)).max() < 5 / DRAWS**0.5


@pytest.mark.parametrize(
    ("threshold", "dropped"), [(-3.0, [1, 3]), ({"fc": 1.0}, [3]), (-4.3, [1, 3, 4])]
)
def test_groups_are_dropped_by_log_alpha(threshold, dropped):
    p, raw = compression(threshold=threshold)
    mean, _, z_mean, _ = quantities(raw)
    active = np.ones(mean.shape, bool)
    active[:, :, dropped] = False
    shown = np.asarray(p.weights(raw, None, False)["fc"]["kernel"])
    np.testing.assert_array_equal(p.masks(raw)["fc"]["kernel"], active)
    np.testing.assert_array_equal(shown != 0, active)
    np.testing.assert_allclose(shown, np.where(active, mean * z_mean, 0), rtol=1e-6)


def test_compression_penalty():
    """That of normal weights by quadrature, that of groups by the fit."""
    p, raw = compression(kl_scale=0.5)
    mean, variance, z_mean, z_variance = quantities(raw)

    mean, variance = mean.ravel(), variance.ravel()
    x = mean + np.sqrt(variance) * np.linspace(-8, 8, 2001)[:, None]
    posterior = stats.norm.logpdf(x, mean, np.sqrt(variance))
    ratio = posterior - stats.norm.logpdf(x)
    of_weights = integrate.trapezoid(np.exp(posterior) * ratio, x, axis=0).sum()
    of_groups = fitted_kl(np.log(z_variance / z_mean**2)).sum()
    expected = 0.5 * (of_weights + of_groups)
    np.testing.assert_allclose(jax.jit(p.penalty)(raw, STEP), expected, rtol=1e-4)


def test_compression_starts_near_its_means_with_little_noise():
    p = methods.bayesian_compression(kl_scale=1.0)
    params = {"fc": {"kernel": jnp.ones((200, 30))}}
    raw = p.init(jax.random.key(0), params, masks_lib.full(params, {"fc": 0}))
    for name, mean, size in (
        ("group_mean", 1.0, 200),
        ("group_log_variance", -9.0, 200),
        ("log_variance", -9.0, 6000),
    ):
        z = (np.asarray(raw.sparse[name]["fc"]["kernel"]).ravel() - mean) / 0.01
        assert z.size == size
        assert stats.kstest(z, stats.norm.cdf).pvalue > 1e-3
    assert raw.sparse["mean"]["fc"]["kernel"] is params["fc"]["kernel"]


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dropout(kl_scale=-1.0), "kl_scale=-1.0: give 0 or more"),
        (lambda: dropout(threshold=8.5), "threshold=8.5: log alpha is clipped to"),
        (lambda: dropout(threshold=-8.0), "threshold=-8.0: log alpha is clipped"),
        (lambda: compression(kl_scale=float("nan")), "kl_scale=nan: give 0 or more"),
        (lambda: compression(threshold={"f": 0.0}), "threshold has no layer fc; name"),
    ],
)
def test_wrong_arguments_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sparse_leaf_without_inputs_is_rejected():
    p = methods.bayesian_compression(kl_scale=1.0)
    params = {"fc": {"bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"leaf fc/bias of shape \(3,\) has no inputs"):
        p.init(jax.random.key(0), params, {"fc": {"bias": jnp.ones(3, bool)}})
