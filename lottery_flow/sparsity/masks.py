"""Masks: a boolean tree beside the parameters that says which weights are active.

    masks = PyTree[Bool[Array, '...'] | None]        None: this leaf stays dense

A sparse network is an ordinary parameter tree whose inactive weights are exactly
zero. Kernels have layout (..., in, out) as in Flax; a *layer* is named by the path
of its kernel without the last `/kernel`, for instance `conv1` or `block2/dense`.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

# numpy arrays too: what a checkpoint gives back.
Masks: TypeAlias = PyTree[Bool[Array | np.ndarray, "..."] | None]
Params: TypeAlias = PyTree[Float[Array | np.ndarray, "..."]]


def is_kernel(name: str, leaf: Any) -> bool:
    """The default choice of prunable leaves: floating, two dimensions or more.

    Embeddings, of positions for instance, are tables of vectors and no connections.
    """
    if name.endswith("embedding"):
        return False
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def layers(
    params: PyTree, is_prunable: Callable[[str, Any], bool] = is_kernel
) -> dict[str, Any]:
    """The prunable leaves by layer name, in the order of the tree.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      is_prunable: decides from the layer's name and its leaf.
    """
    return {k: v for k, v in named_leaves(params).items() if is_prunable(k, v)}


def in_layers(params: PyTree) -> PyTree:
    """At every leaf, whether it is a prunable one."""
    found = [is_kernel(name, leaf) for name, leaf in named_leaves(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Every leaf, None included, by layer name (`conv1`, but `conv1/bias`)."""
    return {k.removesuffix("/kernel"): leaf for k, leaf in _by_path(tree).items()}


def by_layer(masks: Masks) -> dict[str, Any]:
    """The mask of every masked layer, by name; `named_leaves` without None."""
    return {k: mask for k, mask in named_leaves(masks).items() if mask is not None}


def tree_map(fn: Callable, masks: Masks, *trees: PyTree) -> PyTree:
    """`fn(mask, *leaves)` at every leaf; the mask is None where a leaf is dense."""
    return jax.tree.map(fn, masks, *trees, is_leaf=_is_none)


def tree_leaves_at(masks: Masks, tree: PyTree) -> list[Any]:
    """The leaves of `tree` that have a mask, in the order of the masks."""
    return jax.tree.leaves(
        tree_map(lambda mask, leaf: None if mask is None else leaf, masks, tree)
    )


def apply(masks: Masks, tree: PyTree) -> PyTree:
    """Sets inactive entries to zero.

    Guarantees:
      - Inactive entries are exactly zero, also where `tree` holds NaN or inf.
      - Active entries and dense leaves keep their bits.
    """

    def select(mask, leaf):
        return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return tree_map(select, masks, tree)


def from_named(named: Mapping[str, Any], params: PyTree) -> Masks:
    """A mask tree from arrays by layer name; leaves without one are dense."""
    return _build(
        params, {k for k, m in named.items() if m is not None}, lambda i, k, _: named[k]
    )


def dense(params: PyTree) -> Masks:
    """No mask anywhere: the network is dense."""
    return jax.tree.map(lambda _: None, params)


def full(params: PyTree, names: Mapping[str, Any]) -> Masks:
    """Every weight of the named layers active; the other leaves dense."""
    return _build(params, names, lambda i, name, leaf: jnp.ones(leaf.shape, bool))


def random(key: Key[Array, ""], params: PyTree, n_active: Mapping[str, int]) -> Masks:
    """Uniformly random masks.

    Args:
      key: a typed key.
      params: arrays or shapes.
      n_active: active weights of each masked layer; layers that keep everything,
        and leaves that are not named, stay dense (None).

    Guarantees:
      - Each mask has exactly the given number of active weights.
    """
    sizes = {k: v.size for k, v in named_leaves(params).items()}
    for name, n in n_active.items():
        if name in sizes and not 0 <= n <= sizes[name]:
            raise ValueError(
                f"n_active: layer {name} has {sizes[name]} weights, not {n}; "
                "give a number from 0 to its size"
            )
    sparse = {k: n for k, n in n_active.items() if n != sizes.get(k)}

    def draw(i, name, leaf):
        order = jax.random.permutation(jax.random.fold_in(key, i), leaf.size)
        return (order < sparse[name]).reshape(leaf.shape)

    return _build(params, sparse, draw)


def shuffle(key: Key[Array, ""], masks: Masks) -> Masks:
    """Permutes each mask over all its entries; the counts stay (paper, sec. 3.7)."""
    leaves, treedef = jax.tree.flatten(masks)
    shuffled = [
        jax.random.permutation(jax.random.fold_in(key, i), m.ravel()).reshape(m.shape)
        for i, m in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, shuffled)


def count(masks: Masks) -> dict[str, Any]:
    """Active weights (int32) of each masked layer."""
    return {k: count_true(m) for k, m in by_layer(masks).items()}


def count_true(flags: Bool[Array | np.ndarray, "..."]) -> Int[Array, ""]:
    """How many entries are True, without a copy of them as integers.

    XLA's CPU compiler makes one where it has to add up more than 32 at once.
    """
    flat = jnp.ravel(flags)
    cut = flat.size // 32 * 32
    in_part = jnp.sum(flat[:cut].reshape(-1, 32), axis=1, dtype=jnp.int32)
    rest = jnp.sum(flat[cut:], dtype=jnp.int32)
    return rest + jnp.sum(in_part, dtype=jnp.int32)


_count = jax.jit(count)  # one program instead of one for every layer


def counts(masks: Masks, params: PyTree) -> dict[str, int]:
    """Active weights of every prunable layer, dense ones included, on the host."""
    n_active = jax.device_get(_count(masks))
    return {k: int(n_active.get(k, leaf.size)) for k, leaf in layers(params).items()}


def empty_outputs(
    mask: Bool[Array | np.ndarray, "*_ c_out"],
) -> Bool[Array | np.ndarray, " c_out"]:
    """Outputs of a layer that no active weight leads to.

    A unit or filter of this kind is a constant. One of the last layer is a class that
    nothing but its bias speaks for.
    """
    flat: Any = mask.reshape(-1, mask.shape[-1])  # JAX's and NumPy's have one method
    return ~flat.any(axis=0)


def count_empty_outputs(masks: Masks) -> dict[str, int]:
    """How many `empty_outputs` each masked layer has, on the host."""
    found = jax.device_get(_count_empty_outputs(masks))
    return {k: int(n) for k, n in found.items()}


@jax.jit
def _count_empty_outputs(masks):
    found = {k: empty_outputs(mask) for k, mask in by_layer(masks).items()}
    return {k: jnp.sum(empty, dtype=jnp.int32) for k, empty in found.items()}


def density(masks: Masks, params: PyTree) -> dict[str, float]:
    """Fraction of active weights of each prunable layer, dense ones included."""
    sizes = {k: leaf.size for k, leaf in layers(params).items()}
    return {k: n / sizes[k] for k, n in counts(masks, params).items()}


def total_density(masks: Masks, params: PyTree) -> float:
    """Active weights over all weights of the prunable layers."""
    sizes = [leaf.size for leaf in layers(params).values()]
    return sum(counts(masks, params).values()) / sum(sizes)


def overlap(a: Masks, b: Masks) -> dict[str, Any]:
    """Intersection over union of two masks, for each layer masked in both.

    Two empty masks overlap by 1.
    """
    other = named_leaves(b)
    shared = {
        k: (m, other[k])
        for k, m in named_leaves(a).items()
        if m is not None and other.get(k) is not None
    }

    def ratio(x, y):
        union = jnp.sum(x | y, dtype=jnp.int32)
        both = jnp.sum(x & y, dtype=jnp.int32)
        return jnp.where(union == 0, 1.0, both / jnp.maximum(union, 1))

    return {k: ratio(x, y) for k, (x, y) in shared.items()}


def pack(masks: Masks) -> PyTree[UInt8[Array, " bytes"] | None]:
    """One bit a weight, for storage; a flat uint8 array for each mask."""
    return jax.tree.map(lambda m: jnp.packbits(m.ravel()), masks)


def unpack(packed: PyTree, params: PyTree) -> Masks:
    """The masks that `pack` packed; `params` gives the shapes."""

    def restore(bits, leaf):
        if bits is None:
            return None
        return jnp.unpackbits(bits, count=leaf.size).reshape(leaf.shape).astype(bool)

    return jax.tree.map(restore, packed, params, is_leaf=_is_none)


def check(masks: Masks, params: PyTree) -> None:
    """Raises ValueError, naming the layer, unless the masks fit the parameters."""
    wanted, given = _by_path(params), _by_path(masks)
    for name in sorted(wanted.keys() ^ given.keys()):
        where = "the masks" if name in wanted else "the parameters"
        raise ValueError(
            f"masks do not fit the parameters: {where} have no leaf {name}; "
            "take masks of the same model"
        )
    for name, mask in given.items():
        if mask is None:
            continue
        if mask.shape != wanted[name].shape or mask.dtype != np.bool_:
            layer = name.removesuffix("/kernel")
            raise ValueError(
                f"masks do not fit the parameters: layer {layer} has shape "
                f"{wanted[name].shape}, its mask {mask.dtype} {mask.shape}; "
                "take boolean masks of the same model"
            )


def _build(params, names, make):
    """A mask tree with `make(index, name, leaf)` at the named layers."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    unknown = sorted(set(names) - {_layer_name(path) for path, _ in leaves})
    if unknown:
        raise ValueError(
            f"no layer named {unknown[0]}; the layers are {', '.join(layers(params))}"
        )
    built = [
        make(i, _layer_name(path), leaf) if _layer_name(path) in names else None
        for i, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, built)


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    return {_path_name(path): leaf for path, leaf in leaves}


def _path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _layer_name(path) -> str:
    return _path_name(path).removesuffix("/kernel")


def _is_none(x) -> bool:
    return x is None
