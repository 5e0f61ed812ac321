"""Where active weights lie: compressed rows of a kernel and of its transpose.

    the weights of row i are those from starts[i] to starts[i + 1]

Both are lists of int32 whose length is the number of active weights: the only static
shape, so that a rewire that conserves the number needs no new program. Format: Saad
2003, Iterative methods for sparse linear systems, section 3.4.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32


class Structure(NamedTuple):
    """Where the active weights of a kernel [in, out] lie.

    The first three list them in the order of the flattened kernel, by input and then
    by output. Entries beyond the active weights, if the capacity is greater, have the
    position in * out, which no weight has, and index 0.

    Attributes:
      positions: in the flattened kernel.
      inputs: of each weight.
      outputs: of each weight.
      input_starts: where each input's weights start, and the number of all.
      order: the same weights ordered by output and then by input, as indices into
        the lists above. (Values read in this order from the kernel itself would miss
        the caches.)
      inputs_by_output: of each weight, in that order.
      output_starts: where each output's weights start in it, and the number of all.
    """

    positions: Int32[Array, " n"]
    inputs: Int32[Array, " n"]
    outputs: Int32[Array, " n"]
    input_starts: Int32[Array, " in+1"]
    order: Int32[Array, " n"]
    inputs_by_output: Int32[Array, " n"]
    output_starts: Int32[Array, " out+1"]


def structure(mask: Bool[Array | np.ndarray, "i o"], n_active: int) -> Structure:
    """The structure of a mask, on the device, with shapes that are known beforehand.

    For programs that rewire by themselves; on a CPU, `structure_on_host` takes a
    third to a tenth of the time.

    Args:
      mask: of a kernel [in, out].
      n_active: capacity, at least the number of active weights. Of a mask with more
        active weights some are left out; `structure_on_host` notices.

    Guarantees:
      - The same arrays as from `structure_on_host`.
      - With a greater capacity the same products and gradients.
    """
    _check_capacity(mask.shape, n_active)
    mask = jnp.asarray(mask)
    n_out, size, n = mask.shape[1], mask.size, n_active
    ranks, input_starts = _ranks(mask, n)
    # What does not fit is dropped from both orders.
    ranks_by_output, output_starts = _ranks((ranks < n).T, n)
    empty = jnp.zeros(n, jnp.int32)
    positions = (
        (empty + size)
        .at[ranks.reshape(-1)]
        .set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    )
    live = positions < size
    inputs = jnp.where(live, positions // n_out, 0)
    order = empty.at[ranks_by_output.T.reshape(-1)].set(ranks.reshape(-1), mode="drop")
    return Structure(
        positions=positions,
        inputs=inputs,
        outputs=jnp.where(live, positions % n_out, 0),
        input_starts=input_starts,
        order=order,
        inputs_by_output=jnp.where(live, inputs[order], 0),
        output_starts=output_starts,
    )


def structure_on_host(
    mask: Bool[Array | np.ndarray, "i o"], n_active: int | None = None
) -> Structure:
    """The structure of a mask with numpy, which checks that it fits.

    Args:
      mask: of a kernel [in, out].
      n_active: capacity; the number of active weights by default.

    Raises:
      ValueError: more active weights than the capacity.
    """
    mask = np.asarray(mask)
    n_in, n_out = mask.shape
    positions = np.flatnonzero(mask)
    found = positions.size
    n = found if n_active is None else n_active
    _check_capacity(mask.shape, n)
    if found > n:
        raise ValueError(
            f"n_active={n}: the mask has {found} active weights; give {found}"
        )
    inputs, outputs = np.divmod(positions, n_out)
    # A stable sort of short integers counts; it compares long ones.
    short = np.uint16 if n_out <= 2**16 else np.uint32
    order = np.argsort(outputs.astype(short), kind="stable")

    def padded(values, fill=0):
        rest = np.full(n - found, fill)
        return jnp.asarray(np.concatenate([values, rest]).astype(np.int32))

    def starts(indices, rows):
        counts = np.bincount(indices, minlength=rows)
        return jnp.asarray(np.cumsum([0, *counts]).astype(np.int32))

    return Structure(
        positions=padded(positions, mask.size),
        inputs=padded(inputs),
        outputs=padded(outputs),
        input_starts=starts(inputs, n_in),
        order=padded(order),
        inputs_by_output=padded(inputs[order]),
        output_starts=starts(outputs, n_out),
    )


def _ranks(mask, n):
    """Which active entry each one is, row after row (n if none); where rows start.

    A loop over the columns: `jnp.cumsum` of the flattened mask takes five times longer.
    """

    def count(so_far, column):
        so_far = so_far + column
        return so_far, so_far

    start = jnp.zeros(mask.shape[0], jnp.int32)
    totals, counts = lax.scan(count, start, mask.T.astype(jnp.int32))
    starts = jnp.pad(jnp.cumsum(totals), (1, 0)).astype(jnp.int32)
    ranks = counts.T - 1 + starts[:-1, None]
    return jnp.where(mask, ranks, n), jnp.minimum(starts, n)


def _check_capacity(shape, n_active):
    """Raises for a capacity that no kernel of this shape can have."""
    size = shape[0] * shape[1]
    if not 0 <= n_active <= size:
        raise ValueError(
            f"n_active={n_active}: a mask of shape {shape} has 0 to {size} active "
            "weights; give their number"
        )
