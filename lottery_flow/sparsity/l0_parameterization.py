"""L0 regularisation: hard concrete gates, whose expected number is the penalty.

    w = theta z,  z = clip(y (zeta - gamma) + gamma, 0, 1),
    training    y = sigmoid((u + log alpha)/beta),  u ~ logistic(0, 1)
    evaluation  y = sigmoid(log alpha)
    penalty     c warmup(t) sum P(z > 0),
                P(z > 0) = sigmoid(log alpha - beta log(-gamma/zeta))

Source: Louizos et al. 2018, "Learning sparse neural networks through L0
regularization", eqs. 10-13, with a gate for each weight; the gates' start is that of
Gale et al. 2019, "The state of sparsity in deep neural networks". Gates are drawn once
a call and shared by the batch.
"""

import math

import jax
import jax.numpy as jnp
import optax

from lottery_flow.sparsity.parameterization import (
    Parameterization,
    check_scale,
    from_layers,
    total,
    warmed_up,
    widened,
)


def l0_hard_concrete(
    l0_scale: float,
    warmup: optax.Schedule | None = None,
    init_log_alpha: float = 2.197,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Parameterization:
    """L0 regularisation: gates that are exactly 0 or 1 with positive probability.

    Args:
      l0_scale: c of the module's equation: lambda / number of training examples.
      warmup: step -> factor of the penalty, from 0 to 1; None for 1 throughout.
      init_log_alpha: at the start, plus noise of standard deviation 0.01.
      beta: temperature.
      gamma, zeta: ends of the stretched interval, below 0 and above 1.

    Raises:
      ValueError: a negative `l0_scale`, or beta, gamma, zeta out of range.

    Guarantees:
      - Gates lie in [0, 1]; where one is 0, the weight is exactly zero.
      - The penalty (c = 1) is the expected number of active weights in training.
    """
    check_scale("l0_scale", l0_scale)
    if not (beta > 0 and gamma < 0 and zeta > 1):
        raise ValueError(
            f"beta={beta}, gamma={gamma}, zeta={zeta}: give beta > 0, gamma < 0 and "
            "zeta > 1"
        )

    def start(keys, weights):
        def near(key, w):
            return init_log_alpha + 0.01 * jax.random.normal(key, w.shape, w.dtype)

        return {"theta": weights, "log_alpha": jax.tree.map(near, keys, weights)}

    def stretch(y):
        return jnp.clip(y * (zeta - gamma) + gamma, 0.0, 1.0)

    def gate(log_alpha):
        return stretch(jax.nn.sigmoid(log_alpha))

    def draw(key, log_alpha):
        # A coarse uniform gives infinite logits.
        wide = widened(log_alpha)
        noise = jax.random.logistic(key, wide.shape, wide.dtype)
        y = jax.nn.sigmoid((noise + wide) / beta)
        return stretch(y).astype(log_alpha.dtype)

    def effective(sparse, keys):
        if keys is None:
            z = jax.tree.map(gate, sparse["log_alpha"])
        else:
            z = jax.tree.map(draw, keys, sparse["log_alpha"])
        return jax.tree.map(
            lambda theta, z: jnp.where(z > 0, theta * z, jnp.zeros_like(theta)),
            sparse["theta"],
            z,
        )

    def penalty(sparse, step):
        offset = beta * math.log(-gamma / zeta)
        p = jax.tree.map(lambda a: jax.nn.sigmoid(a - offset), sparse["log_alpha"])
        return warmed_up(l0_scale, warmup, step) * total(p)

    return from_layers(
        start=start,
        active=lambda sparse: jax.tree.map(lambda a: gate(a) > 0, sparse["log_alpha"]),
        effective=effective,
        penalty=penalty,
        decayed=["theta"],
        is_stochastic=True,
    )
