"""Scores of weights: what is dropped first, what is grown first.

A criterion is a function `(key, weights, grads) -> scores` of one layer, all of one
shape; the highest scores are kept, or grown. The gradient is the dense one, taken
with respect to the masked weights.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Scores: TypeAlias = Float[Array, "..."]
Criterion: TypeAlias = Callable[
    [Key[Array, ""], Float[Array, "..."], Float[Array, "..."]], Scores
]


def magnitude(key, weights, grads) -> Scores:
    """|w|: what magnitude pruning, SET and RigL keep."""
    del key, grads
    return jnp.abs(weights)


def gradient(key, weights, grads) -> Scores:
    """|g|: what RigL grows (Evci et al. 2020)."""
    del key, weights
    return jnp.abs(grads)


def inverted_gradient(key, weights, grads) -> Scores:
    """-|g|: what RigL (Inverted) grows, the paper's control (Evci et al. 2022)."""
    return -gradient(key, weights, grads)


def saliency(key, weights, grads) -> Scores:
    """|w g|: first-order effect of removing a weight (SNIP, Lee et al. 2019)."""
    del key
    return jnp.abs(weights * grads)


def random(key, weights, grads) -> Scores:
    """Uniform in [0, 1): what SET grows (Mocanu et al. 2018)."""
    del grads
    # float32 whatever the weights: bfloat16 would make most scores tie.
    return jax.random.uniform(key, weights.shape, jnp.float32)


def widen(scores: Array) -> Array:
    """As float32, unless float64: with fewer bits means would tie, sums be rounded."""
    return scores.astype(jnp.float64 if scores.dtype == jnp.float64 else jnp.float32)


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "inverted_gradient": inverted_gradient,
    "saliency": saliency,
    "random": random,
}
