"""A parameterization: the trained values are not the weights that the model sees.

    weights = f(raw, noise)         the optimizer moves raw, the model sees weights
    loss    = L(weights) + penalty(raw, step)

A mask at `init` says which leaves shall be sparse; only where there is a mask counts,
not what it holds. Leaves without one (biases, norms, chosen dense layers) are trained
as they are, but for the methods that freeze them. Kernels have layout (..., in, out).
The methods are in `parameterizations`; each module there names its sources.

Guarantees (of every method):
  - An inactive weight is exactly zero in `weights(raw, None, False)`, and
    `masks(raw)` marks the others.
  - `weights(raw, key, False)` does not depend on the key.
  - Dense leaves reach the model with their bits.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from lottery_flow.sparsity import masks as masks_lib


class Parameterization(NamedTuple):
    """A method, as pure functions of traced values (`train` alone is static).

    Attributes:
      init: `(key, params, masks) -> raw`; ValueError if the masks don't fit.
      weights: `(raw, key, train) -> params`; what the model sees. Differentiable in
        raw. The key is used by stochastic methods in training alone (ValueError if
        it is None then).
      penalty: `(raw, step) -> scalar`, float32, a term of the loss; step counts the
        updates done.
      masks: `(raw) -> masks`; the active weights of `weights(raw, None, False)`.
      decayed: `(raw) -> bools`, of raw's structure: where weight decay applies.
      trained: `(raw) -> bools`, of raw's structure: False where a value never
        changes; whoever applies updates sets them to zero there.
    """

    init: Callable
    weights: Callable
    penalty: Callable
    masks: Callable
    decayed: Callable
    trained: Callable


class Raw(NamedTuple):
    """The trained values of a parameterization.

    Attributes:
      dense: the parameters that stay dense, None at the sparse leaves.
      sparse: by name of a quantity ('weights', 'scores', ...), its values, a tree
        like the parameters with None at the dense leaves.
    """

    dense: PyTree
    sparse: dict[str, PyTree]


def from_layers(
    *,
    start: Callable,
    active: Callable,
    effective: Callable,
    penalty: Callable | None = None,
    decayed: Collection[str] = (),
    frozen: Collection[str] = (),
    is_dense_frozen: bool = False,
    is_stochastic: bool = False,
) -> Parameterization:
    """A parameterization from functions of its sparse layers alone.

    Args:
      start: `(keys, weights) -> sparse`; keys and weights are trees of the sparse
        leaves, `sparse` is that of `Raw`.
      active: `(sparse) -> masks`; bool trees of the sparse leaves.
      effective: `(sparse, keys) -> weights`; keys is None but for a stochastic method
        in training.
      penalty: `(sparse, step) -> scalar`.
      decayed: quantities that weight decay applies to. Dense kernels decay too, if
        they are trained.
      frozen: quantities that never change.
      is_dense_frozen: whether the dense leaves never change.
      is_stochastic: whether the weights in training depend on the key.
    """

    def init(key, params, masks):
        masks_lib.check(masks, params)

        def pick(is_sparse):
            return masks_lib.tree_map(
                lambda m, p: p if (m is not None) == is_sparse else None, masks, params
            )

        weights = pick(is_sparse=True)
        return Raw(pick(is_sparse=False), start(_keys(key, weights), weights))

    def weights(raw, key, train):
        keys = None
        if is_stochastic and train:
            if key is None:
                raise ValueError("key=None: training draws noise; give a typed key")
            keys = _keys(key, next(iter(raw.sparse.values())))
        return _join(raw.dense, effective(raw.sparse, keys))

    def penalize(raw, step):
        if penalty is None:
            return jnp.zeros((), jnp.float32)
        return penalty(raw.sparse, step)

    def flags(raw, dense, names):
        sparse = {
            name: jax.tree.map(lambda _, flag=name in names: flag, tree)
            for name, tree in raw.sparse.items()
        }
        return Raw(dense, sparse)

    def is_decayed(raw):
        found = [
            masks_lib.is_kernel(name, leaf) and not is_dense_frozen
            for name, leaf in masks_lib.named_leaves(raw.dense).items()
            if leaf is not None
        ]
        return flags(raw, jax.tree.structure(raw.dense).unflatten(found), decayed)

    def is_trained(raw):
        dense = jax.tree.map(lambda _: not is_dense_frozen, raw.dense)
        return flags(raw, dense, raw.sparse.keys() - set(frozen))

    return Parameterization(
        init=init,
        weights=weights,
        penalty=penalize,
        masks=lambda raw: active(raw.sparse),
        decayed=is_decayed,
        trained=is_trained,
    )


def check_counts(argument: str, n_active: Mapping[str, int], weights: PyTree) -> None:
    """Raises ValueError unless each sparse layer, and no other, has a possible count.

    Args:
      argument: what the counts are called, for the message.
      n_active: by layer name.
      weights: arrays, None at dense leaves.
    """
    sparse = {k: w for k, w in masks_lib.named_leaves(weights).items() if w is not None}
    for name in sorted(sparse.keys() ^ n_active.keys()):
        if name in sparse:
            raise ValueError(
                f"{argument} has no layer {name}; name it, or give it no mask"
            )
        raise ValueError(
            f"{argument} names {name}, which has no mask; the sparse layers are "
            f"{', '.join(sparse)}"
        )
    for name, leaf in sparse.items():
        if not 0 <= n_active[name] <= leaf.size:
            raise ValueError(
                f"{argument}: layer {name} has {leaf.size} weights, not "
                f"{n_active[name]}; give a number from 0 to its size"
            )


def counts_like(n_active: Mapping[str, int], weights: PyTree) -> PyTree[int]:
    """The counts at the leaves of the layers that they belong to."""
    named = masks_lib.named_leaves(weights).items()
    found = [n_active[name] for name, leaf in named if leaf is not None]
    return jax.tree.structure(weights).unflatten(found)


def total(terms: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    """The sum of all entries of all leaves, in float32."""
    sums = [jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(terms)]
    return sum(sums, jnp.zeros((), jnp.float32))


def check_scale(argument: str, scale: float) -> None:
    """Raises ValueError for a negative factor of a penalty."""
    if not scale >= 0:
        raise ValueError(f"{argument}={scale}: give 0 or more")


def warmed_up(
    scale: float, warmup: optax.Schedule | None, step: Any
) -> Float[Array, ""]:
    """The factor of a penalty at a step: scale * warmup(step), in float32."""
    return jnp.asarray(scale * (1.0 if warmup is None else warmup(step)), jnp.float32)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """In float32 at least, where bfloat16 would be too coarse."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _keys(key, tree) -> PyTree:
    """A key for each leaf; the same one whichever others are dense."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_none)
    return treedef.unflatten(
        [
            None if leaf is None else jax.random.fold_in(key, i)
            for i, leaf in enumerate(leaves)
        ]
    )


def _join(dense, sparse) -> PyTree:
    """One tree of parameters from its dense and its sparse leaves."""
    return jax.tree.map(
        lambda d, s: s if d is None else d, dense, sparse, is_leaf=_is_none
    )


def _is_none(x: Any) -> bool:
    return x is None
