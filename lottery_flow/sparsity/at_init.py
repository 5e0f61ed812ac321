"""Pruning at initialisation: masks from scores, before the first step of training.

    for k = 1 ... rounds:
        score the network as masked so far
        keep the n_k best of the weights still active,  n_k = round(N rho^(k / rounds))

with N the active weights at the start, rho the share of them that is left at the end,
and one ranking over all layers (scope 'global') or one for each (scope 'layer'). One
round is single-shot pruning. Sources: those of the scores (`at_init_scores`); Tanaka et
al. 2020, algorithm 1 (the exponential schedule); de Jorge et al. 2021, "Progressive
skeletonization" (SNIP in rounds); Evci et al. 2020 (SNIP layer by layer).

The sanity checks of Frankle et al. 2021, "Pruning neural networks at initialization:
why are we missing the mark?", on the masks of a method:

    shuffle         masks.shuffle: permute every layer's mask
    reinitialise    draw the weights again after pruning, by any of `initializers`
    invert          method._replace(invert=True): keep the lowest scores

Network, scores and batches are those of `at_init_scores`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from lottery_flow.sparsity import at_init_checks
from lottery_flow.sparsity import at_init_scores as scores_lib
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.at_init_scores import Batches, Network, Scorer, Scores
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.topk import topk_mask

Scope: TypeAlias = Literal["global", "layer"]


class PruneAtInit(NamedTuple):
    """A method that prunes at initialisation.

    Attributes:
      name: for messages.
      score: see `at_init_scores`.
      scope: rank the weights of all layers together, or of each layer alone.
      rounds: of scoring and pruning.
      n_examples: that its source scores on; 0 needs no data.
      invert: keep the lowest scores, as a sanity check.
    """

    name: str
    score: Scorer
    scope: Scope = "global"
    rounds: int = 1
    n_examples: int = 0
    invert: bool = False


# Examples: a batch of 100 in SNIP's LeNet experiments, 10 for each of ten classes in
# GraSP; 5,000 in the configurations released with Evci et al. 2020.
METHODS: dict[str, PruneAtInit] = {
    method.name: method
    for method in (
        PruneAtInit("random", scores_lib.random, scope="layer"),
        PruneAtInit("magnitude", scores_lib.magnitude),
        PruneAtInit("snip", scores_lib.snip, n_examples=100),
        PruneAtInit("snip_layerwise", scores_lib.snip, scope="layer", n_examples=5000),
        PruneAtInit("snip_iterative", scores_lib.snip, rounds=100, n_examples=100),
        PruneAtInit("grasp", scores_lib.grasp, n_examples=100),
        PruneAtInit("synflow", scores_lib.synflow, rounds=100),
        PruneAtInit("fisher", scores_lib.fisher, n_examples=100),
    )
}


def prune_at_init(
    method: PruneAtInit,
    key: Key[Array, ""],
    params: Params,
    masks: Masks,
    network: Network,
    batches: Batches,
    n_active: Mapping[str, int],
) -> Masks:
    """Masks of a network that is not trained yet. Runs on the host, round by round.

    Args:
      method: one of `METHODS`, or a variant of it (`_replace`).
      key: typed key; round k scores with `fold_in(key, k)`.
      params: the initial parameters.
      masks: which layers are pruned, for instance `masks.full`; their inactive weights
        stay inactive.
      network: whose weights are scored.
      batches: examples to score on; () for methods without data.
      n_active: weights to keep of each masked layer, by its name. With scope 'global'
        their sum alone matters.

    Raises:
      ValueError: masks that don't fit the parameters; `n_active` that doesn't name the
        masked layers, or asks for more weights than are active; no batch where the
        method needs one; a score that is not finite.

    Warns:
      UserWarning: a layer whose scores are all zero at the start, or that ends without
        any active weight, see `at_init_checks`.

    Guarantees:
      - Exactly sum(n_active) weights are active, with scope 'layer' exactly n_active
        of each layer.
      - After round k there are as many as `exponential_schedule` says.
      - A weight that was pruned in one round never returns in a later one.
      - Every round scores the masked network.
    """
    masks_lib.check(masks, params)
    before, after = _before_and_after(method.scope, masks, n_active)
    schedules = [
        exponential_schedule(n, goal, method.rounds)
        for n, goal in zip(before, after, strict=True)
    ]
    for k in range(method.rounds):
        weights = _apply(masks, params)
        round_key = jax.random.fold_in(key, k)
        scores = method.score(round_key, weights, masks, network, batches)
        at_init_checks.check_scores(scores, masks, method.name, warn=k == 0)
        n_keep = [schedule[k] for schedule in schedules]
        masks = _select(scores, masks, n_keep, method.scope, method.invert)
    at_init_checks.warn_collapsed(masks, method.name)
    return masks


def prune(
    scores: Scores,
    masks: Masks,
    n_active: Mapping[str, Any],
    scope: Scope = "global",
    *,
    invert: bool = False,
) -> Masks:
    """Keeps the active weights of the highest scores; works under jit.

    Args:
      scores: a tree like the masks, None where there is none. NaN is below everything.
      masks: the weights that may be kept.
      n_active: weights to keep of each masked layer, by its name; may be traced.
      scope: 'layer' keeps so many of each layer; 'global' as many in all, whichever
        layer they are in, ranked in the order of the tree.
      invert: keep the lowest scores instead.

    Raises:
      ValueError: an unknown scope; `n_active` that doesn't name the masked layers.

    Guarantees:
      - Exactly n_active of each layer, or in all, are active, or all eligible ones.
      - No weight outside `masks` is active.
      - Among equal scores the lower flat index is kept, and the earlier layer of the
        tree.
      - `invert` keeps the lowest scores, ties again by the lower flat index.
    """
    n_keep = _budget(scope, masks, n_active)
    return _select(scores, masks, n_keep, scope, invert)


def exponential_schedule(n_from: int, n_to: int, rounds: int) -> list[int]:
    """Weights left after each round: n_from (n_to / n_from)^(k / rounds), rounded.

    Raises:
      ValueError: `rounds` is below 1, or `n_to` outside 0 ... n_from.

    Guarantees:
      - The last is exactly n_to, and none is larger than the one before.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1; write 1 for single-shot")
    if not 0 <= n_to <= n_from:
        raise ValueError(
            f"n_to={n_to} must be from 0 to the {n_from} weights that are active; keep "
            "fewer weights"
        )
    share = n_to / max(n_from, 1)
    counts = [round(n_from * share ** (k / rounds)) for k in range(1, rounds)]
    return [*counts, n_to]


_apply = jax.jit(masks_lib.apply)  # one program instead of one for every layer


def _before_and_after(scope: str, masks: Masks, n_active):
    """Active weights now and at the end: of each layer, or in all."""
    budget, active = _budget(scope, masks, n_active), at_init_checks.counts(masks)
    for name, n in n_active.items():
        if not 0 <= n <= active[name]:
            raise ValueError(
                f"n_active of {name} is {n}, but the layer has {active[name]} active "
                "weights; give a number from 0 to that"
            )
    return _budget(scope, masks, active), budget


def _budget(scope: str, masks: Masks, n_active) -> list[Any]:
    """How many weights to keep of each array that is ranked."""
    if scope not in ("global", "layer"):
        raise ValueError(f"scope={scope!r} is unknown; write 'global' or 'layer'")
    names = [k for k, m in masks_lib.named_leaves(masks).items() if m is not None]
    if wrong := sorted(set(names) ^ set(n_active)):
        has = "no mask" if wrong[0] in n_active else "a mask"
        verb = "names" if wrong[0] in n_active else "lacks"
        raise ValueError(
            f"n_active {verb} {wrong[0]}, which has {has}; name the masked layers, "
            f"{', '.join(names)}"
        )
    n_keep = [n_active[name] for name in names]
    return n_keep if scope == "layer" else [sum(n_keep)]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _select(
    scores: Scores, masks: Masks, n_keep: Sequence[Any], scope: str, invert: bool
) -> Masks:
    """The `n_keep` best of each layer, or of all layers as one array."""
    where, treedef = jax.tree.flatten(masks)
    values = jax.tree.leaves(scores)
    if invert:
        values = [-x for x in values]
    if not where:
        return masks
    if scope == "layer":
        return treedef.unflatten(topk_mask(values, list(n_keep), where=where))
    wide = any(x.dtype == jnp.float64 for x in values)
    dtype = jnp.float64 if wide else jnp.float32
    chosen = topk_mask(
        jnp.concatenate([x.ravel().astype(dtype) for x in values]),
        n_keep[0],
        where=jnp.concatenate([m.ravel() for m in where]),
    )
    kept, start = [], 0
    for m in where:
        kept.append(chosen[start : start + m.size].reshape(m.shape))
        start += m.size
    return treedef.unflatten(kept)
