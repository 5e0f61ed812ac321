"""Networks that differ by the order of their units, brought into one order.

    min over permutations P of  sum over leaves |a - P b|^2
      =  const - 2 max sum <a, P b>

A hidden unit may change its place if its incoming and outgoing weights follow: the
function stays, the point in weight space moves. Weight matching (Ainsworth, Hayase &
Srinivasa 2023, "Git Re-Basin", arXiv 2209.04836, algorithm 1) takes one permutation at
a time, the others held; the best one is then a linear assignment.

A *specification* says which axis of which leaf follows which permutation: a dict from
leaf names (`conv1` for its kernel, `conv1/bias`, `norm1/scale`, `norm1/mean`) to a
permutation's name, or None, for each axis. One permutation may rule many leaves, as in
a residual stream. Its size is that of the shortest axis it rules; a longer one is made
of blocks of that size, as the inputs (h w c) of a dense layer after a convolution are
blocks of channels c.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
import pandas as pd
from jaxtyping import PyTree
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from lottery_flow.analysis import figures, geometry
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Params

Specification: TypeAlias = Mapping[str, tuple[str | None, ...]]
Permutations: TypeAlias = dict[str, np.ndarray]  # int [n]: new unit i is old unit p[i]


def chain(
    params: PyTree, layers: Sequence[str], norms: Mapping[str, str] | None = None
) -> Specification:
    """The specification of a plain chain of convolutions and dense layers.

    Each layer but the last has a permutation of its own name.

    Args:
      params: arrays or shapes; kernels have layout (..., in, out).
      layers: names, from the input to the logits, for instance of LeNet-5 conv1, conv2,
        fc1, fc2, fc3.
      norms: the name of the norm that follows a layer, by the layer's name; with its
        scale and bias, and mean and variance in the running statistics.

    Raises:
      ValueError: a name is unknown, a leaf is left out, or two layers do not fit.
    """
    named = masks_lib.named_leaves(params)
    norms = norms or {}
    for layer in [*layers, *norms]:
        if layer not in masks_lib.layers(params) or layer not in layers:
            raise ValueError(
                f"no layer {layer} in the chain; the network has the layers "
                f"{', '.join(masks_lib.layers(params))}"
            )
    spec: dict[str, tuple[str | None, ...]] = {}
    before, n_before = None, 1
    for layer in layers:
        *window, n_in, n_out = named[layer].shape
        if n_in % n_before:
            raise ValueError(
                f"layers: {layer} has {n_in} inputs but follows {before}, which has "
                f"{n_before} outputs; give the layers from the input to the logits"
            )
        after = layer if layer != layers[-1] else None
        spec[layer] = (*[None for _ in window], before, after)
        spec[f"{layer}/bias"] = (after,)
        if layer in norms:
            for leaf in ("scale", "bias", "mean", "var"):
                spec[f"{norms[layer]}/{leaf}"] = (after,)
        before, n_before = after, n_out
    _check(spec, params)
    return spec


def permute(spec: Specification, permutations: Permutations, tree: PyTree) -> PyTree:
    """Puts the units of a network into another order.

    Args:
      spec: which axis follows which permutation.
      permutations: int [n] by name; units of those left out keep their places.
      tree: parameters, masks or running statistics; all three must go together.

    Raises:
      ValueError: the specification lacks a leaf, or a permutation does not fit.

    Guarantees:
      - The network computes the same function, up to the order of sums.
      - Weights keep their bits and their masks.
    """
    _check(spec, tree)

    def move(name, leaf):
        for axis, permutation in enumerate(spec[name]):
            if permutation in permutations:
                index = _index(permutations[permutation], leaf.shape[axis], name)
                leaf = leaf.take(index, axis=axis)
        return leaf

    names = [k for k, v in masks_lib.named_leaves(tree).items() if v is not None]
    leaves, treedef = jax.tree.flatten(tree)
    moved = [move(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def weight_matching(
    spec: Specification, a: Params, b: Params, *, max_sweeps: int = 100
) -> Permutations:
    """The permutations of `b` that bring it near to `a` in the L2 norm.

    Coordinate descent over the permutations, in the order of the specification, until
    a sweep changes none. It starts twice: from the identity; and from what a first
    sweep finds that looks only at leaves whose other permutations are known, which
    recovers a permuted copy from the input on. The nearer result is returned, the
    first if equal.

    Args:
      spec: which axis follows which permutation.
      a: parameters that stay.
      b: parameters of the same shapes.
      max_sweeps: through all permutations, at most.

    Raises:
      ValueError: trees or specification do not fit, or a permutation rules two axes of
        one leaf, where the assignment is not linear.

    Guarantees:
      - `permute(spec, result, b)` is never farther from `a` than `b` is.
      - A permuted copy of `a` comes back as `a`, if units differ in what they get from
        the layer before.
      - Once matched, the result of another matching is the identity.
    """
    geometry.matched([a, b])
    _check(spec, a)
    named_a, named_b = _float64(a), _float64(b)
    rules = _rules(spec, named_a)
    for name, places in rules.items():
        leaves = [leaf for leaf, _ in places]
        if len({*leaves}) < len(leaves):
            raise ValueError(
                f"permutation {name} rules two axes of one leaf, which weight matching "
                "cannot solve; write two permutations, or leave them None"
            )
    sizes = _sizes(rules, named_a)
    identity = {name: np.arange(n) for name, n in sizes.items()}

    known: Permutations = {}
    for name, places in rules.items():
        ruled = [
            (leaf, axis)
            for leaf, axis in places
            if {*spec[leaf]} - {None, name} <= known.keys()
        ]
        gains = _gains(spec, named_a, named_b, known, ruled, sizes[name])
        known[name] = linear_sum_assignment(gains, maximize=True)[1]

    results = []
    for found in (identity, known):
        for _ in range(max_sweeps):
            changed = False
            for name, places in rules.items():
                gains = _gains(spec, named_a, named_b, found, places, sizes[name])
                rows, best = linear_sum_assignment(gains, maximize=True)
                gain = gains[rows, best].sum() - gains[rows, found[name]].sum()
                # Ties and rounding do not count: they would never end.
                if gain > 1e-9 * np.abs(gains).sum():
                    found = found | {name: best}
                    changed = True
            if not changed:
                break
        permuted = permute(spec, found, named_b)
        distance = sum(np.sum((named_a[k] - permuted[k]) ** 2) for k in named_a)
        results.append((distance, found))
    (from_identity, first), (from_input, second) = results
    return second if from_input < from_identity * (1 - 1e-9) else first


def compare(
    spec: Specification, a: Params, b: Params, permutations: Permutations
) -> pd.DataFrame:
    """How far `b` is from `a` before and after its units are permuted.

    Returns:
      The rows of `geometry.distances`, twice: `aligned` False and True.
    """
    after = geometry.distances(a, permute(spec, permutations, b))
    parts = [geometry.distances(a, b).assign(aligned=False), after.assign(aligned=True)]
    return pd.concat(parts, ignore_index=True)


def plot_compare(frame: pd.DataFrame) -> Figure:
    """The L2 distance of each layer before and after."""
    fig, ax = figures.new()
    for shift, (aligned, rows) in zip(
        (-0.2, 0.2), frame.groupby("aligned"), strict=True
    ):
        places = np.arange(len(rows)) + shift
        ax.bar(places, rows["l2"], 0.4, label="after" if aligned else "before")
        ax.set_xticks(np.arange(len(rows)), list(rows["layer"]), rotation=90)
    ax.set_ylabel("L2 distance")
    ax.legend()
    return fig


def _gains(spec, a, b, permutations, places, n):
    """[n n]: <a, P b> over the leaves of `places`, where unit i becomes old unit j."""
    gains = np.zeros((n, n))
    for name, axis in places:
        leaf = b[name]
        for other, permutation in enumerate(spec[name]):
            if other != axis and permutation in permutations:
                index = _index(permutations[permutation], leaf.shape[other], name)
                leaf = leaf.take(index, axis=other)
        gains += _rows(a[name], axis, n) @ _rows(leaf, axis, n).T
    return gains


def _rows(leaf, axis, n):
    """[n, rest]: all that belongs to each of n units along an axis, in all blocks."""
    blocks = np.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis] // n, n, -1)
    return blocks.transpose(1, 0, 2).reshape(n, -1)


def _index(permutation, length, name):
    """The permutation repeated for each block of an axis."""
    n = len(permutation)
    if length % n or not np.array_equal(np.sort(permutation), np.arange(n)):
        raise ValueError(
            f"a permutation of {n} does not fit {name}, an axis of {length}; give "
            "each number from 0 to its size once"
        )
    return (np.arange(0, length, n)[:, None] + permutation).ravel()


def _rules(spec, named):
    """The (leaf, axis) pairs of each permutation."""
    rules: dict[str, list[tuple[str, int]]] = {}
    for leaf, axes in spec.items():
        for axis, name in enumerate(axes):
            if leaf in named and name is not None:
                rules.setdefault(name, []).append((leaf, axis))
    return rules


def _sizes(rules, named):
    """The number of units of each permutation."""
    return {
        name: min(named[leaf].shape[axis] for leaf, axis in places)
        for name, places in rules.items()
    }


def _check(spec, tree):
    """Raises ValueError unless the specification fits the leaves of the tree."""
    named = {k: v for k, v in masks_lib.named_leaves(tree).items() if v is not None}
    for name, leaf in named.items():
        if name not in spec or len(spec[name]) != len(leaf.shape):
            raise ValueError(
                f"the specification has {spec.get(name)} for {name} of shape "
                f"{leaf.shape}; give a permutation's name or None for each axis"
            )
    rules = _rules(spec, named)
    for name, n in _sizes(rules, named).items():
        for leaf, axis in rules[name]:
            if named[leaf].shape[axis] % n:
                raise ValueError(
                    f"permutation {name} of {n} units does not fit axis {axis} of "
                    f"{leaf}, of {named[leaf].shape[axis]}; name another there"
                )


def _float64(tree):
    """The leaves by name."""
    named = masks_lib.named_leaves(tree)
    return {name: np.asarray(leaf, np.float64) for name, leaf in named.items()}
