"""Exact selection of the k best scores, in linear time and without a sort.

IEEE floats order like the integers of their bits once negative numbers are
flipped, so the k-th largest score is found on the bits: on CPUs by counting 16 bits
at a time into histograms (two passes for float32, four for float64), elsewhere,
where scattered additions are slow, by bisection (a counting pass for each bit). Ties
at the threshold go to the lower flat index, the rule of the reference code
(TensorFlow's `top_k`), which decides masks whenever many scores are exactly zero.

The layers of a network are selected together, as segments of one array, so that the
program does not grow with their number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

# Layers are cut into rows of this many entries. Ties are ranked inside one row: a
# cumulative sum over everything would cost more than the selection itself.
_ROW = 1024
_BITS = 16  # of one digit of the radix selection
_BINS = 1 << _BITS
# Entries, and arrays, selected together. The keys are a copy of the scores, and each
# array has its histogram: for a large network both would show in its peak memory.
_GROUP = 1 << 21
_GROUP_ARRAYS = 128


def topk_mask(
    scores: PyTree[Float[Array, "..."]],
    k: PyTree,
    where: PyTree[Bool[Array, "..."]] | None = None,
) -> PyTree[Bool[Array, "..."]]:
    """Marks the `k` largest scores of an array, or of every array of a tree.

    Args:
      scores: any float dtypes and shapes. NaN ranks below -inf; -0 equals 0.
      k: how many to mark, an integer for each array; may be traced. An integer,
        never a rounded product.
      where: entries that may be chosen (all, if None), of the scores' shapes.

    Raises:
      ValueError: an array of 2^31 entries or more, or `where` of another shape.

    Returns:
      Boolean arrays of the scores' shapes.

    Guarantees (for each array):
      - Exactly min(k, number of eligible entries) entries are True.
      - No entry outside `where` is True.
      - No chosen score is smaller than an eligible score left out.
      - Among equal scores the lower flat index is chosen first.
    """
    leaves, treedef = jax.tree.flatten(scores)
    ks = treedef.flatten_up_to(k)
    eligible = [None] * len(leaves) if where is None else treedef.flatten_up_to(where)
    for leaf, allowed in zip(leaves, eligible, strict=True):
        if leaf.size >= 2**31:
            raise ValueError(
                f"scores of shape {leaf.shape} have 2^31 entries or more; split them"
            )
        if allowed is not None and allowed.shape != leaf.shape:
            raise ValueError(f"where has shape {allowed.shape}, scores {leaf.shape}")
    chosen: list[Array] = []
    for start, end in _groups([leaf.size for leaf in leaves]):
        chosen += _select(leaves[start:end], ks[start:end], eligible[start:end])
    return jax.tree.unflatten(treedef, chosen)


def _groups(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive arrays, as many as hold `_GROUP` entries or a single one."""
    groups, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        full = total + size > _GROUP or i - start == _GROUP_ARRAYS
        if i > start and full:
            groups.append((start, i))
            start, total = i, 0
        total += size
    return [*groups, (start, len(sizes))] if sizes else []


class _Segments(NamedTuple):
    """Arrays laid out in rows: row r belongs to segment `of_row[r]`."""

    of_row: np.ndarray
    first_row: np.ndarray

    @property
    def n(self) -> int:
        return len(self.first_row)


def _select(leaves, ks, eligible) -> list[Array]:
    n_rows = [-(-leaf.size // _ROW) for leaf in leaves]
    if not sum(n_rows):
        return [jnp.zeros(leaf.shape, bool) for leaf in leaves]
    segments = _Segments(
        np.repeat(np.arange(len(leaves), dtype=np.int32), n_rows),
        np.cumsum([0, *n_rows[:-1]], dtype=np.int32),
    )
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    keys = _rows([_keys(*pair, wide) for pair in zip(leaves, eligible, strict=True)])
    k = jnp.stack([jnp.asarray(i, jnp.int32) for i in ks])
    threshold, n_ties = lax.platform_dependent(
        keys,
        k,
        cpu=lambda keys, k: _radix(keys, k, segments),
        default=lambda keys, k: _bisection(keys, k, segments),
    )
    # Fewer than k eligible: the k-th largest is then not one of them. All are taken.
    short = threshold == 0
    threshold = jnp.where(short, jnp.ones_like(threshold), threshold)
    n_ties = jnp.where(short, jnp.int32(np.iinfo(np.int32).max // 2), n_ties)
    chosen = _at_least(keys, threshold, n_ties, segments).ravel()
    starts = segments.first_row * _ROW
    return [
        chosen[start : start + leaf.size].reshape(leaf.shape)
        for start, leaf in zip(starts.tolist(), leaves, strict=True)
    ]


def _keys(scores, where, wide: bool) -> UInt[Array, " n"]:
    """Unsigned integers that order like the scores; 0 where not eligible alone."""
    # Exact, and order is preserved.
    scores = scores.ravel().astype(jnp.float64 if wide else jnp.float32)
    unsigned = jnp.uint64 if wide else jnp.uint32
    top = jnp.array(1 << (scores.dtype.itemsize * 8 - 1), unsigned)
    bits = lax.bitcast_convert_type(scores, unsigned)
    # -0 is 0. On the bits, because CPUs may take denormals for zeros.
    bits = jnp.where(bits == top, jnp.zeros_like(bits), bits)
    keys = jnp.where(bits >= top, ~bits, bits | top)
    # Zero is below every key of a score: even NaN and -inf map above it.
    keys = jnp.where(jnp.isnan(scores), jnp.ones_like(keys), keys)
    if where is None:
        return keys
    return jnp.where(where.ravel(), keys, jnp.zeros_like(keys))


def _rows(keys: Sequence[UInt[Array, " _"]]) -> UInt[Array, "rows row"]:
    """The arrays one below the other, each filled with zeros to whole rows."""
    parts = []
    for flat in keys:
        # Padding the last row alone: XLA's CPU loops over a pad are slow.
        cut = flat.size // _ROW * _ROW
        if cut:
            parts.append(flat[:cut].reshape(-1, _ROW))
        if cut < flat.size:
            rest = jnp.pad(flat[cut:], (0, _ROW - flat.size % _ROW))
            parts.append(rest.reshape(1, _ROW))
    return jnp.concatenate(parts)


def _radix(keys, k: Int[Array, " segments"], segments: _Segments):
    """Thresholds and numbers of ties to take, digit by digit from the highest."""
    n, n_bits = segments.n, keys.dtype.itemsize * 8
    offset = (segments.of_row * _BINS)[:, None]
    digit_mask = jnp.array(_BINS - 1, keys.dtype)

    def find_digit(i, carry):
        threshold, known, k = carry
        shift = jnp.asarray(n_bits - _BITS * (i + 1), keys.dtype)
        alive = (keys & known) == _materialize(threshold[segments.of_row])[:, None]
        digits = ((keys >> shift) & digit_mask).astype(jnp.int32)
        bins = jnp.where(alive, offset + digits, n * _BINS)
        counts = jnp.zeros(n * _BINS, jnp.int32).at[bins].add(1, mode="drop")
        digit, n_above = _kth_bin(counts.reshape(n, _BINS), k)
        threshold = threshold | (digit.astype(keys.dtype) << shift)
        return threshold, known | (digit_mask << shift), k - n_above

    start = jnp.zeros(n, keys.dtype), jnp.zeros((), keys.dtype), k
    threshold, _, n_ties = lax.fori_loop(0, n_bits // _BITS, find_digit, start)
    none = k <= 0
    threshold = jnp.where(none, ~jnp.zeros_like(threshold), threshold)
    return threshold, jnp.where(none, jnp.int32(0), n_ties)


def _kth_bin(counts: Int[Array, "segments bins"], k: Int[Array, " segments"]):
    """The bin of the k-th entry from the top, and the entries in bins above it."""
    blocks = counts.reshape(len(counts), 1 << _BITS // 2, -1)
    block, above = _kth(jnp.sum(blocks, axis=2, dtype=jnp.int32), k)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    digit, above_inside = _kth(inside, k - above)
    return block * blocks.shape[2] + digit, above + above_inside


def _kth(counts, k):
    reached = lax.cumsum(counts, axis=1, reverse=True)
    found = jnp.maximum(jnp.sum(reached >= k[:, None], axis=1, dtype=jnp.int32) - 1, 0)
    above = jnp.take_along_axis(reached - counts, found[:, None], axis=1)
    return found, above[:, 0]


def _bisection(keys, k: Int[Array, " segments"], segments: _Segments):
    """The same as `_radix`, bit by bit, without scattered additions."""
    n_bits = keys.dtype.itemsize * 8
    one = jnp.ones((), keys.dtype)

    def count(flags):
        return jax.ops.segment_sum(
            _count_rows(flags), segments.of_row, segments.n, indices_are_sorted=True
        )

    def set_bit(i, threshold):
        candidate = threshold | (one << jnp.asarray(n_bits - 1 - i, keys.dtype))
        reached = count(keys >= candidate[segments.of_row][:, None])
        return jnp.where(reached >= k, candidate, threshold)

    start = jnp.zeros(segments.n, keys.dtype)
    threshold = lax.fori_loop(0, n_bits, set_bit, start)
    above = count(keys > threshold[segments.of_row][:, None])
    return threshold, jnp.maximum(k - above, 0)


def _at_least(keys, threshold, n_ties, segments: _Segments) -> Bool[Array, "rows row"]:
    """Keys above the threshold, and the first `n_ties` of those that equal it."""
    of_row, n_rows = segments.of_row, len(keys)
    own = _materialize(threshold[of_row])
    ties = _count_rows(keys == own[:, None])
    before = jnp.cumsum(ties, dtype=jnp.int32) - ties
    wanted = n_ties[of_row] - (before - before[segments.first_row][of_row])
    # A row takes all of its ties, or none; both are a threshold of its own.
    takes_all = (wanted >= ties) | (own == ~jnp.zeros_like(own))
    lowest = _materialize(jnp.where(takes_all, own, own + jnp.ones_like(own)))
    chosen = keys >= lowest[:, None]
    # But for the row where the last of them lies, at most one a segment.
    cut = (wanted > 0) & ~takes_all
    cut_row = jnp.full(segments.n, n_rows, jnp.int32)
    cut_row = cut_row.at[jnp.where(cut, of_row, segments.n)].set(
        jnp.arange(n_rows, dtype=jnp.int32), mode="drop"
    )
    rows = jnp.minimum(cut_row, n_rows - 1)
    tied = keys[rows] == threshold[:, None]
    rank = jnp.cumsum(tied, axis=1, dtype=jnp.int32)
    first = tied & (rank <= wanted[rows][:, None])
    return chosen.at[cut_row].set(
        first | (keys[rows] > threshold[:, None]), mode="drop"
    )


def _count_rows(flags: Bool[Array, "rows row"]) -> Int[Array, " rows"]:
    """True entries of each row; in two steps for the reason of `masks.count_true`."""
    in_part = jnp.sum(flags.reshape(-1, 32), axis=1, dtype=jnp.int32)
    return jnp.sum(in_part.reshape(len(flags), -1), axis=1, dtype=jnp.int32)


def _materialize(values: Array) -> Array:
    """The same values, in memory: computed once, not again for every entry of a row.

    XLA fuses cheap producers into each of their consumers, but never a scatter.
    """
    order = jnp.arange(len(values), dtype=jnp.int32)
    return (
        jnp.zeros_like(values)
        .at[order]
        .set(values, indices_are_sorted=True, unique_indices=True)
    )
