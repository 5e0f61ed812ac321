"""Examples on the devices: all the time, or when they are needed."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from lottery_flow import data as data_lib
from lottery_flow.data import arrays, stream
from lottery_flow.job import Job
from lottery_flow.steps import Batch


class Data(NamedTuple):
    """What is on the devices all the time, and what gets there when it is needed.

    Attributes:
      train: the whole training split; None where it is decoded on the way.
      probe: the batch that gradient flow is measured on.
      grow: the batch that growth scores are taken on, if not that of the step.
      stream: `(step) -> iterator` of the batches from a step on; None where the split
        is in memory.
      test: `() -> batches` to evaluate on.
    """

    train: Batch | None
    probe: Batch
    grow: Batch | None
    stream: Callable[[int], Iterator[Batch]] | None
    test: Callable[[], Iterable[Batch]]

    @classmethod
    def of(cls, job: Job, dataset: data_lib.Dataset, place: Callable) -> "Data":
        """Puts a data set where `place` does, cut as the job says."""
        n_probe, n_grow = job.probe_examples, job.grow_examples

        def examples(start, end):
            return place(data_lib.examples(dataset, "train", start, end))

        if isinstance(dataset, data_lib.Images):
            train, streamed = None, partial(_stream, job, dataset, place)
            test = partial(_stream_test, job, dataset, place)
        else:
            train, streamed = examples(0, job.spec.n_train), None
            split = dataset.test_images, dataset.test_labels
            padded = arrays.padded_batches(*split, job.eval_batch_size)
            test = partial(list, [place(batch) for batch in padded])
        return cls(
            train=train,
            probe=examples(0, n_probe),
            grow=examples(n_probe, n_probe + n_grow) if n_grow else None,
            stream=streamed,
            test=test,
        )


def steps(job: Job, data: Data, start: int) -> Iterator[tuple[Batch, Any]]:
    """The examples of each step of a single run, as `Steps.train` takes them."""
    if data.stream is not None:
        for batch in data.stream(start):
            yield batch, None
        return
    n, b = job.spec.n_train, job.batch_size
    assert data.train is not None
    for t in range(start, job.total_steps):
        yield data.train, arrays.batch_indices(job.data_seed, t, n, b)


def ahead(batches: stream.Stream, place: Callable, n: int = 2) -> Iterator[Batch]:
    """The batches on the device, `n` of them before they are asked for."""
    waiting: collections.deque[Batch] = collections.deque()
    with contextlib.closing(batches):
        for batch in batches:
            waiting.append(place(batch))
            if len(waiting) == n:
                yield waiting.popleft()
        yield from waiting


def _stream(job: Job, dataset, place: Callable, step: int) -> Iterator[Batch]:
    batches = stream.train_batches(
        dataset,
        seed=job.data_seed,
        batch_size=job.batch_size,
        start=step,
        stop=job.total_steps,
        n_workers=job.workers,
    )
    return ahead(batches, place)


def _stream_test(job: Job, dataset, place: Callable) -> Iterator[Batch]:
    batches = stream.eval_batches(
        dataset, batch_size=job.eval_batch_size, n_workers=job.workers
    )
    return ahead(batches, place)
