"""TrainState: everything that one step of training changes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params


class TrainState(NamedTuple):
    """A network in training, a plain pytree.

    Attributes:
      step: int32, updates done.
      params: the sparse weights; inactive ones are exactly zero.
      batch_stats: running statistics of norms, {} without any.
      opt_state: the `SparseState` that owns the masks.
      key: typed key; the step derives its own with `fold_in(key, step)`.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    key: Any

    @property
    def masks(self) -> Masks:
        """The masks, a view of `opt_state`."""
        return self.opt_state.masks


def create(
    tx: optax.GradientTransformation,
    params: Params,
    batch_stats: PyTree,
    key: Key[Array, ""],
) -> TrainState:
    """The state before the first step; `params` are masked with the masks of `tx`."""
    opt_state: Any = tx.init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=masks_lib.apply(opt_state.masks, params),
        batch_stats=batch_stats,
        opt_state=opt_state,
        key=key,
    )
