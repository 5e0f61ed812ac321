"""sparsify(): sparse training as an optax gradient transformation.

    tx = sparsify(optax.sgd(0.1, momentum=0.9), masks, rigl(due, fraction), key=key)
    params = masks_lib.apply(masks, params)
    state = tx.init(params)
    updates, state = tx.update(dense_grads, state, params)
    params = optax.apply_updates(params, updates)

One update, in order: mask the gradients, update the inner optimizer, then rewire if
a rewire is due, then make every inactive weight land on exactly zero. Since
inactive weights are zero, the gradient at `params` is the dense gradient, at no
extra cost. Source of the semantics: Evci et al. 2020, algorithm 1.

Guarantees (whatever the inner optimizer and the dtype, for finite parameters):
  - After every `optax.apply_updates` an inactive weight is bit-exactly zero.
  - A rewire that conserves the budget conserves it exactly, layer by layer (in total
    for rules that move weights between layers).
  - A newly grown weight starts at zero, unless the rule says otherwise (`grown`),
    with its optimizer slots as at `init`; one that is dropped and grown again at once
    keeps its value and its slots. (Factored slots, as Adafactor's, have no entry for
    a single weight and stay.)
  - The inner optimizer's counters advance by one update at every step, also when a
    rewire replaces the gradient step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.rules import Rule, is_rewire


class SparseState(NamedTuple):
    """State of `sparsify`: the owner of the masks.

    Attributes:
      step: int32, updates done.
      key: typed key of the run; a rewire uses `fold_in(key, step)`.
      masks: boolean tree, None at dense leaves.
      rule_state: what the rule remembers.
      inner_state: state of the wrapped optimizer.
    """

    step: Int[Array, ""]
    key: Any
    masks: Any
    rule_state: Any
    inner_state: Any


def sparsify(
    inner: optax.GradientTransformation,
    masks: Masks,
    rule: Rule,
    *,
    key: Key[Array, ""],
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network with `inner`, its topology following `rule`.

    Args:
      inner: any optax optimizer, weight decay and schedules included.
      masks: initial masks; the caller masks the initial parameters with them
        (`masks.apply`), so that the first forward pass is sparse too.
      rule: see `rules`.
      key: typed key for the random parts of the rule.

    Returns:
      A transformation whose `update(dense_grads, state, params)` takes two optional
      arguments more; others go on to `inner`.
      `grow_grad_fn`: `(params) -> dense_grads`, called inside the rewire alone, at
      the weights that are rewired; without it the rewire sees `dense_grads`.
      `rewire`: True or False compiles the update with or without a rewire, for loops
      that know the step on the host; None decides on the device (`lax.cond`).

    Raises:
      ValueError: masks that don't fit the parameters; `params` missing in `update`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> SparseState:
        masks_lib.check(masks, params)
        return SparseState(
            step=jnp.zeros((), jnp.int32),
            key=key,
            masks=masks,
            rule_state=rule.init(masks, params),
            inner_state=inner.init(params),
        )

    def update(
        updates: PyTree,
        state: Any,  # SparseState, which optax's own type of a state is not
        params: Params | None = None,
        *,
        grow_grad_fn: Callable[[Params], PyTree] | None = None,
        rewire: bool | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "sparsify needs params: call tx.update(grads, state, params)"
            )
        dense_grads, old_inner = updates, state.inner_state
        sparse_grads = masks_lib.apply(state.masks, dense_grads)
        updates, new_inner = inner.update(sparse_grads, old_inner, params, **extra)
        stepped = state._replace(
            step=state.step + 1,
            rule_state=rule.observe(state.rule_state, dense_grads),
            inner_state=new_inner,
        )

        landed = _land(stepped.masks, updates, params)

        def keep():
            return landed, stepped

        def rewired():
            if rule.timing == "after":
                before, base = stepped, landed
            else:  # forget the gradient step, but not that it was taken
                slots = _where_slots(inner, old_inner, old_inner, new_inner)
                before = stepped._replace(step=state.step, inner_state=slots)
                base = jax.tree.map(jnp.zeros_like, landed)
            weights = optax.apply_updates(params, base)
            grads = dense_grads if grow_grad_fn is None else grow_grad_fn(weights)
            new, after = rewire_network(rule, inner, before, weights, grads)
            survivors = _both(before.masks, after.masks)
            landing = _land(survivors, base, params)
            if rule.grown is not None:
                landing = _land_at(before.masks, after.masks, landing, new, params)
            return landing, after._replace(step=stepped.step)

        if rewire is None:
            return lax.cond(is_rewire(rule, state.step), rewired, keep)
        return rewired() if rewire else keep()

    return optax.GradientTransformationExtraArgs(init, update)


def rewire_network(
    rule: Rule,
    inner: optax.GradientTransformation,
    state: SparseState,
    params: Params,
    dense_grads: PyTree,
) -> tuple[Params, SparseState]:
    """One rewire on its own: the branch of `sparsify`'s update, as a pure function.

    For looking at a network just before and just after.

    Args:
      rule: proposes the new masks for `state.step`, whether it is due or not.
      inner: the optimizer whose state `state` holds.
      state: at the step of the rewire.
      params: the masked parameters.
      dense_grads: gradients at `params`, of the same structure.

    Returns:
      The parameters and the state after the rewire; `state.step` is unchanged.
    """
    key = jax.random.fold_in(state.key, state.step)
    new_masks, rule_state = rule.propose(
        state.step, key, state.masks, params, dense_grads, state.rule_state
    )
    born = _born(state.masks, new_masks)
    kept = masks_lib.apply(_both(state.masks, new_masks), params)
    if rule.grown is not None:
        own_key = jax.random.fold_in(key, _GROWN)
        trees = state.masks, new_masks, params, dense_grads, rule_state
        values = rule.grown(own_key, state.step, *trees)
        kept = masks_lib.tree_map(_put, new_masks, born, values, kept)
    params = kept
    fresh = inner.init(params)
    reset = _where_slots(inner, state.inner_state, fresh, state.inner_state, born)
    return params, state._replace(
        masks=new_masks, rule_state=rule_state, inner_state=reset
    )


# Folded into the key of a rewire for `grown`: no layer has this index.
_GROWN = 2**31 - 1


def _born(old: Masks, new: Masks) -> PyTree:
    """The newly grown weights; False at dense leaves."""
    return masks_lib.tree_map(
        lambda m, n: jnp.zeros((), bool) if n is None else n & ~m, old, new
    )


def _put(mask, born, value, param):
    """A layer with the grown weights at their values."""
    return param if mask is None else jnp.where(born, value.astype(param.dtype), param)


def _both(old: Masks, new: Masks) -> Masks:
    """Active before and after: the weights that keep their value."""
    return masks_lib.tree_map(lambda m, n: None if m is None else m & n, old, new)


def _land(active: Masks, updates: PyTree, params: Params) -> PyTree:
    """The updates, but -params where a weight must be zero after the step."""

    def land(mask, update, param):
        if mask is None:
            return update
        # The wider dtype: a bfloat16 update could not cancel a float32 weight.
        update = update.astype(jnp.promote_types(update.dtype, param.dtype))
        return jnp.where(mask, update, -param.astype(update.dtype))

    return masks_lib.tree_map(land, active, updates, params)


def _land_at(old: Masks, new: Masks, updates: PyTree, targets: PyTree, params: Params):
    """The updates, but to the targets for the newly grown weights.

    A weight is zero before it is grown, so the update is the target's own bits.
    """

    def land(before, after, update, target, param):
        if after is None:
            return update
        grown = target.astype(update.dtype) - param.astype(update.dtype)
        return jnp.where(after & ~before, grown, update)

    return masks_lib.tree_map(land, old, new, updates, targets, params)


def _where_slots(inner, state, yes, no, condition: PyTree | None = None):
    """Where a leaf of `state` is a slot of the parameters: `yes`, else `no`.

    `condition`, of the parameters' structure, restricts that to single weights.
    Slots are found through `optax.tree.map_params`, not by the type of the state.
    """

    def is_masked_node(x):
        return isinstance(x, optax.MaskedNode)

    def flag(slot, where=True):
        return slot if is_masked_node(slot) else where

    rest = () if condition is None else (condition,)
    flags = optax.tree.map_params(
        inner,
        flag,
        state,
        *rest,
        transform_non_params=lambda _: False,
        is_leaf=is_masked_node,
    )

    def pick(where, y, n):
        if isinstance(where, bool):
            return y if where else n
        if where.shape not in ((), n.shape):  # a factored slot has no single weights
            return n
        return jnp.where(where, y.astype(n.dtype), n)

    return jax.tree.map(pick, flags, yes, no)
