"""Images in memory, and the training stream as a pure function of the step.

    stream = P_0, P_1, P_2, ...        P_e: epoch e, a permutation of all n examples
    batch t = stream[t b : (t + 1) b]

Repeat, shuffle, batch, as in the paper's code (google-research/rigl, `rigl_tf2`): a
batch may cross the border of two epochs and no example is left over. That code
shuffles through a buffer, which lets an example slip into a neighbouring epoch; here
every epoch visits every example exactly once.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Integer, UInt8


class Spec(NamedTuple):
    """What is known of a data set before it is read.

    Attributes:
      name: the key in `DATASETS`.
      image_shape: height, width, channels.
      n_classes: labels are 0 ... n_classes - 1.
      n_train: number of training images.
      n_test: number of test images.
      mean: to subtract from pixels / 255, per channel.
      std: to divide by after that, per channel.
    """

    name: str
    image_shape: tuple[int, int, int]
    n_classes: int
    n_train: int
    n_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Arrays(NamedTuple):
    """A whole data set in its own order: "the first 1,000 images" means `[:1000]`."""

    train_images: UInt8[np.ndarray, "n h w c"]
    train_labels: Int32[np.ndarray, "n"]
    test_images: UInt8[np.ndarray, "m h w c"]
    test_labels: Int32[np.ndarray, "m"]


def batch_indices(
    seed: int, step: int, n_examples: int, batch_size: int
) -> Int32[np.ndarray, "b"]:
    """The training examples of one step.

    A function of its arguments alone, so a run that starts again at any step sees the
    batches that it would have seen.

    Args:
      seed: of the stream, at least 0.
      step: counted from 0.
      n_examples: size of the training split, at least 1.
      batch_size: at least 1; may exceed `n_examples`.

    Returns:
      `batch_size` indices in [0, n_examples).

    Guarantees:
      - The same arguments give the same batch, in whatever order steps are asked for.
      - Each epoch of the stream visits every example exactly once.
      - Another batch size cuts the same stream at other places.
    """
    position, end = step * batch_size, (step + 1) * batch_size
    pieces = []
    while position < end:
        epoch, offset = divmod(position, n_examples)
        order = _epochs(seed, n_examples)(epoch)
        piece = order[offset : offset + end - position]
        pieces.append(piece)
        position += len(piece)
    return np.concatenate(pieces)


def gather(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int32[np.ndarray, "n"],
    indices: Integer[np.ndarray, "b"],
) -> dict[str, np.ndarray]:
    """Copies the chosen examples into one batch.

    Returns:
      image: uint8 [b h w c]; label: int32 [b].

    Raises:
      IndexError: an index is outside [-n, n).
    """
    return {"image": images[indices], "label": labels[indices]}


def padded_batches(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int32[np.ndarray, "n"],
    batch_size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once and in order, in batches of one size, for evaluation.

    Returns:
      Batches with image: uint8 [b h w c]; label: int32 [b]; weight: float32 [b], 1 for
      an example and 0 for the zeros that fill the last batch. No batch where n is 0.
    """
    for start in range(0, len(labels), batch_size):
        label = labels[start : start + batch_size]
        n_fill = batch_size - len(label)
        yield {
            "image": _fill(images[start : start + batch_size], n_fill),
            "label": _fill(label, n_fill),
            "weight": _fill(np.ones(len(label), np.float32), n_fill),
        }


# Room for a population: each member has a stream of its own, and all of them advance
# together. One too small would draw every permutation anew at every step. Of a stream
# two epochs are kept, whose border a batch may cross: all of them would be gigabytes.
@lru_cache(maxsize=512)
def _epochs(seed: int, n: int) -> Callable[[int], np.ndarray]:
    """The orders of the epochs of a stream."""
    return lru_cache(maxsize=2)(partial(_permutation, seed, n))


def _permutation(seed: int, n: int, epoch: int) -> Int32[np.ndarray, "n"]:
    """The order of one epoch; read-only, because every caller shares it."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    permutation = np.random.Generator(bits).permutation(n).astype(np.int32)
    permutation.setflags(write=False)
    return permutation


def _fill(values: np.ndarray, n_fill: int) -> np.ndarray:
    """`values` with `n_fill` zero rows after the last."""
    zeros = np.zeros((n_fill, *values.shape[1:]), values.dtype)
    return np.concatenate([values, zeros])
