"""Means over a data set that comes in batches of any size and number.

    mean = sum_i b_i fn(batch_i) / sum_i b_i

A loop on the host over programs of one batch: the batches may be a list or any other
sequence, live on the device, on the host or spread over the devices of a mesh along
their first axis, and the last one may be smaller.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

Batches = Sequence[Any]  # of pytrees of arrays, first axis: examples


def split(data: Any, batch_size: int) -> list[Any]:
    """Cuts arrays along their first axis into batches; the last may be smaller.

    Args:
      data: a pytree of arrays of the same first axis.
      batch_size: examples of a batch, at least 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    n = size(data)
    return [
        jax.tree.map(lambda x, i=i: x[i : i + batch_size], data)
        for i in range(0, n, batch_size)
    ]


def size(batch: Any) -> int:
    """The number of examples of a batch.

    Raises:
      ValueError: there are none, or its arrays disagree.
    """
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"a batch needs arrays of one first axis, at least 1; found {sorted(sizes)}"
        )
    return sizes.pop()


def total(batches: Any) -> int:
    """The number of examples of all batches.

    Raises:
      ValueError: there is no batch.
    """
    if isinstance(batches, Mapping) or not hasattr(batches, "__len__"):
        raise ValueError(
            f"batches is a {type(batches).__name__}, not a sequence of batches; write "
            "batches.split(data, batch_size)"
        )
    if not len(batches):
        raise ValueError("batches is empty; give at least one batch")
    return sum(size(batch) for batch in batches)


def mean(fn: Callable[[Any], PyTree], batches: Batches) -> PyTree:
    """The mean of `fn(batch)` over the batches, weighted by their sizes."""
    n = total(batches)
    result = None
    for batch in batches:
        weight = size(batch) / n
        part = jax.tree.map(lambda x, w=weight: x * w, fn(batch))
        result = (
            part if result is None else jax.tree.map(lambda a, b: a + b, result, part)
        )
    return result
