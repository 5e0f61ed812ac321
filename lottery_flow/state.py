"""TrainState: everything that one step of training changes."""

from typing import Any, NamedTuple

import jax
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
      ema: running average of the sparse weights, () without one.
      skipped: int32, updates that were not applied because they were not finite, ()
        where those stop the run.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    key: Any
    ema: Any = ()
    skipped: Any = ()

    @property
    def masks(self) -> Masks:
        """The masks, a view of `opt_state`."""
        return self.opt_state.masks


def create(
    tx: optax.GradientTransformation,
    params: Params,
    batch_stats: PyTree,
    key: Key[Array, ""],
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step; `params` are masked with the masks of `tx`.

    With `ema` there is a running average of them, which starts there, too.
    """
    opt_state: Any = tx.init(params)
    params = masks_lib.apply(opt_state.masks, params)
    return begin(params, opt_state, batch_stats, key, ema=ema)


def begin(
    params: Params,
    opt_state: Any,
    batch_stats: PyTree,
    key: Key[Array, ""],
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step of sparse parameters and their `SparseState`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        key=key,
        ema=jax.tree.map(jnp.copy, params) if ema else (),
    )


def not_finite(params: Any) -> list[str]:
    """The parameters, by name, that have an entry that is not finite."""
    found = jax.device_get(_are_finite(params))
    return [name for name, finite in found.items() if not finite]


@jax.jit
def _are_finite(params: Any) -> dict[str, Any]:
    named = masks_lib.named_leaves(params)
    return {name: jnp.all(jnp.isfinite(leaf)) for name, leaf in named.items()}
