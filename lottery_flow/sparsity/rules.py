"""Rules: when and how the topology of a network changes while it trains.

One rewire of a layer with n active weights (SET, RigL and RigL Inverted alike):

    n_drop = int(n * fraction(t))
    keep the n - n_drop active weights of largest |w|
    grow n_drop of all other positions, best growth score first

so the number of active weights is conserved exactly, layer by layer. A weight that
was just dropped may be grown again at once. Sources: Evci et al. 2020, "Rigging the
Lottery", algorithm 1, and its released code (google-research/rigl), which settles
rounding, ties and timing; Zhu & Gupta 2017, "To prune, or not to prune" (gradual
pruning).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from lottery_flow.sparsity import criteria, schedules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.topk import topk_mask


def _no_state(masks, params):
    del masks, params
    return ()


def _ignore(state, grads):
    del grads
    return state


class Rule(NamedTuple):
    """A method that changes masks, as pure functions of traced values.

    Attributes:
      is_due: `(step) -> bool`; whether this step rewires.
      propose: `(step, key, masks, params, grads, state) -> (masks, state)`; the new
        masks, from dense gradients at the masked parameters.
      init: `(masks, params) -> state`; what the rule remembers, () for most.
      observe: `(state, dense_grads) -> state`; called at every step, cheap.
      timing: a rewire comes 'after' the gradient step, on the new weights, with
        `step` counting the updates done; or 'instead' of it, spending the batch,
        with `step` counting the updates before it, so that step 0 can be due.
    """

    is_due: Callable
    propose: Callable
    init: Callable = _no_state
    observe: Callable = _ignore
    timing: Literal["after", "instead"] = "after"


def drop_grow(
    masks: PyTree[Bool[Array, "..."]],
    drop_scores: PyTree[Float[Array, "..."]],
    grow_scores: PyTree[Float[Array, "..."]],
    fraction: float | Float[Array, ""],
) -> PyTree[Bool[Array, "..."]]:
    """Drops a fraction of the active weights of each layer and grows as many.

    Args:
      masks: active weights, an array for each layer (or a single one).
      drop_scores: the lowest of the active ones are dropped.
      grow_scores: the highest of all positions not kept are grown.
      fraction: of a layer's active weights, from 0 to 1; n_drop is truncated.

    An active weight of zero competes with active weights alone; in the reference code
    an inactive one may take its place.

    Guarantees (for each layer):
      - The result has exactly as many active weights as the mask.
      - Ties are broken by the lower flat index, for dropping and for growing.
    """

    def to_drop(n_active):
        product = n_active.astype(jnp.float32) * jnp.asarray(fraction, jnp.float32)
        return jnp.clip(jnp.floor(product).astype(jnp.int32), 0, n_active)

    n_active = jax.tree.map(masks_lib.count_true, masks)
    n_drop = jax.tree.map(to_drop, n_active)
    n_keep = jax.tree.map(jnp.subtract, n_active, n_drop)
    kept = topk_mask(drop_scores, n_keep, where=masks)
    grown = topk_mask(grow_scores, n_drop, where=jax.tree.map(jnp.logical_not, kept))
    return jax.tree.map(jnp.logical_or, kept, grown)


def static() -> Rule:
    """The topology never changes: scratch, lottery tickets, dense networks."""
    return Rule(
        is_due=lambda step: jnp.zeros(jnp.shape(step), bool),
        propose=lambda step, key, masks, params, grads, state: (masks, state),
    )


def drop_and_grow(
    is_due: schedules.Due,
    fraction: optax.Schedule,
    *,
    drop: criteria.Criterion = criteria.magnitude,
    grow: criteria.Criterion,
    timing: Literal["after", "instead"] = "after",
) -> Rule:
    """The family of SET and RigL: drop by one criterion, grow by another.

    Args:
      is_due: the steps that rewire, from `schedules.every`.
      fraction: step -> fraction of each layer's active weights to drop.
      drop: the lowest scores are dropped.
      grow: the highest scores are grown.
      timing: see `Rule`.
    """

    def propose(step, key, masks, params, grads, state):
        f = jnp.asarray(fraction(step))
        leaves, treedef = jax.tree.flatten(masks)
        w_leaves = masks_lib.tree_leaves_at(masks, params)
        g_leaves = masks_lib.tree_leaves_at(masks, grads)
        scores = []
        for i, (w, g) in enumerate(zip(w_leaves, g_leaves, strict=True)):
            drop_key, grow_key = jax.random.split(jax.random.fold_in(key, i))
            scores.append((drop(drop_key, w, g), grow(grow_key, w, g)))
        drops, grows = [d for d, _ in scores], [g for _, g in scores]
        return treedef.unflatten(drop_grow(leaves, drops, grows, f)), state

    return Rule(is_due=is_due, propose=propose, timing=timing)


def set_(is_due: schedules.Due, fraction: optax.Schedule, **kwargs) -> Rule:
    """SET (Mocanu et al. 2018): drop the smallest weights, grow at random."""
    return drop_and_grow(is_due, fraction, grow=criteria.random, **kwargs)


def rigl(is_due: schedules.Due, fraction: optax.Schedule, **kwargs) -> Rule:
    """RigL (Evci et al. 2020): grow where the dense gradient is largest."""
    return drop_and_grow(is_due, fraction, grow=criteria.gradient, **kwargs)


def rigl_inverted(is_due: schedules.Due, fraction: optax.Schedule, **kwargs) -> Rule:
    """RigL (Inverted): grow where the dense gradient is smallest (Evci et al. 2022)."""
    return drop_and_grow(is_due, fraction, grow=criteria.inverted_gradient, **kwargs)


def gradual_pruning(
    *,
    begin: int,
    end: int,
    interval: int,
    final_sparsity: Mapping[str, float],
    initial_sparsity: float = 0.0,
) -> Rule:
    """Gradual magnitude pruning of Zhu & Gupta (2017).

    At t = begin, begin + interval, ..., end each layer keeps its
    max(round(size (1 - s(t))), 1) largest weights, s(t) the cubic schedule. Weights
    that were pruned never return. Start from full masks.

    Args:
      begin: first step that prunes.
      end: step at which the final sparsity is reached, if the interval divides
        end - begin; otherwise pruning ends short of it.
      interval: steps between two prunings.
      final_sparsity: by layer name; layers without a mask need none.
      initial_sparsity: of every layer, before `begin`.
    """
    is_due = schedules.every(interval, begin, end)
    for name, sparsity in final_sparsity.items():
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(
                f"final_sparsity of {name} is {sparsity}: give a fraction from 0 to 1"
            )
    due_steps = np.arange(begin, end + 1, interval)

    def n_kept(name: str, size: int) -> np.ndarray:
        if name not in final_sparsity:
            raise ValueError(
                f"final_sparsity has no layer {name}; name it, or give it no mask"
            )
        sparsity = schedules.cubic_sparsity(
            initial_sparsity, final_sparsity[name], begin, end
        )
        # Python's round is the banker's rounding of the reference code.
        exact = [size * (1.0 - float(sparsity(t))) for t in due_steps.tolist()]
        return np.array([max(round(n), 1) for n in exact], np.int32)

    def propose(step, key, masks, params, grads, state):
        del key, grads
        names = [k for k, m in masks_lib.named_leaves(masks).items() if m is not None]
        leaves, treedef = jax.tree.flatten(masks)
        i = jnp.clip((step - begin) // interval, 0, len(due_steps) - 1)
        scores = [jnp.abs(w) for w in masks_lib.tree_leaves_at(masks, params)]
        sizes = zip(names, leaves, strict=True)
        k = [jnp.asarray(n_kept(name, m.size))[i] for name, m in sizes]
        return treedef.unflatten(topk_mask(scores, k, where=leaves)), state

    return Rule(is_due=is_due, propose=propose)


def is_rewire(rule: Rule, n_updates: Any) -> Bool[Array, "..."]:
    """Whether the update after `n_updates` others rewires; shapes broadcast."""
    offset = 1 if rule.timing == "after" else 0
    return rule.is_due(jnp.asarray(n_updates, jnp.int32) + offset)
