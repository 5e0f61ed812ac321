"""Rules: when and how the topology of a network changes while it trains.

One rewire of a layer with n active weights (SET, RigL and RigL Inverted alike):

    n_drop = int(n * fraction(t))
    keep the n - n_drop active weights of largest |w|
    grow n_drop of all other positions, best growth score first

so the number of active weights is conserved exactly, layer by layer. A weight that
was just dropped may be grown again at once. Sources: Evci et al. 2020, "Rigging the
Lottery", algorithm 1, and its released code (google-research/rigl), which settles
rounding, ties and timing; Mocanu et al. 2018 (SET); Zhu & Gupta 2017, "To prune, or
not to prune" (gradual pruning).

Rules that move weights between layers are in `rules_adaptive`, more ways to prune in
`rules_pruning`, other values of grown weights than zero in `rules_growth`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from lottery_flow.sparsity import criteria, schedules
from lottery_flow.sparsity import granularity as granularity_lib
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.granularity import Granularity
from lottery_flow.sparsity.rules_drop_grow import drop_by_sign, drop_grow
from lottery_flow.sparsity.rules_drop_grow import grow as grow_best


def _no_state(masks, params):
    del masks, params
    return ()


def _ignore(state, grads):
    del grads
    return state


def _check_granularity(granularity: Granularity | None) -> Callable:
    """A rule's `init` without a state, that refuses layers not filled by groups."""
    if granularity is None:
        return _no_state

    def init(masks, params):
        del params
        shapes = {k: mask.shape for k, mask in masks_lib.by_layer(masks).items()}
        granularity_lib.check(granularity, shapes)
        return ()

    return init


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
      grown: `(key, step, old_masks, new_masks, params, grads, state) -> values`, an
        array for each mask; a newly grown weight starts there. None: at zero.
    """

    is_due: Callable
    propose: Callable
    init: Callable = _no_state
    observe: Callable = _ignore
    timing: Literal["after", "instead"] = "after"
    grown: Callable | None = None


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
    granularity: Granularity | None = None,
    by_sign: bool = False,
) -> Rule:
    """The family of SET and RigL: drop by one criterion, grow by another.

    Args:
      is_due: the steps that rewire, from `schedules.every`.
      fraction: step -> fraction of each layer's active weights to drop.
      drop: the lowest scores are dropped.
      grow: the highest scores are grown.
      timing: see `Rule`.
      granularity: see `drop_grow`; the initial masks are of the same.
      by_sign: drops the fraction of the negative weights and that of the others,
        each rounded for itself; an active zero is none of the negative ones.

    Raises:
      ValueError: a granularity together with `by_sign`; at `init`, a layer that the
        groups don't fill.
    """
    if by_sign and granularity is not None:
        raise ValueError("by_sign needs single weights: leave out granularity")

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
        if by_sign:
            kept, n_drop = drop_by_sign(leaves, drops, f, w_leaves)
            return treedef.unflatten(grow_best(kept, grows, n_drop)), state
        new = drop_grow(leaves, drops, grows, f, granularity)
        return treedef.unflatten(new), state

    init = _check_granularity(granularity)
    return Rule(is_due=is_due, propose=propose, init=init, timing=timing)


def set_(is_due: schedules.Due, fraction: optax.Schedule, **kwargs) -> Rule:
    """SET (Mocanu et al. 2018): drop the smallest weights, grow at random."""
    return drop_and_grow(is_due, fraction, grow=criteria.random, **kwargs)


def set_signed(is_due: schedules.Due, fraction: optax.Schedule, **kwargs) -> Rule:
    """SET as published: drop the smallest positive and the largest negative weights.

    The same fraction of either, so that their balance stays; grow at random.
    """
    return set_(is_due, fraction, by_sign=True, **kwargs)


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
    granularity: Granularity | None = None,
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
      granularity: whole groups are counted and kept as weights are, by their mean
        |w|. With n_of_m the n largest weights of each group stay to the end, and
        until then the largest of the others too.

    Raises:
      ValueError: a sparsity outside [0, 1], or another one than that of n_of_m; when
        the masks are known, a layer without one, or that the groups don't fill.
    """
    is_due = schedules.every(interval, begin, end)
    for name, sparsity in final_sparsity.items():
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(
                f"final_sparsity of {name} is {sparsity}: give a fraction from 0 to 1"
            )
        own = granularity_lib.own_sparsity(granularity)
        if own is not None and abs(sparsity - own) > 1e-9:
            raise ValueError(
                f"final_sparsity of {name} is {sparsity}, which n_of_m makes {own}: "
                "give that"
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
        units = [granularity_lib.n_units(granularity, m.shape) for m in leaves]
        named = zip(names, units, strict=True)
        k = [jnp.asarray(n_kept(name, n))[i] for name, n in named]
        new = granularity_lib.best(granularity, scores, k, leaves)
        return treedef.unflatten(new), state

    init = _check_granularity(granularity)
    return Rule(is_due=is_due, propose=propose, init=init)


def watches(rule: Rule) -> bool:
    """Whether the rule looks at the dense gradient of every step."""
    return rule.observe is not _ignore


def is_rewire(rule: Rule, n_updates: Any) -> Bool[Array, "..."]:
    """Whether the update after `n_updates` others rewires; shapes broadcast."""
    offset = 1 if rule.timing == "after" else 0
    return rule.is_due(jnp.asarray(n_updates, jnp.int32) + offset)
