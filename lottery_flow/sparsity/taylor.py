"""First-order scores: what the loss loses with a weight or with a whole feature map.

    weight         (g w)^2
    feature map    mean_b |mean_hw dC/dz z|,  divided by the layer's Euclidean norm

Sources: Molchanov et al. 2017, "Pruning convolutional neural networks for resource
efficient inference", section 2.2 (feature maps); Molchanov et al. 2019, "Importance
estimation for neural network pruning" (weights). |g w| is `criteria.saliency`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def taylor_weights(
    weights: Float[Array, "*shape"], grads: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """(g w)^2 of each weight, to be averaged over batches."""
    return jnp.square(weights * grads)


def taylor_maps(
    activations: Float[Array, "b *space c"], grads: Float[Array, "b *space c"]
) -> Float[Array, " c"]:
    """The score of each feature map (or unit) of a layer.

    Args:
      activations: z, [b h w c] or [b c].
      grads: dC/dz, of the same shape. A common factor does not matter.

    Returns:
      Non-negative, of Euclidean norm 1 (0 if all are zero): comparable between layers.

    Guarantees:
      - Examples do not cancel: the absolute value is taken of each.
      - Scaling the gradients changes nothing.
    """
    space = tuple(range(1, activations.ndim - 1))
    score = jnp.mean(jnp.abs(jnp.mean(activations * grads, axis=space)), axis=0)
    # In two steps, so that squares of small numbers do not vanish.
    largest = jnp.max(score)
    score = score / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    norm = jnp.sqrt(jnp.sum(jnp.square(score)))
    return score / jnp.where(norm > 0, norm, jnp.ones_like(norm))
