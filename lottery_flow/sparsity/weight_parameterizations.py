"""Parameterizations that train every weight and show the model the large ones.

    DNW        w_eff = w where |w| is among the k largest of its layer, else 0
               dL/dw = dL/dw_eff                                  (straight-through)
    Top-KAST   w_eff = w in A, the k largest;  dL/dw = dL/dw_eff in B, the k + m
               largest, else 0;
               penalty = c/2 (sum_A w^2 + sum_(B without A) w^2 / D),  D = k/size
    STR        w_eff = sign(w) relu(|w| - f(s)),  one trained s a layer

Sources: Wortsman et al. 2019, "Discovering neural wirings" (DNW); Jayakumar et al.
2020, "Top-KAST", sections 2.2 and 2.3; Kusupati et al. 2020, "Soft threshold weight
reparameterization for learnable sparsity", section 3. Ties go to the lower flat index.

Inactive weights keep their values and may return: the raw weights are not sparse,
those that the model sees are.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from lottery_flow.sparsity.parameterization import (
    Parameterization,
    check_counts,
    check_scale,
    counts_like,
    from_layers,
    total,
    widened,
)
from lottery_flow.sparsity.straight_through import straight_through
from lottery_flow.sparsity.topk import topk_mask


def dnw(n_active: Mapping[str, int]) -> Parameterization:
    """Discovering neural wirings: the largest weights of each layer.

    Arguments, errors and guarantees are those of `magnitude_ste`.
    """
    return magnitude_ste(n_active, scope="layer")


def magnitude_ste(
    n_active: Mapping[str, int], scope: Literal["layer", "global"] = "layer"
) -> Parameterization:
    """The largest weights, with a straight-through gradient to all of them.

    Args:
      n_active: active weights by layer name.
      scope: rank the weights of each layer, or all of them together and keep the sum
        of the counts.

    Raises:
      ValueError: another scope; at `init`, a layer without a count, a count without
        a mask, or one that exceeds its layer.

    Guarantees:
      - Exactly n_active weights of each layer are active; their sum, if global.
      - No active weight is smaller than an inactive one of the layer (the network).
      - Every weight gets the gradient of its masked one.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r}: give layer or global")

    def start(keys, weights):
        del keys
        check_counts("n_active", n_active, weights)
        return {"weights": weights}

    def active(sparse):
        sizes = jax.tree.map(jnp.abs, sparse["weights"])
        if scope == "layer":
            return topk_mask(sizes, counts_like(n_active, sizes))
        return _topk_of_all(sizes, sum(n_active.values()))

    def effective(sparse, keys):
        del keys
        return jax.tree.map(straight_through, sparse["weights"], active(sparse))

    return from_layers(
        start=start, active=active, effective=effective, decayed=["weights"]
    )


def top_kast(
    n_active_forward: Mapping[str, int],
    n_active_backward: Mapping[str, int],
    penalty_scale: float = 1e-4,
) -> Parameterization:
    """Always-sparse training: the loss reaches a superset of the active weights.

    Args:
      n_active_forward: weights that the model sees, by layer name (the set A).
      n_active_backward: weights that get gradients, by layer name (the set B).
      penalty_scale: c of the module's equation. It is the weight decay of the sparse
        layers, whose weights outside B stay as they are; the optimizer's own decay
        does not apply to them. (An optimizer with momentum still moves a weight that
        left B lately.)

    Raises:
      ValueError: a negative `penalty_scale`; at `init`, what `magnitude_ste` raises,
        and fewer weights backward than forward.

    Guarantees:
      - Exactly n_active_forward weights of each layer are active.
      - Exactly n_active_backward weights, the active ones among them, get gradients,
        of the loss as of the penalty.
    """
    check_scale("penalty_scale", penalty_scale)

    def start(keys, weights):
        del keys
        check_counts("n_active_forward", n_active_forward, weights)
        check_counts("n_active_backward", n_active_backward, weights)
        for name, n in n_active_forward.items():
            if n_active_backward[name] < n:
                raise ValueError(
                    f"n_active_backward: layer {name} has {n_active_backward[name]} "
                    f"weights, fewer than the {n} forward; give as many or more"
                )
        return {"weights": weights}

    def sets(weights):
        sizes = jax.tree.map(jnp.abs, weights)
        both = (n_active_forward, n_active_backward)
        counts = tuple(counts_like(n_active, sizes) for n_active in both)
        return topk_mask((sizes, sizes), counts)

    def effective(sparse, keys):
        del keys
        forward, backward = sets(sparse["weights"])

        def cut(w, reached, active):
            return straight_through(jnp.where(reached, w, lax.stop_gradient(w)), active)

        return jax.tree.map(cut, sparse["weights"], backward, forward)

    def penalty(sparse, step):
        del step
        forward, backward = sets(sparse["weights"])

        def squares(w, reached, active, n):
            # Without an active weight the density counts as that of a single one.
            exploring = jnp.where(reached, w * w * (w.size / max(n, 1)), 0.0)
            return jnp.where(active, w * w, exploring)

        counts = counts_like(n_active_forward, sparse["weights"])
        terms = jax.tree.map(squares, sparse["weights"], backward, forward, counts)
        return 0.5 * penalty_scale * total(terms)

    return from_layers(
        start=start,
        active=lambda sparse: sets(sparse["weights"])[0],
        effective=effective,
        penalty=penalty,
    )


def str_(init: float = -5.0, f: Callable = jax.nn.sigmoid) -> Parameterization:
    """Soft threshold reparameterization, with a learned threshold a layer.

    Weight decay on s drives it: what f maps to a larger threshold lies nearer to 0.
    No number of active weights is prescribed.

    Args:
      init: s at the start. The released ImageNet settings start at -3200, where a
        sigmoid is 0, and its slope too, until decay has brought s near.
      f: from s to the threshold, increasing and positive, such as the sigmoid or exp.

    Guarantees:
      - A weight is active where it exceeds the threshold in size; it comes nearer to
        zero by the threshold.
      - s gets the derivative of the module's equation.
    """

    def start(keys, weights):
        del keys
        s = jax.tree.map(lambda w: jnp.full((), init, w.dtype), weights)
        return {"weights": weights, "thresholds": s}

    def active(sparse):
        return jax.tree.map(
            lambda w, s: jnp.abs(w) > f(s), sparse["weights"], sparse["thresholds"]
        )

    def effective(sparse, keys):
        del keys

        def shrink(w, s):
            smaller = w - jnp.sign(w) * f(s)
            return jnp.where(jnp.abs(w) > f(s), smaller, jnp.zeros_like(w))

        return jax.tree.map(shrink, sparse["weights"], sparse["thresholds"])

    return from_layers(
        start=start,
        active=active,
        effective=effective,
        decayed=["weights", "thresholds"],
    )


def _topk_of_all(scores, k: int):
    """The k largest of all leaves together; earlier leaves first among equals."""
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        return scores
    flat = jnp.concatenate([widened(leaf.ravel()) for leaf in leaves])
    chosen, found, at = topk_mask(flat, k), [], 0
    for leaf in leaves:
        found.append(chosen[at : at + leaf.size].reshape(leaf.shape))
        at += leaf.size
    return treedef.unflatten(found)
