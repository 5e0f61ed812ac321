"""MetaInit: scale the layers so that the gradient changes little along itself.

    GQ = mean over parameters of |1 - (g - H g) / (g + eps sign(g))|,   sign(0) = 1

    norm_l <- norm_l + v_l,    v_l <- momentum v_l - lr sign(dGQ / dnorm_l)

on random inputs and labels: no data are needed. Of each kernel the norm alone changes,
and g, H are over the active weights of the kernels. Source: Dauphin & Schoenholz 2019,
"MetaInit: initializing learning by learning to initialize", sections 3 and 4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

# A norm stays above this fraction of what it was at first.
_LEAST = 1e-3

LossFn = Callable[[Params, Any], Float[Array, ""]]


class MetaInit(NamedTuple):
    """A scaled initialisation.

    Attributes:
      params: the new parameters.
      quotients: the gradient quotient before each step.
    """

    params: Params
    quotients: Float[Array, " steps"]


def gradient_quotient(
    loss_fn: LossFn,
    params: Params,
    masks: Masks,
    batch: Any,
    *,
    eps: float = 1e-5,
    is_scaled: Callable[[str, Any], bool] = masks_lib.is_kernel,
) -> Float[Array, ""]:
    """How much the gradient changes in a step along itself; 0 where it is constant.

    Args:
      loss_fn: (params, batch) -> loss.
      params: the sparse parameters.
      masks: a kernel without one is wholly active.
      batch: as `loss_fn` takes it.
      eps: keeps the quotient finite.
      is_scaled: (layer name, leaf) -> whether its weights are among those averaged.

    Guarantees:
      - Inactive weights do not count.
    """
    kernels = masks_lib.layers(params, is_scaled)
    active = {name: masks_lib.named_leaves(masks)[name] for name in kernels}

    def slope(kernels):
        grads = jax.grad(lambda k: loss_fn(_replace(params, k), batch))(kernels)
        return masks_lib.apply(active, grads)

    grads = slope(kernels)
    _, curved = jax.jvp(slope, (kernels,), (grads,))

    def off(g, hg):
        sign = jnp.where(lax.stop_gradient(g) >= 0, 1.0, -1.0).astype(g.dtype)
        return jnp.abs(1 - (g - hg) / (g + eps * sign))

    parts = masks_lib.apply(active, jax.tree.map(off, grads, curved))
    total = jnp.sum(jnp.stack([jnp.sum(part) for part in parts.values()]))
    n_active = jnp.stack([_n_active(active[k], kernels[k]) for k in kernels])
    n = jnp.maximum(jnp.sum(n_active, dtype=jnp.int32), 1)
    return total / n.astype(total.dtype)


def metainit(
    key: Key[Array, ""],
    params: Params,
    masks: Masks,
    loss_fn: LossFn,
    make_batch: Callable[[Key[Array, ""]], Any],
    *,
    learning_rate: float = 1e-3,
    momentum: float = 0.9,
    n_steps: int = 1000,
    eps: float = 1e-5,
    is_scaled: Callable[[str, Any], bool] = masks_lib.is_kernel,
) -> MetaInit:
    """Minimises the gradient quotient over the norms of the kernels.

    Args:
      key: a typed key; step i draws its batch with `fold_in(key, i)`.
      params: an initialisation.
      masks: the active weights; a kernel without a mask is scaled as a whole.
      loss_fn: (params, batch) -> loss.
      make_batch: key -> a random batch, see `noise`.
      learning_rate: of the norms.
      momentum: of the steps.
      n_steps: how many.
      eps: see `gradient_quotient`.
      is_scaled: (layer name, leaf) -> whether its norm is learned. The code of the
        paper on sparse networks takes convolutions alone.

    Guarantees:
      - Inactive weights are exactly zero.
      - Each scaled kernel is the given one times a positive number; a kernel of zeros
        and all other leaves keep their bits.
    """
    params = masks_lib.apply(masks, params)
    kernels = masks_lib.layers(params, is_scaled)
    start = jax.tree.map(_norm, kernels)

    def scaled(params, start, norms):
        def scale(kernel, old, new):
            factor = jnp.where(old > 0, new / jnp.where(old > 0, old, 1), 1)
            return kernel * factor.astype(kernel.dtype)

        own = masks_lib.layers(params, is_scaled)
        return _replace(params, jax.tree.map(scale, own, start, norms))

    @jax.jit
    def optimise(key, params, masks, start):
        def quotient(norms, batch):
            at = scaled(params, start, norms)
            return gradient_quotient(
                loss_fn, at, masks, batch, eps=eps, is_scaled=is_scaled
            )

        def step(carry, i):
            norms, velocity = carry
            batch = make_batch(jax.random.fold_in(key, i))
            value, slope = jax.value_and_grad(quotient)(norms, batch)
            velocity = jax.tree.map(
                lambda v, s: momentum * v - learning_rate * jnp.sign(s), velocity, slope
            )
            # A norm that crossed zero would flip its kernel.
            norms = jax.tree.map(
                lambda n, v, n0: jnp.maximum(n + v, _LEAST * n0), norms, velocity, start
            )
            return (norms, velocity), value

        still = jax.tree.map(jnp.zeros_like, start)
        steps = jnp.arange(n_steps, dtype=jnp.int32)
        (norms, _), values = lax.scan(step, (start, still), steps)
        return scaled(params, start, norms), values

    return MetaInit(*optimise(key, params, masks, start))


@partial(jax.jit, static_argnums=(1, 2))
def noise(
    key: Key[Array, ""], shape: tuple[int, ...], n_classes: int
) -> tuple[Float[Array, "b ..."], Int[Array, " b"]]:
    """A batch of N(0, 1) inputs of this shape (b, ...) and uniform labels."""
    inputs_key, labels_key = jax.random.split(key)
    inputs = jax.random.normal(inputs_key, shape, jnp.float32)
    return inputs, jax.random.randint(labels_key, shape[:1], 0, n_classes, jnp.int32)


def _replace(params: Params, kernels: dict[str, Any]) -> Params:
    named = masks_lib.named_leaves(params)
    leaves = [kernels.get(name, leaf) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _norm(kernel) -> Float[Array, ""]:
    kind = jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(kind))))


def _n_active(mask, kernel) -> Int[Array, ""]:
    return jnp.int32(kernel.size) if mask is None else masks_lib.count_true(mask)
