"""Values of newly grown weights, other than zero.

    initial_dist     w0[r] / d      w0 the layer's active weights at `init`, r random
    random_normal    N(0, s^2) / d  s the standard deviation of its active weights
    random_uniform   U(-a, a) / d   a the mean |w| of its active weights
    grad_scale       g / d          g the dense gradient of the rewire
    grad_sign        sign(g) / d

Source: the option `grow_init` of the code released with Evci et al. 2020, "Rigging
the Lottery" (google-research/rigl). There the statistics are over all entries of a
layer, whose inactive ones hold stale values; here over the weights active before the
rewire. As there, the gradient enters with a plus: a negative d steps downhill.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.rules import Rule
from lottery_flow.sparsity.rules_drop_grow import deviation, mean_active


class _Initial(NamedTuple):
    """State: that of the rule, and the initial values of each mask's weights."""

    rule_state: Any
    values: Any  # flat, the active ones first
    n_active: Any


def with_grown(rule: Rule, values: str, divisor: float = 1.0) -> Rule:
    """The same rule, whose newly grown weights start at other values than zero.

    Args:
      rule: any rule; its masks stay the same.
      values: a name of the module's table, or 'zeros'.
      divisor: d of the table.

    Raises:
      ValueError: an unknown name, or a divisor of zero.

    Guarantees:
      - The new masks are those of `rule`.
      - Weights that are not newly grown keep their values.
    """
    if divisor == 0:
        raise ValueError("divisor is 0: give another number")
    if values == "zeros":
        return rule._replace(grown=None)
    if values == "initial_dist":
        return _with_initial(rule, divisor)
    if values not in _VALUES:
        raise ValueError(
            f"no grown values named {values!r}; choose zeros, initial_dist, "
            + ", ".join(_VALUES)
        )

    def grown(key, step, old_masks, new_masks, params, grads, state):
        del step, new_masks, state
        keys = _keys(key, old_masks)
        trees = keys, params, grads
        return _each(functools.partial(_VALUES[values], divisor), old_masks, *trees)

    return rule._replace(grown=grown)


def _random_normal(divisor, mask, key, weights, grads) -> Array:
    del grads
    std = deviation(mask, weights)
    return jax.random.normal(key, weights.shape, std.dtype) * std / divisor


def _random_uniform(divisor, mask, key, weights, grads) -> Array:
    del grads
    mean = mean_active(mask, jnp.abs(weights))
    draws = jax.random.uniform(key, weights.shape, mean.dtype, -1.0, 1.0)
    return draws * mean / divisor


def _grad_scale(divisor, mask, key, weights, grads) -> Array:
    del mask, key, weights
    return grads / divisor


def _grad_sign(divisor, mask, key, weights, grads) -> Array:
    del mask, key, weights
    return jnp.sign(grads) / divisor


_VALUES = {
    "random_normal": _random_normal,
    "random_uniform": _random_uniform,
    "grad_scale": _grad_scale,
    "grad_sign": _grad_sign,
}


def _with_initial(rule: Rule, divisor: float) -> Rule:
    """Grown weights are drawn, with replacement, from the initial ones."""

    def init(masks, params):
        def active_first(mask, weights):
            order = jnp.argsort(~jnp.asarray(mask).ravel())
            return jnp.ravel(weights)[order]

        n_active = jax.tree.map(masks_lib.count_true, masks)
        values = _each(active_first, masks, params)
        return _Initial(rule.init(masks, params), values, n_active)

    def observe(state, grads):
        return state._replace(rule_state=rule.observe(state.rule_state, grads))

    def propose(step, key, masks, params, grads, state):
        own = state.rule_state
        new, own = rule.propose(step, key, masks, params, grads, own)
        return new, state._replace(rule_state=own)

    def grown(key, step, old_masks, new_masks, params, grads, state):
        del step, new_masks, params, grads

        def draw(mask, layer_key, values, n):
            i = jax.random.randint(layer_key, mask.shape, 0, jnp.maximum(n, 1))
            return values[i] / divisor

        trees = _keys(key, old_masks), state.values, state.n_active
        return _each(draw, old_masks, *trees)

    return rule._replace(init=init, observe=observe, propose=propose, grown=grown)


def _keys(key, masks):
    """A key for each mask."""
    leaves, treedef = jax.tree.flatten(masks)
    return treedef.unflatten([jax.random.fold_in(key, i) for i in range(len(leaves))])


def _each(fn, masks, *trees):
    """`fn(mask, *leaves)` at each mask; None at the dense leaves."""
    return masks_lib.tree_map(
        lambda mask, *leaves: None if mask is None else fn(mask, *leaves), masks, *trees
    )
