"""Parameterizations that train a distribution of each weight; a penalty makes it zero.

    variational   w = theta + sqrt(alpha) |theta| eps,  eps ~ N(0, 1),
    dropout       alpha = sigma^2/theta^2;  penalty = c warmup(t) sum KL(alpha)
                  evaluation: theta where log alpha < 3, else 0
    Bayesian      w_io = z_i v_io,  v ~ N(mu, s^2),  z_i ~ N(mu_i, alpha_i mu_i^2);
    compression   penalty = c warmup(t) [sum_i KL(alpha_i) + sum KL(v | N(0, 1))]
                  evaluation: mu_i mu_io where log alpha_i < threshold, else 0

with the fit KL(alpha) = k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1/alpha)/2 to the
divergence from the log-uniform prior. Sources: Molchanov et al. 2017, "Variational
dropout sparsifies deep neural networks", eq. 14; Louizos et al. 2017, "Bayesian
compression for deep learning", section 4.1 (group normal-Jeffreys); defaults from their
released codes.

Noise is drawn once a call and shared by the batch. The sources draw the pre-activations
of each example instead (local reparametrisation), which lowers the variance of the
gradient but needs the layer, not only its weights. Biases stay dense and without noise.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.parameterization import (
    Parameterization,
    check_scale,
    from_layers,
    total,
    warmed_up,
)

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
_LARGEST_LOG_ALPHA = 8.0
_TINY = 1e-8  # keeps the logarithm of a mean of zero finite


def dropout_kl(log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """KL(alpha) of a weight, 0 at alpha = infinity.

    Guarantees:
      - Within 0.01 of the exact divergence.
    """
    return (
        _K1 * jax.nn.sigmoid(-(_K2 + _K3 * log_alpha))
        + jax.nn.softplus(-log_alpha) * 0.5
    )


def variational_dropout(
    kl_scale: float,
    warmup: optax.Schedule | None = None,
    init_log_sigma2: float = -10.0,
    threshold: float = 3.0,
) -> Parameterization:
    """Sparse variational dropout: a weight whose noise drowns it is dropped.

    Args:
      kl_scale: c of the module's equation: 1 / number of training examples, where the
        loss is a mean over examples.
      warmup: step -> factor of the penalty, from 0 to 1; None for 1 throughout.
      init_log_sigma2: log sigma^2 at the start. A weight that starts below
        exp((init_log_sigma2 - threshold)/2) in size, 0.0015 by default, is inactive.
      threshold: log alpha from which on a weight is inactive.

    log alpha is clipped to +-8, where it has no gradient.

    Raises:
      ValueError: a negative `kl_scale`; a threshold outside (-8, 8].

    Guarantees:
      - In training a weight has mean theta and standard deviation
        sqrt(alpha) |theta|.
      - In evaluation active weights are theta, with its bits.
    """
    check_scale("kl_scale", kl_scale)
    if not -_LARGEST_LOG_ALPHA < threshold <= _LARGEST_LOG_ALPHA:
        raise ValueError(
            f"threshold={threshold}: log alpha is clipped to +-8; give a number above "
            "-8 and up to 8"
        )

    def start(keys, weights):
        del keys
        log_sigma2 = jax.tree.map(lambda w: jnp.full_like(w, init_log_sigma2), weights)
        return {"theta": weights, "log_sigma2": log_sigma2}

    def log_alphas(sparse):
        def clipped(theta, log_sigma2):
            return jnp.clip(
                _log_alpha(theta, log_sigma2), -_LARGEST_LOG_ALPHA, _LARGEST_LOG_ALPHA
            )

        return jax.tree.map(clipped, sparse["theta"], sparse["log_sigma2"])

    def active(sparse):
        return jax.tree.map(lambda a: a < threshold, log_alphas(sparse))

    def effective(sparse, keys):
        if keys is None:
            return masks_lib.apply(active(sparse), sparse["theta"])

        def noisy(key, theta, log_alpha):
            eps = jax.random.normal(key, theta.shape, theta.dtype)
            return theta + jnp.exp(0.5 * log_alpha) * jnp.abs(theta) * eps

        return jax.tree.map(noisy, keys, sparse["theta"], log_alphas(sparse))

    def penalty(sparse, step):
        kl = total(jax.tree.map(dropout_kl, log_alphas(sparse)))
        return warmed_up(kl_scale, warmup, step) * kl

    return from_layers(
        start=start,
        active=active,
        effective=effective,
        penalty=penalty,
        is_stochastic=True,
    )


def bayesian_compression(
    kl_scale: float,
    warmup: optax.Schedule | None = None,
    threshold: float | Mapping[str, float] = -3.0,
) -> Parameterization:
    """Bayesian compression: drops whole inputs of a layer (group normal-Jeffreys).

    The group is an input unit or channel, axis -2 of the kernel.

    Args:
      kl_scale: c of the module's equation: 1 / number of training examples, where the
        loss is a mean over examples.
      warmup: step -> factor of the penalty, from 0 to 1; None for 1 throughout.
      threshold: log alpha from which on a group is inactive, for all layers or by
        layer name; read off a histogram in the source (-2.8, -3, -5 on MNIST).

    Raises:
      ValueError: a negative `kl_scale`; at `init`, a layer without a threshold, or
        a sparse leaf that is no kernel.

    Guarantees:
      - All weights of an input are active, or none is.
      - In training a weight has the mean and variance of the product of its normals.
    """
    check_scale("kl_scale", kl_scale)

    def start(keys, weights):
        for name, w in masks_lib.named_leaves(weights).items():
            if w is None:
                continue
            if w.ndim < 2:
                raise ValueError(
                    f"leaf {name} of shape {w.shape} has no inputs; give it no mask"
                )
            if isinstance(threshold, Mapping) and name not in threshold:
                raise ValueError(
                    f"threshold has no layer {name}; name it, or give it no mask"
                )

        def near(i, mean, shape_of):
            def draw(key, w):
                key = jax.random.fold_in(key, i)
                return mean + 0.01 * jax.random.normal(key, shape_of(w), w.dtype)

            return jax.tree.map(draw, keys, weights)

        return {
            "mean": weights,
            "log_variance": near(0, -9.0, lambda w: w.shape),
            "group_mean": near(1, 1.0, lambda w: w.shape[-2:-1]),
            "group_log_variance": near(2, -9.0, lambda w: w.shape[-2:-1]),
        }

    def log_alphas(sparse):
        return jax.tree.map(
            _log_alpha, sparse["group_mean"], sparse["group_log_variance"]
        )

    def active(sparse):
        names = {
            name: threshold[name] if isinstance(threshold, Mapping) else threshold
            for name, leaf in masks_lib.named_leaves(sparse["mean"]).items()
            if leaf is not None
        }
        limits = jax.tree.structure(sparse["mean"]).unflatten(names.values())
        return jax.tree.map(
            lambda log_alpha, limit, mean: jnp.broadcast_to(
                _of_inputs(log_alpha < limit, mean), mean.shape
            ),
            log_alphas(sparse),
            limits,
            sparse["mean"],
        )

    def means(sparse):
        return jax.tree.map(
            lambda mean, z: mean * _of_inputs(z, mean),
            sparse["mean"],
            sparse["group_mean"],
        )

    def effective(sparse, keys):
        if keys is None:
            return masks_lib.apply(active(sparse), means(sparse))

        def noisy(key, mean, log_variance, z_mean, z_log_variance):
            v_key, z_key = jax.random.split(key)
            v = _normal(v_key, mean, log_variance)
            return v * _of_inputs(_normal(z_key, z_mean, z_log_variance), mean)

        # By name: a dictionary that went through jit is sorted.
        order = ("mean", "log_variance", "group_mean", "group_log_variance")
        return jax.tree.map(noisy, keys, *(sparse[name] for name in order))

    def penalty(sparse, step):
        def kl_of_weights(mean, log_variance):
            return 0.5 * (jnp.exp(log_variance) + mean**2 - 1.0 - log_variance)

        kl = total(jax.tree.map(dropout_kl, log_alphas(sparse))) + total(
            jax.tree.map(kl_of_weights, sparse["mean"], sparse["log_variance"])
        )
        return warmed_up(kl_scale, warmup, step) * kl

    return from_layers(
        start=start,
        active=active,
        effective=effective,
        penalty=penalty,
        is_stochastic=True,
    )


def _log_alpha(mean, log_variance):
    return log_variance - jnp.log(mean * mean + _TINY)


def _normal(key, mean, log_variance):
    eps = jax.random.normal(key, mean.shape, mean.dtype)
    return mean + jnp.exp(0.5 * log_variance) * eps


def _of_inputs(values, kernel):
    """Values of the inputs, in the kernel's rank."""
    return values.reshape((1,) * (kernel.ndim - 2) + (-1, 1))
