"""What can go wrong in pruning at initialisation, said in time.

    layer collapse      a layer loses all its weights, and a chain of layers with it
                        (Tanaka et al. 2020, section 4)
    closed branches     a factor that starts at zero hides all weights behind it: their
                        gradients, and so their scores, are all zero

The last norm of a residual branch (Goyal et al. 2017) and the last layers of Fixup
(Zhang et al. 2019) start at zero. `open_branches` gives parameters to score on instead.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from lottery_flow.sparsity import initializers
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params


def collapsed(masks: Masks) -> list[str]:
    """Names of the layers whose mask has no active weight, in the order of the tree."""
    return [name for name, n in counts(masks).items() if n == 0]


def warn_collapsed(masks: Masks, method: str) -> None:
    """Warns of layers that the method of this name left without any active weight."""
    if empty := collapsed(masks):
        _warn(
            f"{method} left no active weight in {', '.join(empty)}, so that no signal "
            "passes there: prune with synflow, layer by layer (scope='layer'), or to a "
            "lower sparsity"
        )


def check_scores(
    scores: PyTree, masks: Masks, method: str, *, warn: bool = True
) -> None:
    """Looks for scores of active weights that would decide the masks without a word.

    Args:
      scores: a tree like the masks, None where there is none.
      masks: the weights that were scored.
      method: the name of the method, for messages.
      warn: whether layers with nothing but zeros are worth a warning.

    Raises:
      ValueError: a score is NaN or infinite.

    Warns:
      UserWarning: all scores of a layer are zero, so that their order is that of the
        tree.
    """
    found = {k: jax.device_get(flags) for k, flags in _flags(scores, masks).items()}
    for name, (finite, _) in found.items():
        if not finite:
            raise ValueError(
                f"the scores of {method} are not finite in {name}; check the loss, and "
                "for synflow, whose flow may exceed float32, the notes on its range"
            )
    if warn and (closed := [name for name, (_, zero) in found.items() if zero]):
        _warn(
            f"the scores of {method} are all zero in {', '.join(closed)}, so that the "
            "order of their weights means nothing: where a scale or layer behind them "
            "starts at zero, score at_init_checks.open_branches(key, params)"
        )


def open_branches(key: Key[Array, ""], params: Params) -> Params:
    """Parameters to score on: nothing that multiplies a signal starts at zero.

    Norm scales (leaves named `scale`) that are all zero become ones; kernels that are
    all zero are drawn anew, from Glorot's normal distribution, as the released code of
    GraSP does for classifiers. Train the parameters themselves, not these.

    Guarantees:
      - Every other leaf keeps its bits.
    """
    drawn = initializers.masked_dense(
        key, params, masks_lib.dense(params), distribution="normal"
    )
    kernels = masks_lib.layers(params)

    def opened(name: str, leaf: Any, fresh: Any) -> Any:
        if name.split("/")[-1] == "scale":
            fresh = jnp.ones_like(leaf)
        elif name not in kernels:
            return leaf
        return jnp.where(jnp.any(leaf != 0), leaf, fresh)

    names = masks_lib.named_leaves(params)
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(opened, names, leaves, jax.tree.leaves(drawn)))


def counts(masks: Masks) -> dict[str, int]:
    """Active weights of each masked layer, on the host, in the order of the tree."""
    found = jax.device_get(_count(masks))  # which a jit has sorted by name
    return {name: int(found[name]) for name in masks_lib.by_layer(masks)}


_count = jax.jit(masks_lib.count)  # one program instead of one for every layer


@jax.jit
def _flags(scores: PyTree, masks: Masks) -> dict[str, tuple[Array, Array]]:
    """Of each layer's active weights: all finite; all zero (and at least one)."""
    named = masks_lib.named_leaves(scores)
    return {
        name: (
            jnp.all(jnp.isfinite(named[name]) | ~mask),
            jnp.any(mask) & ~jnp.any((named[name] != 0) & mask),
        )
        for name, mask in masks_lib.by_layer(masks).items()
    }


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
