"""Initialisation of sparse networks.

For the active weight from input i to output o of a layer

    module         what the network itself draws, masked
    masked dense   var = gain / fan                     fan of the dense layer
    layer scaled   var = gain / (fan * layer density)   Liu et al. 2019
    per neuron     var = gain / fan(mask)               the paper

where fan is the fan-in of the output, the fan-out of the input, or their mean. Per
neuron they are counted on the mask itself: fan_in(o) is the number of active
weights that end in output o, fan_out(i) of those that leave input i, and a unit
without any counts as 1. Sources: the paper and its released code (per neuron); Liu et
al. 2019, "Rethinking the value of network pruning" (layer scaled); He et al. 2015 and
Glorot & Bengio 2010 (dense). Kernels have layout (..., in, out).

Every function takes `(key, params, masks)`; all but the first redraw the kernels. What
is no kernel (biases, norms, embeddings) is returned as it came, masked or not. A kernel
without a mask is drawn as a full one.

Guarantees:
  - Inactive weights of kernels are exactly zero.
  - Biases and norm parameters keep their bits.
  - For a full mask and equal options the last three have the same distribution.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

Fan: TypeAlias = Literal["fan_in", "fan_out", "fan_avg"]
Distribution: TypeAlias = Literal["normal", "uniform", "truncated"]

# Standard deviation of a standard normal truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978


def module(key: Key[Array, ""], params: Params, masks: Masks) -> Params:
    """The kernels as they came, for networks that have an initialisation of their own.

    For instance Fixup's, or that of a ResNet's last layer.
    """
    del key
    kept = masks_lib.apply(masks, params)
    return jax.tree.map(
        lambda kernel, own, leaf: own if kernel else leaf,
        masks_lib.in_layers(params),
        kept,
        params,
    )


def masked_dense(
    key: Key[Array, ""],
    params: Params,
    masks: Masks,
    *,
    fan: Fan = "fan_avg",
    distribution: Distribution = "uniform",
    gain: float = 1.0,
) -> Params:
    """The dense initialisation, masked; by default Keras' Glorot uniform."""

    def variance(mask):
        return gain / _pick(fan, *_dense_fans(mask.shape))

    return _redraw(key, params, masks, variance, distribution)


def layer_scaled(
    key: Key[Array, ""],
    params: Params,
    masks: Masks,
    *,
    fan: Fan = "fan_in",
    distribution: Distribution = "truncated",
    gain: float = 2.0,
) -> Params:
    """One scale a layer, by its density (Liu et al. 2019); He's gain by default."""

    def variance(mask):
        density = jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1) / mask.size
        return gain / (_pick(fan, *_dense_fans(mask.shape)) * density)

    return _redraw(key, params, masks, variance, distribution)


def per_neuron(
    key: Key[Array, ""],
    params: Params,
    masks: Masks,
    *,
    fan: Fan = "fan_in",
    distribution: Distribution = "normal",
    gain: float = 2.0,
) -> Params:
    """The paper's: every neuron's own fan; N(0, 2/fan_in) by default."""

    def variance(mask):
        return gain / _pick(fan, *_active_fans(mask))

    return _redraw(key, params, masks, variance, distribution)


INITIALIZERS: dict[str, Callable[..., Params]] = {
    "module": module,
    "masked_dense": masked_dense,
    "layer_scaled": layer_scaled,
    "per_neuron": per_neuron,
}


def _pick(fan: Fan, fan_in, fan_out):
    if fan not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"fan={fan!r}: give fan_in, fan_out or fan_avg")
    return {
        "fan_in": fan_in,
        "fan_out": fan_out,
        "fan_avg": (fan_in + fan_out) / 2,
    }[fan]


def _dense_fans(shape: tuple[int, ...]) -> tuple[float, float]:
    positions = 1
    for n in shape[:-2]:
        positions *= n
    return float(positions * shape[-2]), float(positions * shape[-1])


def _active_fans(
    mask: Bool[Array, "*spatial i o"],
) -> tuple[Float[Array, "1 o"], Float[Array, "i 1"]]:
    per_pair = jnp.sum(mask, axis=tuple(range(mask.ndim - 2)), dtype=jnp.int32)
    fan_in = jnp.sum(per_pair, axis=0, keepdims=True)
    fan_out = jnp.sum(per_pair, axis=1, keepdims=True)
    # A unit without active weights must not divide by zero.
    one = jnp.float32(1)
    return (
        jnp.maximum(fan_in.astype(jnp.float32), one),
        jnp.maximum(fan_out.astype(jnp.float32), one),
    )


def _redraw(key, params, masks, variance_fn, distribution):
    kernels = masks_lib.layers(params)
    names = {name: i for i, name in enumerate(masks_lib.named_leaves(params))}
    new = {}
    for name, leaf in kernels.items():
        mask = masks_lib.named_leaves(masks)[name]
        mask = jnp.ones(leaf.shape, bool) if mask is None else mask
        draw = _unit_draw(
            jax.random.fold_in(key, names[name]), leaf.shape, distribution
        )
        std = jnp.sqrt(jnp.asarray(variance_fn(mask), jnp.float32))
        std = jnp.broadcast_to(std, leaf.shape)
        new[name] = jnp.where(mask, draw * std, jnp.float32(0)).astype(leaf.dtype)
    leaves = [new.get(k, v) for k, v in masks_lib.named_leaves(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _unit_draw(key, shape, distribution) -> Float[Array, "..."]:
    """Independent draws of mean 0 and variance 1."""
    if distribution == "normal":
        return jax.random.normal(key, shape, jnp.float32)
    if distribution == "uniform":
        limit = 3.0**0.5
        return jax.random.uniform(key, shape, jnp.float32, -limit, limit)
    if distribution == "truncated":
        draw = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        return draw / _TRUNCATED_STD
    raise ValueError(
        f"distribution={distribution!r}: give normal, uniform or truncated"
    )
