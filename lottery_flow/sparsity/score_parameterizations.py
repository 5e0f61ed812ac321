"""Parameterizations that train a score for each weight; the weights are frozen.

    edge-popup   w_eff = w where |s| is among the k largest of its layer, else 0
                 dL/ds = sign(s) w dL/dw_eff          (straight-through to |s|)
    supermask    training:   w_eff = w m,  m ~ Bernoulli(p),  p = sigmoid(l)
                 evaluation: m = 1 where p >= 1/2, that is l >= 0
                 dL/dl = p (1 - p) w dL/dw_eff        (straight-through to p)

Sources: Ramanujan et al. 2020, "What's hidden in a randomly weighted neural network?",
section 3, and its released code (allenai/hidden-networks), which ranks |s| and so
has the sign in the gradient; Zhou et al. 2019, "Deconstructing lottery tickets",
section 5. The supermask of Zhou et al. is drawn in evaluation too; here it is its most
probable value, and a tie keeps the weight: logits start at 0, where the alternative
would be a network without weights.

Both freeze everything but the scores: weights, biases and norm parameters keep
their bits. Give normalisation without scale and shift, or leave these as they start.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.parameterization import (
    Parameterization,
    check_counts,
    counts_like,
    from_layers,
    widened,
)
from lottery_flow.sparsity.straight_through import gated
from lottery_flow.sparsity.topk import topk_mask


def edge_popup(
    n_active: Mapping[str, int],
    weights: Literal[
        "signed_kaiming_constant", "kaiming_normal", "given"
    ] = "signed_kaiming_constant",
    scale_fan: bool = False,
) -> Parameterization:
    """Finds a subnetwork of a random network by its scores.

    Args:
      n_active: active weights by layer name.
      weights: +-sqrt(2/fan_in) with random signs, N(0, 2/fan_in), or those given to
        `init`.
      scale_fan: multiply fan_in by the layer's density; not with 'given'.

    Scores start uniform in +-1/sqrt(fan_in): Kaiming's with a = sqrt(5).

    Raises:
      ValueError: other `weights`, or given ones with `scale_fan`; at `init`, a layer
        without a count, a count without a mask, or one that exceeds its layer.

    Guarantees:
      - Exactly n_active weights of each layer are active.
      - Active weights have the bits of the frozen ones.
      - A score gets sign(s) w times the gradient of the masked weight, active or not.
    """
    if weights not in ("signed_kaiming_constant", "kaiming_normal", "given"):
        raise ValueError(
            f"weights={weights!r}: give signed_kaiming_constant, kaiming_normal or "
            "given"
        )
    if weights == "given" and scale_fan:
        raise ValueError(
            "scale_fan=True scales weights that are drawn; write False for given ones"
        )

    def draw(key, w, n):
        if weights == "given":
            return w
        density = max(n, 1) / w.size if scale_fan else 1.0
        std = (2.0 / (_fan_in(w) * density)) ** 0.5
        if weights == "kaiming_normal":
            return std * jax.random.normal(key, w.shape, w.dtype)
        return std * jax.random.rademacher(key, w.shape, w.dtype)

    def score(key, w):
        limit = _fan_in(w) ** -0.5
        return jax.random.uniform(key, w.shape, w.dtype, -limit, limit)

    def start(keys, given):
        check_counts("n_active", n_active, given)
        for_weights, for_scores = (
            jax.tree.map(lambda key, i=i: jax.random.fold_in(key, i), keys)
            for i in range(2)
        )
        counts = counts_like(n_active, given)
        return {
            "weights": jax.tree.map(draw, for_weights, given, counts),
            "scores": jax.tree.map(score, for_scores, given),
        }

    def active(sparse):
        sizes = jax.tree.map(jnp.abs, sparse["scores"])
        return topk_mask(sizes, counts_like(n_active, sizes))

    def effective(sparse, keys):
        del keys
        return jax.tree.map(
            lambda w, s, on: gated(lax.stop_gradient(w), jnp.abs(s), on),
            sparse["weights"],
            sparse["scores"],
            active(sparse),
        )

    return from_layers(
        start=start,
        active=active,
        effective=effective,
        decayed=["scores"],
        frozen=["weights"],
        is_dense_frozen=True,
    )


def supermask(
    init: float = 0.0,
    weights: Literal["given", "signed_constant"] = "given",
    rescale: bool = False,
) -> Parameterization:
    """Learns the probability that each weight of a random network is active.

    Args:
      init: the logits at the start.
      weights: those given to `init`, or their signs times the standard deviation of
        the layer.
      rescale: multiply by size / (active weights of this mask), a constant for the
        gradient ("dynamic weight rescaling").

    Raises:
      ValueError: other `weights`.

    Guarantees:
      - In training each weight is active with probability sigmoid(logit).
      - In evaluation a weight is active where its logit is 0 or more.
      - A logit gets p (1 - p) w (rescaled) times the gradient of the masked weight,
        active or not.
    """
    if weights not in ("given", "signed_constant"):
        raise ValueError(f"weights={weights!r}: give given or signed_constant")

    def start(keys, given):
        del keys

        def constant(w):
            return jnp.sign(w) * jnp.std(w) if weights == "signed_constant" else w

        logits = jax.tree.map(lambda w: jnp.full_like(w, init), given)
        return {"weights": jax.tree.map(constant, given), "logits": logits}

    def active(sparse):
        return jax.tree.map(lambda logit: logit >= 0, sparse["logits"])

    def sample(key, logit):
        return jax.random.bernoulli(key, jax.nn.sigmoid(widened(logit)))

    def effective(sparse, keys):
        if keys is None:
            chosen = active(sparse)
        else:
            chosen = jax.tree.map(sample, keys, sparse["logits"])

        def mask(w, logit, on):
            w = lax.stop_gradient(w)
            if rescale:
                n = jnp.maximum(masks_lib.count_true(on), 1)
                w = w * (w.size / n).astype(w.dtype)
            return gated(w, jax.nn.sigmoid(logit), on)

        return jax.tree.map(mask, sparse["weights"], sparse["logits"], chosen)

    return from_layers(
        start=start,
        active=active,
        effective=effective,
        frozen=["weights"],
        is_dense_frozen=True,
        is_stochastic=True,
    )


def _fan_in(kernel) -> float:
    return float(kernel.size // kernel.shape[-1])
