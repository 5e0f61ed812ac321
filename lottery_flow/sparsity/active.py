"""The space of active parameters: R^n, with a coordinate for each active weight.

Inactive weights are not coordinates, so a linear map of this space (a Hessian) has no
spurious zero eigenvalues, and its vectors are as small as the sparse network.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params


class ActiveSpace(NamedTuple):
    """Coordinates of the active entries of a parameter tree, leaf after leaf.

    Attributes:
      n: dimension: active weights and all entries of dense leaves.
      layers: where each leaf lies, by layer name.
      indices: for each leaf the flat indices of its active entries, int32; None where
        all are.
      shapes: of the leaves.
      treedef: of the tree.
    """

    n: int
    layers: dict[str, slice]
    indices: tuple[Any, ...]
    shapes: tuple[Any, ...]
    treedef: Any

    @property
    def dtype(self) -> np.dtype:
        """Of vectors: that of all leaves together, at least float32."""
        kinds = [shape.dtype for shape in self.shapes]
        with jax.numpy_dtype_promotion("standard"):  # whatever is asked of others
            return np.dtype(functools.reduce(jnp.promote_types, kinds, jnp.float32))

    def flatten(self, tree: PyTree) -> Float[Array, " n"]:
        """The active entries of a tree of the same shapes; the others are left out."""
        leaves = self.treedef.flatten_up_to(tree)
        return jnp.concatenate([self.entries(i, leaf) for i, leaf in enumerate(leaves)])

    def entries(self, i: int, leaf: Float[Array, "..."]) -> Float[Array, " m"]:
        """The active entries of the leaf that is number i."""
        index, flat = self.indices[i], jnp.ravel(leaf).astype(self.dtype)
        return flat if index is None else flat[index]

    def unflatten(self, vector: Float[Array, " n"]) -> PyTree:
        """The tree with these active entries, exactly zero elsewhere."""
        parts = self.layers.values()
        leaves = [self.scatter(i, vector[part]) for i, part in enumerate(parts)]
        return jax.tree.unflatten(self.treedef, leaves)

    def scatter(self, i: int, entries: Float[Array, " m"]) -> Float[Array, "..."]:
        """The leaf that is number i, with these active entries and zeros elsewhere."""
        index, shape = self.indices[i], self.shapes[i]
        entries = entries.astype(shape.dtype)
        if index is None:
            return entries.reshape(shape.shape)
        zeros = jnp.zeros(shape.size, shape.dtype)
        leaf = zeros.at[index].set(
            entries, unique_indices=True, indices_are_sorted=True
        )
        return leaf.reshape(shape.shape)


def active_space(params: Params, masks: Masks | None = None) -> ActiveSpace:
    """The active parameters of a network.

    Args:
      params: the sparse weights, or their shapes.
      masks: None, or None at a leaf, where everything is active.

    Raises:
      ValueError: the masks do not fit the parameters, or nothing is active.
    """
    if masks is None:
        masks = masks_lib.dense(params)
    masks_lib.check(masks, params)
    named_masks = masks_lib.named_leaves(masks)
    layers, indices, start = {}, [], 0
    for name, leaf in masks_lib.named_leaves(params).items():
        mask = named_masks[name]
        if mask is None:
            indices.append(None)
            size = leaf.size
        else:
            index = np.flatnonzero(np.asarray(mask)).astype(np.int32)
            indices.append(index)
            size = len(index)
        layers[name] = slice(start, start + size)
        start += size
    if not start:
        raise ValueError("no parameter is active; give masks that keep some weights")
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return ActiveSpace(start, layers, tuple(indices), shapes, treedef)
