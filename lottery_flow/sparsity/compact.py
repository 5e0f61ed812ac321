"""Parameters, gradients and optimizer slots of the active weights alone.

    values[j] = kernel.flat[positions[j]]          positions ascending, n of them

An optimizer whose slots have the shape of the parameters does to the values what it
does to the masked kernel: an inactive weight has no gradient, no slot but zero, and
stays zero. So between two rewires 8 bytes for an active weight and its momentum, and 4
for its position, do for the 9 (with the mask) of every weight, active or not.

Values are a column [n, 1]: two dimensions, so that whatever treats kernels apart from
biases, as weight decay does, sees a kernel.

Guarantees:
  - Packed and unpacked again, every leaf has the same bits, but for what slots hold
    of inactive weights, which is zero afterwards.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32, PyTree

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

Positions = Mapping[str, Any]  # int32 [n], by layer


def positions_of(masks: Masks) -> dict[str, Int32[np.ndarray, " n"]]:
    """Where the active weights of each masked layer are, on the host."""
    return {
        name: positions_in(mask)
        for name, mask in masks_lib.named_leaves(masks).items()
        if mask is not None
    }


def positions_in(mask: Bool[Array | np.ndarray, "..."]) -> Int32[np.ndarray, " n"]:
    """Where the active weights are in the flattened kernel, on the host."""
    return np.flatnonzero(np.asarray(mask)).astype(np.int32)


def gather(leaf: Float[Array, "..."], positions: Int32[Array | np.ndarray, " n"]):
    """The active weights as a column [n, 1]."""
    return leaf.reshape(-1)[positions, None]


def scatter(
    values: Float[Array, "n 1"],
    positions: Int32[Array | np.ndarray, " n"],
    shape: tuple[int, ...],
) -> Float[Array, "..."]:
    """The kernel of the active weights, zero elsewhere."""
    flat = jnp.zeros(math.prod(shape), values.dtype)
    found = flat.at[positions].set(
        values[:, 0], indices_are_sorted=True, unique_indices=True
    )
    return found.reshape(shape)


def mask_of(
    positions: Int32[Array | np.ndarray, " n"], shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Which weights are active."""
    flat = jnp.zeros(math.prod(shape), bool)
    return flat.at[positions].set(True, indices_are_sorted=True).reshape(shape)


def pack(params: Params, positions: Positions) -> Params:
    """The parameters with the masked layers as columns of their active weights."""
    return _map(gather, params, positions)


def unpack(values: Params, positions: Positions, shapes: Mapping[str, Any]) -> Params:
    """The parameters again; `shapes` of the kernels, by layer."""
    return _map(scatter, values, positions, shapes)


def pack_slots(
    inner: optax.GradientTransformation, state: Any, positions: Positions, params: Any
) -> Any:
    """The state of an optimizer of the parameters, of their active weights alone.

    Args:
      inner: the optimizer.
      state: its state.
      positions: of the active weights.
      params: of the network, or their shapes.

    Raises:
      ValueError: a slot of another shape than its parameter, as Adafactor's are.
    """
    shapes = {k: v.shape for k, v in masks_lib.named_leaves(params).items()}

    def one(slot, where, shape):
        if slot.shape != shape:
            raise ValueError(
                f"the optimizer keeps an array of shape {slot.shape} for a kernel of "
                f"shape {shape}: it cannot be had for the active weights alone"
            )
        return gather(slot, where)

    return _map_slots(one, inner, state, params, positions, shapes)


def unpack_slots(
    inner: optax.GradientTransformation,
    state: Any,
    positions: Positions,
    values: Any,
    shapes: Mapping[str, Any],
) -> Any:
    """The state of the optimizer of all weights; `values` are the packed parameters."""
    return _map_slots(scatter, inner, state, values, positions, shapes)


def _map(fn: Callable, tree: PyTree, *named: Mapping[str, Any]) -> PyTree:
    """`fn(leaf, ...)` at the layers that the first of `named` knows."""
    leaves, treedef = jax.tree.flatten(tree)
    names = list(masks_lib.named_leaves(tree))
    found = [
        fn(leaf, *(own[name] for own in named)) if name in named[0] else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, found)


def _map_slots(fn, inner, state, params, *named):
    """Likewise at the slots of these layers."""
    names = jax.tree.unflatten(
        jax.tree.structure(params), list(masks_lib.named_leaves(params))
    )

    def one(slot, name):
        if isinstance(slot, optax.MaskedNode) or name not in named[0]:
            return slot
        return fn(slot, *(own[name] for own in named))

    return optax.tree.map_params(
        inner, one, state, names, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
