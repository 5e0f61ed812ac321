"""More ways to prune while training: one ranking for all layers, and by deviation.

    global:  keep the max(round(N (1 - s(t))), 1) largest |w| of all N masked weights
    Han:     keep |w| >= q std(w), the deviation of a layer's active weights

Sources: Zhu & Gupta 2017 (the schedule s, see `rules.gradual_pruning`), with the
global ranking of e.g. Morcos et al. 2019; Han et al. 2015, "Learning both weights and
connections for efficient neural networks", section 3 (training goes on between two
prunings, which is the retraining). Pruned weights never return.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow.sparsity import criteria, schedules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.rules import Rule
from lottery_flow.sparsity.rules_drop_grow import deviation
from lottery_flow.sparsity.topk import topk_mask


def global_gradual_pruning(
    *,
    begin: int,
    end: int,
    interval: int,
    final_sparsity: float,
    initial_sparsity: float = 0.0,
) -> Rule:
    """Gradual magnitude pruning with one ranking of the weights of all layers.

    Args:
      begin: first step that prunes.
      end: step at which the final sparsity is reached, if the interval divides
        end - begin.
      interval: steps between two prunings.
      final_sparsity: of all masked weights together; a layer may lose all of its own.
      initial_sparsity: before `begin`.

    Raises:
      ValueError: a sparsity outside [0, 1]; at a rewire, 2^31 weights or more.

    Guarantees:
      - In total exactly max(round(N (1 - s(t))), 1) weights are active, where as
        many were; ties go to the earlier layer, then to the lower flat index.
      - Pruned weights never return.
    """
    is_due = schedules.every(interval, begin, end)
    for name, value in (("final", final_sparsity), ("initial", initial_sparsity)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}_sparsity is {value}: give a fraction from 0 to 1")
    sparsity = schedules.cubic_sparsity(initial_sparsity, final_sparsity, begin, end)
    due_steps = np.arange(begin, end + 1, interval)

    def propose(step, key, masks, params, grads, state):
        del key, grads
        leaves, treedef = jax.tree.flatten(masks)
        if not leaves:
            return masks, state
        weights = masks_lib.tree_leaves_at(masks, params)
        sizes = [criteria.widen(jnp.abs(w.ravel())) for w in weights]
        wide = jnp.float64 if any(s.dtype == jnp.float64 for s in sizes) else None
        scores = jnp.concatenate(sizes, dtype=wide)
        where = jnp.concatenate([jnp.ravel(m) for m in leaves])
        exact = [scores.size * (1.0 - float(sparsity(t))) for t in due_steps.tolist()]
        n_kept = jnp.asarray([max(round(n), 1) for n in exact], jnp.int32)
        i = jnp.clip((step - begin) // interval, 0, len(due_steps) - 1)
        kept = topk_mask(scores, n_kept[i], where=where)
        parts = jnp.split(kept, np.cumsum([m.size for m in leaves[:-1]], dtype=int))
        shaped = [p.reshape(m.shape) for p, m in zip(parts, leaves, strict=True)]
        return treedef.unflatten(shaped), state

    return Rule(is_due=is_due, propose=propose)


def han_pruning(is_due: schedules.Due, quality: float | Mapping[str, float]) -> Rule:
    """Prunes the weights below a share of the standard deviation of their layer.

    Args:
      is_due: the steps that prune, from `schedules.every`.
      quality: the share q, 0 or more, of all layers or by layer name.

    The counts follow from the weights; a large q may leave a layer without any.

    Raises:
      ValueError: a quality below 0; when the masks are known, a layer without one.

    Guarantees:
      - Active after it are the active weights with |w| >= q std, and no others.
    """
    given = quality if isinstance(quality, Mapping) else {"all layers": quality}
    for name, q in given.items():
        if not q >= 0.0:
            raise ValueError(f"quality of {name} is {q}: give 0 or more")

    def quality_of(name: str) -> float:
        if not isinstance(quality, Mapping):
            return quality
        if name not in quality:
            raise ValueError(
                f"quality has no layer {name}; name it, or give it no mask"
            )
        return quality[name]

    def propose(step, key, masks, params, grads, state):
        del step, key, grads
        names = [k for k, m in masks_lib.named_leaves(masks).items() if m is not None]
        leaves, treedef = jax.tree.flatten(masks)
        new = []
        for name, mask, w in zip(
            names, leaves, masks_lib.tree_leaves_at(masks, params), strict=True
        ):
            std = deviation(mask, w)
            large = criteria.widen(jnp.abs(w)) >= quality_of(name) * std
            new.append(mask & large)
        return treedef.unflatten(new), state

    return Rule(is_due=is_due, propose=propose)
