"""What a ticket's weights start from: rewound, shuffled, reduced to signs, perturbed.

With w the weights of a layer at initialisation or at step k, active ones alone:

    rewind           w
    shuffle          a random permutation of w, over the layer or within each filter
      keep_signs       sign(w) * permuted |w|
    sign_constant    sign(w) * std of the layer at initialisation
    flip_signs       -w with a given probability
    add_noise        w + N(0, (scale * std)^2)

Every function takes `(key, params, masks)`, as those of `initializers`, which serve to
draw the weights of a ticket again; `reinit` draws all of a network's parameters.
Sources: Zhou et al. 2019, "Deconstructing lottery tickets: zeros, signs, and the
supermask" (treatments of kept weights); Frankle, Schwab & Morcos 2020, "The early phase
of neural network training" (perturbations).

Guarantees:
  - Inactive weights are exactly zero.
  - Leaves without a mask keep their bits, but in `reinit`.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.ticket_criteria import widened

Treatment: TypeAlias = Callable[[Key[Array, ""], Params, Masks], Params]
Within: TypeAlias = Literal["layer", "filter"]


def rewind(key: Key[Array, ""], params: Params, masks: Masks) -> Params:
    """The weights as they were.

    Guarantees:
      - Active weights keep their bits.
    """
    del key
    return masks_lib.apply(masks, params)


def reinit(init_fn: Callable[[Key[Array, ""]], Params]) -> Treatment:
    """A treatment that draws every parameter again, biases and norms too.

    Args:
      init_fn: key -> parameters, a model's own initialisation.
    """

    def treatment(key: Key[Array, ""], params: Params, masks: Masks) -> Params:
        del params
        return masks_lib.apply(masks, init_fn(key))

    return treatment


def shuffle(
    key: Key[Array, ""],
    params: Params,
    masks: Masks,
    *,
    within: Within = "layer",
    keep_signs: bool = False,
) -> Params:
    """Permutes the active weights among their positions, uniformly at random.

    Args:
      key: a typed key; leaf i uses `fold_in(key, i)`.
      params: the weights.
      masks: the active ones.
      within: the whole "layer", or each output "filter" (last axis) by itself.
      keep_signs: permute the magnitudes and leave every sign where it is.

    Raises:
      ValueError: an unknown `within`.

    Guarantees:
      - The active weights of each layer (of each filter) are the same multiset; with
        `keep_signs` their magnitudes are, and each position keeps its sign.
    """
    if within not in ("layer", "filter"):
        raise ValueError(f"within={within!r}: give layer or filter")

    def permuted(key, mask, leaf):
        if within == "layer":
            flat = _permute(key, mask.ravel(), leaf.ravel())
        else:
            n = leaf.shape[-1]
            flat = jax.vmap(_permute, in_axes=(0, 1, 1), out_axes=1)(
                jax.random.split(key, n), mask.reshape(-1, n), leaf.reshape(-1, n)
            )
        new = flat.reshape(leaf.shape)
        return jnp.copysign(new, leaf) if keep_signs else new

    return _at_masks(permuted, key, params, masks)


def sign_constant(
    key: Key[Array, ""], params: Params, masks: Masks, *, std: Mapping[str, float]
) -> Params:
    """sign(w) times one constant a layer.

    Args:
      key: unused.
      params: gives the signs.
      masks: the active weights.
      std: layer name -> the constant, `layer_std` of the network at initialisation in
        the source.

    Raises:
      ValueError: `std` lacks a masked layer.

    Guarantees:
      - Every active weight has the constant's magnitude and its own sign.
    """

    def constant(key, mask, leaf, size):
        return jnp.copysign(jnp.full_like(leaf, size), leaf)

    return _at_masks(constant, key, params, masks, std)


def flip_signs(
    key: Key[Array, ""], params: Params, masks: Masks, *, probability: float = 0.5
) -> Params:
    """Flips the sign of each active weight with this probability (1/2: random signs).

    Guarantees:
      - Magnitudes keep their bits.
      - Probability 0 changes nothing and 1 every sign.
    """

    def flipped(key, mask, leaf):
        flip = jax.random.bernoulli(key, probability, leaf.shape)
        return jnp.where(flip, -leaf, leaf)

    return _at_masks(flipped, key, params, masks)


def add_noise(
    key: Key[Array, ""],
    params: Params,
    masks: Masks,
    *,
    scale: float,
    std: Mapping[str, float],
) -> Params:
    """Adds Gaussian noise to the active weights.

    Args:
      key: a typed key; leaf i uses `fold_in(key, i)`.
      params: the weights.
      masks: the active ones.
      scale: standard deviation of the noise, in those of the layer.
      std: layer name -> the layer's, `layer_std` at initialisation in the source.

    Raises:
      ValueError: `std` lacks a masked layer.

    Guarantees:
      - For one key the noise is in proportion to `scale`.
    """

    def noisy(key, mask, leaf, size):
        noise = jax.random.normal(key, leaf.shape, jnp.float32)
        wide = widened(leaf)
        return (wide + (scale * size * noise).astype(wide.dtype)).astype(leaf.dtype)

    return _at_masks(noisy, key, params, masks, std)


TREATMENTS: dict[str, Callable[..., Params]] = {
    "rewind": rewind,
    "shuffle": shuffle,
    "sign_constant": sign_constant,
    "flip_signs": flip_signs,
    "add_noise": add_noise,
}


def layer_std(params: Params, masks: Masks) -> dict[str, float]:
    """Standard deviation of the active weights of every masked layer, on the host.

    Zero for a layer where nothing is active.
    """

    def std(mask, leaf):
        value = jnp.std(widened(leaf), where=mask)
        return jnp.where(jnp.any(mask), value, jnp.zeros_like(value))

    named = masks_lib.by_layer(masks)
    leaves = masks_lib.tree_leaves_at(masks, params)
    pairs = zip(named.values(), leaves, strict=True)
    found = [std(jnp.asarray(mask), jnp.asarray(leaf)) for mask, leaf in pairs]
    return {k: float(x) for k, x in zip(named, found, strict=True)}


def frozen_offset(params: Params, masks: Masks) -> Params:
    """The inactive weights alone: for networks whose pruned weights stay at a value.

    Inactive weights are zero everywhere in this package. A network that keeps them at
    their initial values, as Zhou et al. do for comparison, is the function
    `params -> loss_fn(params + offset)` of ordinary sparse parameters.

    Guarantees:
      - `masks.apply(masks, params)` plus the offset equals `params` exactly.
      - Active weights and dense leaves are zero in the offset.
    """

    def inactive(mask, leaf):
        zeros = jnp.zeros_like(leaf)
        return zeros if mask is None else jnp.where(mask, zeros, leaf)

    return masks_lib.tree_map(inactive, masks, params)


def _at_masks(fn, key, params, masks, by_name=None) -> Params:
    """`fn(key, mask, leaf, [number of the layer])` at masked leaves, masked after."""
    named = masks_lib.named_leaves(params)
    new = []
    for i, (name, mask) in enumerate(masks_lib.named_leaves(masks).items()):
        leaf = named[name]
        if mask is not None:
            if by_name is not None and name not in by_name:
                raise ValueError(
                    f"std has no layer {name}; take layer_std of the same network"
                )
            extra = () if by_name is None else (by_name[name],)
            mask, leaf = jnp.asarray(mask), jnp.asarray(leaf)
            leaf = fn(jax.random.fold_in(key, i), mask, leaf, *extra)
        new.append(leaf)
    return masks_lib.apply(masks, jax.tree.unflatten(jax.tree.structure(params), new))


def _permute(key, mask, flat):
    """The active entries in random order at the active positions."""
    # Stable sorts of booleans: active positions first, in random and in index order.
    mixed = jax.random.permutation(key, flat.size)
    source = mixed[jnp.argsort(~mask[mixed], stable=True)]
    target = jnp.argsort(~mask, stable=True)
    return jnp.zeros_like(flat).at[target].set(flat[source], unique_indices=True)
