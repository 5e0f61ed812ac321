"""Hard masks that let a gradient through where a mask has none.

    value       w m
    derivative  dw                   straight-through to the weights
    or          m dw + w dgate       straight-through to a gate behind the mask

Source: Bengio et al. 2013, "Estimating or propagating gradients through stochastic
neurons", section 4. Rules of derivatives of their own rather than w + stop_gradient(w m
- w), which rounds: inactive weights must be exactly zero.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.custom_jvp
def straight_through(
    weights: Float[Array, "..."], active: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """The masked weights, with the derivative of the identity.

    Guarantees:
      - Inactive entries are exactly zero, active ones keep their bits.
      - Every weight gets the gradient of its masked one.
    """
    return jnp.where(active, weights, jnp.zeros_like(weights))


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[0]


@jax.custom_jvp
def gated(
    weights: Float[Array, "..."],
    gate: Float[Array, "..."],
    active: Bool[Array, "..."],
) -> Float[Array, "..."]:
    """The masked weights, with the derivative of `weights * gate` to a hard gate.

    Guarantees:
      - Inactive entries are exactly zero, active ones keep their bits.
      - The gate gets the weight times the gradient of the masked weight, active or
        not; a weight that of its masked one, where it is active.
    """
    del gate
    return jnp.where(active, weights, jnp.zeros_like(weights))


@gated.defjvp
def _gated_jvp(primals, tangents):
    weights, _, active = primals
    dweights, dgate, _ = tangents
    kept = jnp.where(active, dweights, jnp.zeros_like(dweights))
    return gated(*primals), kept + weights * dgate
