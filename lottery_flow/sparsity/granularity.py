"""Granularity: which weights come and go together, and which compete.

A layer of shape (..., in, out) is seen as its matrix of shape (fan-in, out), where
fan-in is the product of all axes but the last. Its *groups* are

    block(a, b)   a x b rectangles of the matrix; a group is active as a whole
    channel()     whole columns: output units; a group is active as a whole
    n_of_m(n, m)  m consecutive rows of one column, of which n are active

Where m (or a) divides the input channels, the consecutive rows are input channels of
one tap of a convolution. No granularity (None) is unstructured sparsity.

Whole groups compete by the mean score of their weights, as weights do by theirs; in
n_of_m the weights of a layer compete to stay, and those of a group to be grown.
Sources: Narang et al. 2017, "Block-sparse recurrent neural networks" (blocks); Zhou
et al. 2021, "Learning N:M fine-grained structured sparse neural networks from
scratch" (N:M); Lasby et al. 2024, "Dynamic sparse training with structured sparsity"
(a constant number in each group, under RigL).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from lottery_flow.sparsity import criteria
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.topk import topk_mask


class Granularity(NamedTuple):
    """The groups of a layer's matrix; made by `block`, `channel` and `n_of_m`.

    Attributes:
      rows: of a group; None stands for all rows of the matrix.
      columns: of a group.
      n_active: active weights of each group; None where groups are whole.
    """

    rows: int | None
    columns: int
    n_active: int | None = None


def block(rows: int, columns: int) -> Granularity:
    """Blocks of rows x columns of the matrix (fan-in, out), active as a whole.

    Raises:
      ValueError: a side below 1.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"block({rows}, {columns}): give sides of 1 or more")
    return Granularity(rows, columns)


def channel() -> Granularity:
    """Output units: all incoming weights of one are active, or none."""
    return Granularity(None, 1)


def n_of_m(n: int, m: int) -> Granularity:
    """`n` of every `m` consecutive weights along the fan-in of each output.

    Raises:
      ValueError: n is not from 1 to m.
    """
    if not 1 <= n <= m:
        raise ValueError(f"n_of_m({n}, {m}): give n from 1 to m")
    return Granularity(m, 1, n)


def check(
    granularity: Granularity | None, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError, naming the layer, unless whole groups fill each matrix.

    Args:
      granularity: None fits everything.
      shapes: layer name -> kernel shape (..., in, out).
    """
    if granularity is None:
        return
    for name, shape in shapes.items():
        fan_in, out = _matrix(shape)
        rows, columns = granularity.rows or max(fan_in, 1), granularity.columns
        if fan_in % rows or out % columns:
            raise ValueError(
                f"layer {name} is a matrix of {fan_in} x {out} (fan-in x out), which "
                f"groups of {rows} x {columns} don't fill: leave the layer dense, or "
                "take groups whose sides divide it"
            )


def n_units(granularity: Granularity | None, shape: tuple[int, ...]) -> int:
    """What is counted in a layer: whole groups where they are, else weights."""
    size = math.prod(shape)
    if granularity is None or granularity.n_active is not None:
        return size
    return size // _group_size(granularity, shape)


def own_sparsity(granularity: Granularity | None) -> float | None:
    """The sparsity that n_of_m fixes; None where any is possible."""
    if granularity is None or granularity.n_active is None:
        return None
    return 1 - granularity.n_active / _group_size(granularity, (0, 0))


def round_counts(
    granularity: Granularity | None,
    n_active: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int]:
    """The nearest numbers of active weights that the groups allow.

    Args:
      granularity: None leaves the counts.
      n_active: active weights of each layer; one that keeps all stays dense.
      shapes: layer name -> kernel shape, of these layers at least.

    Raises:
      ValueError: see `check`, for the layers that are not dense.

    Guarantees:
      - Whole groups: a multiple of their size, at least one group; ties go down.
      - n_of_m: n/m of the layer, whatever was asked for.
      - Dense layers stay dense.
    """
    sizes = {k: math.prod(shapes[k]) for k in n_active}
    sparse = {k: shapes[k] for k, n in n_active.items() if n != sizes[k]}
    check(granularity, sparse)
    if granularity is None:
        return dict(n_active)

    def nearest(name: str) -> int:
        group = _group_size(granularity, sparse[name])
        if granularity.n_active is not None:
            return sizes[name] // group * granularity.n_active
        n_groups = -((group - 2 * n_active[name]) // (2 * group))
        return max(n_groups, 1) * group

    return {k: nearest(k) if k in sparse else n for k, n in n_active.items()}


def random(
    key: Key[Array, ""],
    params: Params,
    n_active: Mapping[str, int],
    granularity: Granularity | None,
) -> Masks:
    """Uniformly random masks of a granularity; with None those of `masks.random`.

    Args:
      key: a typed key.
      params: the parameters.
      n_active: active weights of each masked layer, see `round_counts`; layers that
        keep everything, and leaves that are not named, stay dense (None).

    Raises:
      ValueError: a count that the groups don't allow; see `check`.

    Guarantees:
      - Each mask has exactly the given number of active weights.
      - Each group is whole, or has exactly n of its m weights active.
    """
    if granularity is None:
        return masks_lib.random(key, params, n_active)
    shapes = {k: leaf.shape for k, leaf in masks_lib.layers(params).items()}
    for name in n_active.keys() - shapes.keys():
        raise ValueError(f"no layer named {name}; the layers are {', '.join(shapes)}")
    allowed = round_counts(granularity, n_active, shapes)
    drawn = {}
    for i, (name, shape) in enumerate(shapes.items()):
        n = n_active.get(name, math.prod(shape))
        if n == math.prod(shape):
            continue
        if n != allowed[name]:
            raise ValueError(
                f"n_active: {n} weights of layer {name} are no whole groups; "
                f"give {allowed[name]}"
            )
        scores = jax.random.uniform(jax.random.fold_in(key, i), shape)
        per_group = granularity.n_active
        if per_group is not None:
            everywhere = jnp.ones(shape, bool)
            drawn[name] = _best_of_each(granularity, scores, per_group, everywhere)
        else:
            n_groups = n // _group_size(granularity, shape)
            best = topk_mask(pool(granularity, scores), n_groups)
            drawn[name] = expand(granularity, best, shape)
    return masks_lib.from_named(drawn, params)


def pool(
    granularity: Granularity, values: Array
) -> Float[Array, " groups"] | Bool[Array, " groups"]:
    """One value for each whole group: the mean of scores, or whether any is True."""
    groups = _split(granularity, values)
    if groups.dtype == jnp.bool_:
        return groups.any(axis=1)
    return jnp.mean(criteria.widen(groups), axis=1)


def expand(
    granularity: Granularity, flags: Bool[Array, " groups"], shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """The mask of a layer from the flags of its whole groups."""
    size = (len(flags), _group_size(granularity, shape))
    return _merge(granularity, jnp.broadcast_to(flags[:, None], size), shape)


def refill(
    granularity: Granularity,
    mask: Bool[Array, "..."],
    kept: Bool[Array, "..."],
    scores: Float[Array, "..."],
) -> Bool[Array, "..."]:
    """`kept`, and as many more in each group as it lost of `mask`, best scores first.

    Guarantees:
      - Each group has as many active weights as in `mask`.
      - Ties go to the lower index within the group.
    """
    lost = _split(granularity, mask & ~kept).sum(axis=1, dtype=jnp.int32)
    return kept | _best_of_each(granularity, scores, lost[:, None], ~kept)


def best(
    granularity: Granularity | None,
    scores: Sequence[Float[Array, "..."]],
    k: Sequence[Array],
    where: Sequence[Bool[Array, "..."]],
) -> list[Bool[Array, "..."]]:
    """The `k` best weights of each layer, or groups of it, see `n_units`.

    With n_of_m the best n of each group are among them, also if that is more than k.
    """
    if granularity is None:
        return topk_mask(list(scores), list(k), where=list(where))
    n = granularity.n_active
    if n is None:
        pooled = [[pool(granularity, x) for x in xs] for xs in (scores, where)]
        chosen = topk_mask(pooled[0], list(k), where=pooled[1])
        pairs = zip(chosen, where, strict=True)
        return [expand(granularity, flags, w.shape) for flags, w in pairs]
    layers = zip(scores, where, strict=True)
    first = [_best_of_each(granularity, s, n, w) for s, w in layers]
    left = [
        jnp.maximum(i - masks_lib.count_true(m), 0)
        for i, m in zip(k, first, strict=True)
    ]
    rest = [w & ~m for w, m in zip(where, first, strict=True)]
    more = topk_mask(list(scores), left, where=rest)
    return [a | b for a, b in zip(first, more, strict=True)]


def _best_of_each(granularity, scores, k, where) -> Bool[Array, "..."]:
    """The k best eligible entries of each group; fewer where fewer are eligible."""
    allowed = _split(granularity, where)
    # The last key is the first to sort by: NaN is eligible, if the worst.
    order = jnp.lexsort((-_split(granularity, scores), ~allowed), axis=1)
    rank = jnp.argsort(order, axis=1)
    return _merge(granularity, (rank < k) & allowed, where.shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _group_size(granularity: Granularity, shape: tuple[int, ...]) -> int:
    return (granularity.rows or _matrix(shape)[0]) * granularity.columns


def _split(granularity: Granularity, x: Array) -> Array:
    """(groups, weights of a group), both in the order of the matrix."""
    (fan_in, out), columns = _matrix(x.shape), granularity.columns
    rows = granularity.rows or fan_in
    tiles = x.reshape(fan_in // rows, rows, out // columns, columns)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, rows * columns)


def _merge(granularity: Granularity, groups: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_split`."""
    (fan_in, out), columns = _matrix(shape), granularity.columns
    rows = granularity.rows or fan_in
    tiles = groups.reshape(fan_in // rows, out // columns, rows, columns)
    return tiles.transpose(0, 2, 1, 3).reshape(shape)
