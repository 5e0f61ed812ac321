"""One round of pruning: a share of the weights that are still active goes for good.

    n' = n - floor(rate n)        of every layer, or of all layers ranked together

Sources: Frankle & Carbin 2019, "The lottery ticket hypothesis" (layer by layer, 20 %,
half as much in the output layer); Frankle et al. 2020, "Linear mode connectivity and
the lottery ticket hypothesis" (all ranked together). Their codes round differently
(round, ceil): floor of what is removed is the rule here.
"""

import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.distributions import n_zeros
from lottery_flow.sparsity.masks import Masks
from lottery_flow.sparsity.topk import topk_mask

Scope: TypeAlias = Literal["layer", "global"]


def prune_round(
    masks: Masks,
    scores: PyTree[Float[Array, "..."] | None],
    rate: float,
    *,
    scope: Scope = "layer",
    layer_rates: Mapping[str, float] | None = None,
) -> Masks:
    """Removes the lowest scores of the weights that are still active.

    Args:
      masks: the weights still active; layers without a mask stay dense.
      scores: at least where there is a mask; those of inactive weights are not read.
      rate: fraction of the active weights to remove, in [0, 1).
      scope: "layer" removes `rate` of each layer, "global" of all of them ranked
        together, which may leave a layer with nothing.
      layer_rates: layer name -> its own rate; in either scope such a layer is ranked
        alone and takes no part in the rest. The released code of the lottery ticket
        halves that of the output layer.

    Raises:
      ValueError: a rate outside [0, 1), an unknown scope, a name without a mask.

    Guarantees:
      - floor(rate n) weights go: of each layer of n active ones, or of all together.
      - The rate means the decimal that is written: 0.1 of 30 is 3.
      - A pruned weight never returns.
      - No weight kept scores lower than one removed of the same layer or ranking.
      - Among equal scores the lower flat index (and earlier layer) stays.
    """
    check_round(masks, rate, scope, layer_rates)
    named = masks_lib.by_layer(masks)
    own = dict(layer_rates or {})
    shared = [name for name in named if name not in own]
    together = [tuple(shared)] if scope == "global" and shared else []
    alone = [(name,) for name in (named if scope == "layer" else own)]
    groups = (*alone, *together)
    n_active = jax.device_get(_count(masks))

    def n_kept(group):
        n = sum(int(n_active[name]) for name in group)
        return n - n_zeros(n, own.get(group[0], rate))

    of_named = dict(zip(named, masks_lib.tree_leaves_at(masks, scores), strict=True))
    kept = _keep_best(of_named, named, [n_kept(group) for group in groups], groups)
    return jax.tree.unflatten(jax.tree.structure(masks), [kept[k] for k in named])


def check_round(
    masks: Masks,
    rate: float,
    scope: str,
    layer_rates: Mapping[str, float] | None,
) -> None:
    """Raises the errors of `prune_round`, before any work."""
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r}: give layer or global")
    _fraction("rate", rate)
    named = [k for k, m in masks_lib.named_leaves(masks).items() if m is not None]
    for name, own in (layer_rates or {}).items():
        if name not in named:
            raise ValueError(
                f"layer_rates: no masked layer {name}; they are {', '.join(named)}"
            )
        _fraction(f"layer_rates of {name}", own)


def rounds_to(sparsity: float, rate: float) -> int:
    """Rounds until at least `sparsity` is reached: (1 - rate)^n <= 1 - sparsity.

    Both are decimals in [0, 1); rounding to whole weights, which keeps more, is left
    out.

    Raises:
      ValueError: outside that range, or a rate of zero for a positive sparsity.
    """
    left, share = 1 - _fraction("sparsity", sparsity), 1 - _fraction("rate", rate)
    if share == 1 and left < 1:
        raise ValueError(f"rate=0 never reaches sparsity={sparsity}; give more than 0")
    n, density = 0, Fraction(1)
    while density > left:
        n, density = n + 1, density * share
    return n


def densities(n_rounds: int, rate: float) -> list[float]:
    """Fractions of active weights after 0, 1, ..., n rounds: (1 - rate)^i."""
    share = 1 - _fraction("rate", rate)
    return [float(share**i) for i in range(n_rounds + 1)]


_count = jax.jit(masks_lib.count)


@functools.partial(jax.jit, static_argnames="groups")
def _keep_best(scores, masks, n_kept, groups) -> dict[str, Bool[Array, "..."]]:
    """The best of each group of layers, ranked together."""
    wide = any(s.dtype == jnp.float64 for s in scores.values())
    kind = jnp.float64 if wide else jnp.float32  # exact for every narrower one

    def flat(tree, group, dtype):
        return jnp.concatenate([jnp.ravel(tree[k]).astype(dtype) for k in group])

    best = topk_mask(
        [flat(scores, group, kind) for group in groups],
        n_kept,
        [flat(masks, group, bool) for group in groups],
    )
    kept = {}
    for chosen, group in zip(best, groups, strict=True):
        ends = np.cumsum([masks[k].size for k in group]).tolist()
        for name, part in zip(group, jnp.split(chosen, ends[:-1]), strict=True):
            kept[name] = part.reshape(masks[name].shape)
    return kept


def _fraction(argument: str, value: float) -> Fraction:
    """The decimal that is written."""
    number = Fraction(repr(float(value)))
    if not 0 <= number < 1:
        raise ValueError(f"{argument}={value}: give a fraction in [0, 1)")
    return number
