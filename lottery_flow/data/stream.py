"""Batches of images that are decoded on the way, in worker processes if asked.

    example k of the stream = records[P_e[j]]        e, j = divmod(k, n), see `arrays`
    batch t = examples t b ... (t + 1) b - 1

the same stream that data sets in memory have. What becomes of example k, its random
crop, depends on the seed and on k alone. So a run that starts again at any step sees
the batches that it would have seen, with any number of workers and of hosts.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator
from functools import partial

import grain
import numpy as np
from absl.flags import FLAGS
from jaxtyping import Float32, Int32, UInt8

from lottery_flow.data import images as images_lib
from lottery_flow.data import records
from lottery_flow.data.arrays import batch_indices
from lottery_flow.data.images import Images

# Examples that are decoded in one go, at most: a batch comes in such pieces.
_PIECE = 64

# image uint8 [b h w c], label int32 [b]; to evaluate on also weight float32 [b].
Batch = dict[
    str,
    UInt8[np.ndarray, "b h w c"] | Int32[np.ndarray, "b"] | Float32[np.ndarray, "b"],
]


Stream = Generator[Batch, None, None]


def train_batches(
    dataset: Images,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    shard: tuple[int, int] = (0, 1),
    n_workers: int = 0,
) -> Stream:
    """The training batches of steps `start` to `stop` - 1.

    Args:
      dataset: its training split, randomly cropped.
      seed: of the stream.
      batch_size: of all hosts together.
      start: first step.
      stop: the step after the last one.
      shard: (i, n): the i-th of n equal parts of each batch, for this host.
      n_workers: processes that decode; 0: threads of this one.

    Raises:
      ValueError: the batch has no n equal parts.
    """
    make = partial(_train_piece, dataset, seed)
    return _batches(make, batch_size, start, stop, shard, n_workers)


def eval_batches(
    dataset: Images,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    n_workers: int = 0,
) -> Stream:
    """Every test example once and in order, with weight 1, then zeros with weight 0.

    The arguments are those of `train_batches`.
    """
    n_batches = -(-len(dataset.test) // batch_size)
    make = partial(_eval_piece, dataset)
    return _batches(make, batch_size, 0, n_batches, shard, n_workers)


def examples(dataset: Images, split: str, start: int, end: int) -> Batch:
    """Records `start` to `end` - 1 of "train" or "test", cropped as in evaluation.

    Raises:
      UserError: a record that is of no use, see `records`.
    """
    n = len(dataset.train if split == "train" else dataset.test)
    found = []
    for i in range(start, min(end, n)):
        image, label = records.read(dataset, split, i)
        found.append((images_lib.eval_crop(image, dataset.size), label))
    return _stack(dataset, found)


def _batches(make: Callable, batch_size, start, stop, shard, n_workers) -> Stream:
    """`make(first, size)` for the pieces of this host, joined to batches."""
    host, n_hosts = shard
    if batch_size % n_hosts:
        raise ValueError(f"batch_size={batch_size} has no {n_hosts} equal parts")
    own = batch_size // n_hosts
    size = max(d for d in range(1, min(own, _PIECE) + 1) if own % d == 0)
    n_pieces = own // size
    # No closure: it is sent to the workers.
    piece = partial(_piece, make, (batch_size, host * own, size, n_pieces))
    pieces = grain.MapDataset.range(start * n_pieces, stop * n_pieces).map(piece)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * n_pieces)
    stream = pieces.to_iter_dataset(options)
    if n_workers:
        if not FLAGS.is_parsed():  # in a notebook; grain asks for flags of its own
            FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(n_workers, per_worker_buffer_size=2)
        stream = stream.mp_prefetch(workers, _end_with_parent)
    return _closed_at_its_end(stream.batch(n_pieces, batch_fn=_join))


def _end_with_parent(worker: int, n_workers: int) -> None:
    """A worker outlives no process that was killed."""
    del worker, n_workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_for_end, args=(parent,), daemon=True).start()


def _wait_for_end(parent) -> None:
    parent.join()
    os._exit(1)


def _closed_at_its_end(batches: grain.IterDataset) -> Stream:
    """The batches, of which no worker is left when nobody wants more."""
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


def _piece(make: Callable, cut: tuple[int, int, int, int], number: int) -> Batch:
    """A piece by its number in the stream of one host."""
    batch_size, offset, size, n_pieces = cut
    step, i = divmod(number, n_pieces)
    return make(step * batch_size + offset + i * size, size)


def _train_piece(dataset: Images, seed: int, first: int, size: int) -> Batch:
    """The `size` examples of the stream from `first` on, a multiple of `size`."""
    indices = batch_indices(seed, first // size, len(dataset.train), size)
    found = []
    for k, i in enumerate(indices.tolist(), start=first):
        image, label = records.read(dataset, "train", i)
        bits = np.random.Philox(np.random.SeedSequence([seed, k, 1]))
        rng = np.random.Generator(bits)
        found.append((images_lib.train_crop(image, dataset.size, rng), label))
    return _stack(dataset, found)


def _eval_piece(dataset: Images, first: int, size: int) -> Batch:
    """Test examples from `first` on, filled up with zeros."""
    found = examples(dataset, "test", first, first + size)
    n_fill = size - len(found["label"])
    batch = found | {"weight": np.ones(len(found["label"]), np.float32)}
    return {
        k: np.concatenate([v, np.zeros((n_fill, *v.shape[1:]), v.dtype)])
        for k, v in batch.items()
    }


def _stack(dataset: Images, found: list[tuple[np.ndarray, int]]) -> Batch:
    pixels, labels = [image for image, _ in found], [label for _, label in found]
    shape = (len(found), *dataset.spec.image_shape)
    return {
        "image": np.stack(pixels) if pixels else np.zeros(shape, np.uint8),
        "label": np.asarray(labels, np.int32),
    }


def _join(pieces) -> Batch:
    return {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
