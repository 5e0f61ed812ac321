"""Examples on the devices: all the time, or when they are needed."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from lottery_flow import data as data_lib
from lottery_flow import parallel
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
    def of(cls, job: Job, dataset: data_lib.Dataset, mesh: Mesh) -> "Data":
        """Puts a data set on the devices of `mesh`, cut as the job says."""
        n_probe, n_grow = job.probe_examples, job.grow_examples

        def batch(start, end):
            found = data_lib.examples(dataset, "train", start, end)
            return _put(mesh, found)

        if isinstance(dataset, data_lib.Images):
            train, streamed = None, partial(_stream, job, dataset, mesh)
            test = partial(_stream_test, job, dataset, mesh)
        else:
            whole = data_lib.examples(dataset, "train", 0, job.spec.n_train)
            train, streamed = parallel.put(whole, parallel.sharding(mesh)), None
            split = dataset.test_images, dataset.test_labels
            padded = arrays.padded_batches(*split, job.eval_batch_size)
            test = partial(list, [_put(mesh, batch) for batch in padded])
        return cls(
            train=train,
            probe=batch(0, n_probe),
            grow=batch(n_probe, n_probe + n_grow) if n_grow else None,
            stream=streamed,
            test=test,
        )


def steps(job: Job, data: Data, start: int) -> Iterator[tuple[Batch, Any]]:
    """The examples of each step of a single run, as `Steps.train` takes them."""
    if data.stream is not None:
        for batch in data.stream(start):
            yield batch, None
        return
    assert data.train is not None
    for t in range(start, job.total_steps):
        yield data.train, job.draws(t)


def ahead(batches: stream.Stream, place: Callable, n: int = 2) -> Iterator[Batch]:
    """The batches on the device, `n` of them before they are asked for."""
    waiting: collections.deque[Batch] = collections.deque()
    with contextlib.closing(batches):
        for batch in batches:
            waiting.append(place(batch))
            if len(waiting) == n:
                yield waiting.popleft()
        yield from waiting


def _put(mesh: Mesh, batch: Batch) -> Batch:
    """A batch that every process has."""
    where = parallel.batch_sharding(mesh, len(batch["label"]))
    return parallel.put(batch, where)


def _stream(job: Job, dataset, mesh: Mesh, step: int) -> Iterator[Batch]:
    batches = stream.train_batches(
        dataset,
        seed=job.data_seed,
        batch_size=job.batch_size,
        start=step,
        stop=job.total_steps,
        shard=parallel.own_part(mesh, job.batch_size),
        n_workers=job.workers,
    )
    return ahead(batches, partial(parallel.join_parts, mesh, n=job.batch_size))


def _stream_test(job: Job, dataset, mesh: Mesh) -> Iterator[Batch]:
    batches = stream.eval_batches(
        dataset,
        batch_size=job.eval_batch_size,
        shard=parallel.own_part(mesh, job.eval_batch_size),
        n_workers=job.workers,
    )
    return ahead(batches, partial(parallel.join_parts, mesh, n=job.eval_batch_size))
