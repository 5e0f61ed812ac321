"""What it takes to feed a network with images that are decoded on the way.

    images/s per core   images over the processor time of this process and its workers
    waiting             wall time in `next(batches)` over that of training

Both with no worker process, one and two. The images are real ones, `REAL`, where TFDS
has prepared them, and otherwise files of noise as large as those of ImageNet are.
"""

import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from benchmarks.measure import Ratio
from benchmarks.networks import Setting, sparse_steps
from lottery_flow import feed, models
from lottery_flow.data import images, stream
from lottery_flow.data.images import Images
from lottery_flow.errors import UserError

REAL = "imagenette/160px-v2"
WORKERS = (0, 1, 2)
_SETTING = Setting("resnet18", (64, 64, 3), n_classes=10, batch_size=32)
_WIDTH = 0.25


def decoding(rounds: int = 3) -> Iterator[Ratio]:
    """Decoded, cropped and mirrored images/s per core, of training batches.

    They stand where other cases have ms; the ratio is to 224 px without workers.
    """
    ways = [(size, n) for size in (224, 128) for n in WORKERS]
    rates: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    with source() as (name, open_images):
        for _ in range(rounds):
            for size, n_workers in ways:
                found = images_per_second(open_images(size), n_workers)
                rates[size, n_workers].append(found)
    for (size, n_workers), own in rates.items():
        what = f"images/s per core, {size} px, workers: {n_workers}"
        yield _ratio(what, name, own, rates[ways[0]])


def images_per_second(
    dataset: Images, n_workers: int, batch_size: int = 64, n_batches: int = 16
) -> float:
    """Training images in a second of one core.

    What `n_batches` cost that come after a first one: starting workers, seconds each,
    is not counted.
    """

    def spent(n: int) -> float:
        start = _processor_seconds()
        for _ in _batches(dataset, batch_size, n, n_workers):
            pass
        return _processor_seconds() - start

    one = spent(1)
    return n_batches * batch_size / (spent(1 + n_batches) - one)


def waiting(rounds: int = 3, n_steps: int = 30) -> Iterator[Ratio]:
    """Wall time that a step of training waits for its batch, over that of the step.

    ResNet-18 of a quarter of its width on images of 64 x 64 in batches of 32, step by
    step as a single run does it.
    """
    size, batch_size = _SETTING.image_shape[0], _SETTING.batch_size
    model = models.create("resnet18", _SETTING.image_shape, 10, width=_WIDTH)
    state, own = sparse_steps(_SETTING, model)
    train = jax.jit(own.train, donate_argnums=0)
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in WORKERS}
    with source() as (name, open_images):
        dataset = open_images(size)
        for _ in range(rounds):
            for n_workers in WORKERS:
                batches = _batches(dataset, batch_size, n_steps + 10, n_workers)
                with closing(feed.ahead(batches, jax.device_put)) as ahead:
                    # They compile, and start the workers.
                    state, _ = _train(train, state, ahead, 5)
                    state, found = _train(train, state, ahead, n_steps)
                times[n_workers].append(found)
    for n_workers, found in times.items():
        what = f"resnet18, {size} px: waiting, workers: {n_workers}"
        waited, total = 1e3 / n_steps * np.array(found).T
        yield _ratio(what, f"step, {name}", waited.tolist(), total.tolist())


def _train(train: Callable, state, batches: Iterator, n: int):
    """The state after n steps, and seconds: waiting for batches, and all."""
    waited, loss, began = 0.0, None, time.perf_counter()
    for _ in range(n):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, measured = train(state, {}, batch, None)
        jax.block_until_ready(loss)  # one late, as `Loop.run` looks at it
        loss = measured["loss"]
    jax.block_until_ready(state)
    return state, (waited, time.perf_counter() - began)


@contextmanager
def source() -> Iterator[tuple[str, Callable[[int], Images]]]:
    """What the images are called, and `(size) -> images`."""
    try:
        images.open_tfds(REAL, "", 224)
    except UserError:
        with tempfile.TemporaryDirectory() as directory:
            write_images(Path(directory))
            yield "written files", functools.partial(images.open_folder, directory)
    else:
        yield REAL, functools.partial(images.open_tfds, REAL, "")


def write_images(directory: Path, n: int = 100) -> None:
    """JPEG files of 500 x 375 for `folder:DIR`, always the same, n of each split."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (directory / split / "noise").mkdir(parents=True)
        for i in range(n):
            # Smooth, so that a file has about the bytes of a photograph.
            coarse = rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            image.save(directory / split / "noise" / f"{i:03}.jpg", quality=95)


def _batches(dataset: Images, batch_size: int, n: int, n_workers: int) -> stream.Stream:
    return stream.train_batches(
        dataset,
        seed=0,
        batch_size=batch_size,
        start=0,
        stop=n,
        n_workers=n_workers,
    )


def _processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _ratio(name: str, reference: str, own: list[float], base: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = statistics.median(own), statistics.median(base)
    return Ratio(name, reference, middle, low, high, *medians)
