"""Training what is not the weights: an optimizer of what a parameterization is made of.

    w = weights(raw)      raw <- optimizer(d/d raw [loss(weights(raw)) + penalty(raw)])

The state is that of `transform.sparsify`, so that whatever reads masks, checkpoints
and networks needs to know one kind of training: `rule_state` holds the raw values,
`masks` and the parameters follow from them.

    params, state = init(p, inner, params, masks, key=key)
    grads = jax.grad(lambda raw: loss(p.weights(raw, noise, True)))(state.rule_state)
    params, state = update(p, inner, grads, state)

Guarantees (after `init` and after every `update`):
  - The parameters are `weights(raw, None, False)`, and inactive weights exactly zero.
  - Raw values that are not trained keep their bits, whatever the inner optimizer.
  - The inner optimizer's counters advance by one at every update.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.parameterization import Parameterization
from lottery_flow.sparsity.transform import SparseState


def init(
    parameterization: Parameterization,
    inner: optax.GradientTransformation,
    params: Params,
    masks: Masks,
    *,
    key: Key[Array, ""],
) -> tuple[Params, SparseState]:
    """The network and the state before the first update.

    Args:
      parameterization: see `parameterizations`.
      inner: any optax optimizer of the raw values.
      params: initial weights of the dense network.
      masks: full at the layers that will be sparse, None at leaves that stay dense.
      key: typed key that raw values are drawn with.
    """
    raw = parameterization.init(key, params, masks)
    state = SparseState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        masks=parameterization.masks(raw),
        rule_state=raw,
        inner_state=inner.init(raw),
    )
    return parameterization.weights(raw, None, False), state


def update(
    parameterization: Parameterization,
    inner: optax.GradientTransformation,
    grads: PyTree,
    state: Any,  # SparseState
    **extra: Any,
) -> tuple[Params, SparseState]:
    """One update of the raw values.

    Args:
      parameterization, inner: those of `init`.
      grads: of the loss and the penalty with respect to `state.rule_state`.
      state: before the update.
      extra: further arguments of the inner optimizer's update.
    """
    raw, trained = state.rule_state, parameterization.trained(state.rule_state)
    grads = _where(trained, grads)
    inner = optax.with_extra_args_support(inner)
    updates, inner_state = inner.update(grads, state.inner_state, raw, **extra)
    raw = jax.tree.map(
        lambda moves, value, new: new if moves else value,
        trained,
        raw,
        optax.apply_updates(raw, updates),
    )
    after = state._replace(
        step=state.step + 1,
        masks=parameterization.masks(raw),
        rule_state=raw,
        inner_state=inner_state,
    )
    return parameterization.weights(raw, None, False), after


def _where(trained: PyTree, grads: PyTree) -> PyTree:
    """The gradients, zero where nothing is trained: they may not even be finite."""
    return jax.tree.map(lambda t, g: g if t else jnp.zeros_like(g), trained, grads)
