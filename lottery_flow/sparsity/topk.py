"""Exact selection of the k best scores, in linear time and without a sort.

IEEE floats order like the integers of their bits once negative numbers are
flipped, so the k-th largest score is found by bisection on the bits: 32 counting
passes for float32 (64 for float64). Ties at the threshold go to the lower flat
index, the rule of the reference code (TensorFlow's `top_k`), which decides masks
whenever many scores are exactly zero.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, UInt

# Ties are ranked inside one row of this many entries; a cumulative sum over the
# whole array would cost more than the selection itself.
_ROW = 1024


def topk_mask(
    scores: Float[Array, "..."],
    k: int | Integer[Array, ""],
    where: Bool[Array, "..."] | None = None,
) -> Bool[Array, "..."]:
    """Marks the `k` largest scores.

    Args:
      scores: any float dtype and shape. NaN ranks below -inf; -0 equals 0.
      k: how many to mark; may be traced. An integer, never a rounded product.
      where: entries that may be chosen (all, if None), of the scores' shape.

    Returns:
      A boolean array of the scores' shape.

    Guarantees:
      - Exactly min(k, number of eligible entries) entries are True.
      - No entry outside `where` is True.
      - No chosen score is smaller than an eligible score left out.
      - Among equal scores the lower flat index is chosen first.
    """
    if where is not None and where.shape != scores.shape:
        raise ValueError(f"where has shape {where.shape}, scores {scores.shape}")
    keys = _ordered_keys(scores.ravel())
    n_eligible = jnp.int32(keys.size)
    if where is not None:
        # Zero is below every key of a score: even NaN and -inf map above it.
        keys = jnp.where(where.ravel(), keys, jnp.zeros_like(keys))
        n_eligible = jnp.sum(where, dtype=jnp.int32)
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, n_eligible)
    threshold = _kth_largest(keys, k)
    above = keys > threshold
    n_ties = k - jnp.sum(above, dtype=jnp.int32)
    return (above | _first(keys == threshold, n_ties)).reshape(scores.shape)


def _ordered_keys(scores: Float[Array, " n"]) -> UInt[Array, " n"]:
    """Unsigned integers that order like the scores; all of them positive."""
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)  # exact, and order is preserved
    unsigned = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    top = jnp.array(1 << (scores.dtype.itemsize * 8 - 1), unsigned)
    bits = lax.bitcast_convert_type(scores, unsigned)
    # -0 is 0. On the bits, because CPUs may take denormals for zeros.
    bits = jnp.where(bits == top, jnp.zeros_like(bits), bits)
    keys = jnp.where(bits >= top, ~bits, bits | top)
    return jnp.where(jnp.isnan(scores), jnp.ones_like(keys), keys)


def _kth_largest(keys: UInt[Array, " n"], k: Int[Array, ""]) -> UInt[Array, ""]:
    """The largest threshold that at least k keys reach; all ones for k = 0."""
    n_bits = keys.dtype.itemsize * 8
    one = jnp.ones((), keys.dtype)

    def set_bit(i, threshold):
        candidate = threshold | (one << jnp.asarray(n_bits - 1 - i, keys.dtype))
        reached = jnp.sum(keys >= candidate, dtype=jnp.int32)
        return jnp.where(reached >= k, candidate, threshold)

    return lax.fori_loop(0, n_bits, set_bit, jnp.zeros((), keys.dtype))


def _first(flags: Bool[Array, " n"], k: Int[Array, ""]) -> Bool[Array, " n"]:
    """The first k True entries of `flags`."""
    if not flags.size:
        return flags
    n_rows = -(-flags.size // _ROW)
    rows = jnp.pad(flags, (0, n_rows * _ROW - flags.size)).reshape(n_rows, _ROW)
    counts = jnp.sum(rows, axis=1, dtype=jnp.int32)
    totals = jnp.cumsum(counts)
    cut = jnp.argmax(totals >= k)  # the row in which the k-th True lies
    row = rows[cut]
    rank = totals[cut] - counts[cut] + jnp.cumsum(row, dtype=jnp.int32)
    kept = rows & (totals < k)[:, None]
    kept = kept.at[cut].set(row & (rank <= k))
    return kept.ravel()[: flags.size]
