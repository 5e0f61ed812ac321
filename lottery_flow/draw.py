"""The network before the first step, drawn from a seed.

The program that draws is compiled once for all members of a population: what differs
between them, the key and the arrays of source runs, are its arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lottery_flow.checkpoint import Network
from lottery_flow.sparsity import granularity, initializers
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.granularity import Granularity
from lottery_flow.sparsity.masks import Masks

# Which stream of a run's randomness: fold_in(key(seed), stream).
PARAMS, INIT, MASKS, REWIRE, STEP, FRESH_INIT, FRESH_PARAMS = range(7)


class Recipe(NamedTuple):
    """How a network is drawn; hashable.

    Attributes:
      model_init: `Model.init`.
      init: the name of an initialisation in `initializers.INITIALIZERS`.
      init_options: its options, in pairs.
      n_active: active weights of each layer, in pairs.
      full_masks: start with every weight of the layers that will be sparse.
      shuffle_masks: permute each layer's mask.
      granularity: of random masks, see `sparsity.granularity`.
      fresh: draw other weights than those that masks were made from.
    """

    model_init: Callable
    init: str
    init_options: tuple[tuple[str, Any], ...]
    n_active: tuple[tuple[str, int], ...]
    full_masks: bool
    shuffle_masks: bool
    granularity: Granularity | None
    fresh: bool


# One program: op by op, compiling it would take most of a short run.
@partial(jax.jit, static_argnums=0)
def draw(
    recipe: Recipe, key: Any, source_masks: Masks | None, source: Any | None
) -> Network:
    """Draws masks, initial weights and statistics.

    Args:
      recipe: how.
      key: `jax.random.key` of the seed.
      source_masks: masks to take instead of random ones.
      source: (params, batch_stats) of an earlier run to take instead of fresh ones.
    """
    streams = (FRESH_PARAMS, FRESH_INIT) if recipe.fresh else (PARAMS, INIT)
    params_key, init_key = (jax.random.fold_in(key, stream) for stream in streams)
    variables = recipe.model_init(params_key)
    params, n_active = variables["params"], dict(recipe.n_active)
    masks_key = jax.random.fold_in(key, MASKS)
    if source_masks is not None:
        masks = source_masks
    elif recipe.full_masks:
        sizes = {k: v.size for k, v in masks_lib.layers(params).items()}
        pruned = {k: n for k, n in n_active.items() if n != sizes[k]}
        masks = masks_lib.full(params, pruned)
    else:
        masks = granularity.random(masks_key, params, n_active, recipe.granularity)
    if recipe.shuffle_masks:
        masks = masks_lib.shuffle(masks_key, masks)
    init = initializers.INITIALIZERS[recipe.init]
    params = init(init_key, params, masks, **dict(recipe.init_options))
    batch_stats = variables.get("batch_stats", {})
    if source is not None:
        params, batch_stats = jax.tree.map(jnp.asarray, source)
    return Network(masks_lib.apply(masks, params), batch_stats, masks)
