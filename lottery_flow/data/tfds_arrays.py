"""MNIST, Fashion-MNIST and CIFAR out of TensorFlow Datasets, without TensorFlow.

TFDS's ArrayRecord files are read in their own order, which is part of the paper's
method: its gradient norm is taken over the first 1,000 training images. Decoding takes
some 20 seconds, so the arrays are kept in `<data_dir>/.lottery_flow/` for next time.
"""

import json
import logging
import os
import re
import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lottery_flow.data import faults
from lottery_flow.data.arrays import Arrays, Spec
from lottery_flow.errors import UserError
from lottery_flow.files import replacing

_LOG = logging.getLogger(__name__)

# Pixels / 255 and nothing else is the paper's MNIST setting. The figures for CIFAR are
# those in common use: mean and standard deviation of all training pixels.
SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("mnist", (28, 28, 1), 10, 60_000, 10_000, (0.0,), (1.0,)),
        Spec("fashion_mnist", (28, 28, 1), 10, 60_000, 10_000, (0.0,), (1.0,)),
        Spec(
            "cifar10",
            (32, 32, 3),
            10,
            50_000,
            10_000,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
        Spec(
            "cifar100",
            (32, 32, 3),
            100,
            50_000,
            10_000,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
        ),
    )
}


def load(spec: Spec, data_dir: str = "") -> Arrays:
    """Reads the training and the test split in dataset order.

    Args:
      spec: one of `SPECS`.
      data_dir: where TFDS keeps its data sets; "" for TFDS's own default.

    Raises:
      UserError: the data set is not there, is not in ArrayRecord files, is damaged, or
        is not what `spec` says (number or shape of images, range of labels).
    """
    directory = data_directory(data_dir)
    with without_tfds_warnings():
        builder = prepared_builder(spec.name, directory)
        _check_sizes(builder, spec, directory)
        info = (builder.data_path / "dataset_info.json").read_bytes()
        cache = _cache_path(directory, f"{spec.name}-{builder.version}.npz")
        arrays = _read_cache(cache, info, spec) if cache else None
        if arrays is None:
            arrays = _decode(builder, spec, directory)
            if cache:
                _write_cache(cache, info, arrays)
    return arrays


def data_directory(data_dir: str) -> str:
    """The directory that TFDS would use, with "" and ~ replaced."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return os.path.expanduser(data_dir or default)


def prepare_command(name: str, directory: str) -> str:
    """The shell command that puts a data set into a directory."""
    return (
        "pip install 'lottery_flow[prepare]' && python -m lottery_flow.data.prepare"
        f" {name} --data_dir={shlex.quote(directory)}"
    )


def wrong_format(builder: Any, directory: str) -> UserError:
    """The mistake of a data set whose files have no random access.

    TFDS refuses to write a second format beside the first, hence another directory.
    """
    name, other = builder.name, os.path.join(directory, "array_record")
    return UserError(
        f"Data set {name!r} in {builder.data_path} is prepared as"
        f" {builder.info.file_format.value}, not as array_record: run"
        f" `{prepare_command(name, other)}` and set"
        f" --config.data.dir={shlex.quote(other)}."
    )


def prepared_builder(name: str, directory: str) -> Any:
    """TFDS's builder of a data set that is there.

    Raises:
      UserError: it is not there, or TFDS does not know it.
    """
    unknown = UserError(
        f"data.name={name!r} is unknown; give digits, mnist, another name of TFDS, "
        "folder:DIR or synthetic"
    )
    # What else TFDS takes for a name is code of others, which it would download, or
    # has arguments of the builder in it.
    if not re.fullmatch(r"[a-z]\w*(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name, re.ASCII):
        raise unknown
    import tensorflow_datasets as tfds  # half a second, and `digits` does without

    folder = tfds.core.Path(directory) / re.split("[/:]", name)[0]
    if foreign := _foreign_code(folder):
        raise UserError(
            f"data.name={name!r} in {directory} asks for the code of {foreign!r}, "
            "which is none of TFDS's features and is not executed; prepare it anew"
        )
    try:
        builder = tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError as error:
        raise unknown from error
    except Exception as error:  # of a configuration or version that is not there
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"data.name={name!r} in {directory} cannot be opened ({reason}); give a "
            "configuration and a version that TFDS has, and a --config.data.dir"
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"Data set {name!r} was not found in {directory}: run"
            f" `{prepare_command(name, directory)}`, or set --config.data.dir to"
            " the directory that has it."
        )
    return builder


def _foreign_code(folder: Any) -> str | None:
    """A class that a data set's features name, if TFDS would import it from elsewhere.

    TFDS imports whatever module these files name.
    """

    def names(value):
        if isinstance(value, dict):
            found = value.get("pythonClassName", value.get("type"))
            yield from [found] if isinstance(found, str) else []
        for child in value.values() if isinstance(value, dict) else value:
            if isinstance(child, dict | list):
                yield from names(child)

    # <version>/ or <configuration>/<version>/
    found = [*folder.glob("*/features.json"), *folder.glob("*/*/features.json")]
    for path in found:
        try:
            features = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue  # TFDS says so
        for name in names(features if isinstance(features, dict) else {}):
            if "." in name and not name.startswith("tensorflow_datasets."):
                return name
    return None


def _check_sizes(builder: Any, spec: Spec, directory: str) -> None:
    found = {name: split.num_examples for name, split in builder.info.splits.items()}
    expected = {"train": spec.n_train, "test": spec.n_test}
    if found != expected:
        raise _unusable(builder, directory, f"has {found} images, not {expected}")


def _decode(builder: Any, spec: Spec, directory: str) -> Arrays:
    """Reads and checks both splits."""
    try:
        splits = builder.as_data_source(split=["train", "test"])
    except NotImplementedError as error:
        raise wrong_format(builder, directory) from error
    try:
        arrays = Arrays(
            *_decode_split("training", splits[0]),
            *_decode_split("test", splits[1]),
        )
    except (RuntimeError, ValueError) as error:  # array_record's: a damaged file; ours
        raise _unusable(builder, directory, f"cannot be read ({error})") from error
    if fault := faults.of_arrays(arrays, spec):
        raise _unusable(builder, directory, f"has {fault}")
    return arrays


def _decode_split(split: str, source: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images, of whatever shape they have, and labels of one split."""
    images, labels = [], []
    for start in range(0, len(source), 1000):  # in blocks: twice as fast as one by one
        stop = min(start + 1000, len(source))
        try:
            block = source.__getitems__(range(start, stop))
        except Exception:  # of one of them: which?
            block = [_decode_one(split, source, i) for i in range(start, stop)]
        for i, example in enumerate(block, start):
            if images and example["image"].shape != images[0].shape:
                raise ValueError(
                    f"{split} image {i} is {example['image'].shape}, not "
                    f"{images[0].shape}"
                )
            images.append(example["image"])
            labels.append(example["label"])
    return np.stack(images), np.asarray(labels, np.int32)


def _decode_one(split: str, source: Any, i: int) -> Any:
    try:
        return source[i]
    except Exception as error:
        raise ValueError(
            f"{split} image {i}: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def _unusable(builder: Any, directory: str, fault: str) -> UserError:
    """The mistake of a data set that is there and of no use."""
    return UserError(
        f"Data set {builder.name!r} in {builder.data_path} {fault}: delete this"
        f" directory and run `{prepare_command(builder.name, directory)}`, or set"
        " --config.data.dir to another directory."
    )


def _cache_path(directory: str, name: str) -> Path | None:
    """Where the decoded arrays are kept; nowhere, for a remote directory."""
    return None if "://" in directory else Path(directory, ".lottery_flow", name)


def _read_cache(path: Path, info: bytes, spec: Spec) -> Arrays | None:
    """The arrays of an earlier run, if whole and decoded from this very data set."""
    try:
        # Opened here: np.load leaves the file open where it is no zip file.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if file["info"].tobytes() != info:
                return None  # prepared anew since
            arrays = Arrays(*(file[field] for field in Arrays._fields))
        fault = faults.of_arrays(arrays, spec)
        if fault is None:
            return arrays
    except FileNotFoundError:
        return None
    except Exception as error:  # the ways a damaged file can fail are too many to list
        fault = f"{type(error).__name__}: {error}"
    _LOG.warning("Ignoring the damaged cache %s (%s).", path, fault)
    return None


def _write_cache(path: Path, info: bytes, arrays: Arrays) -> None:
    """Keeps the arrays, if possible; other runs see the whole file or none."""
    content = arrays._asdict() | {"info": np.frombuffer(info, np.uint8)}
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path, uuid.uuid4().hex) as temporary:
            np.savez(temporary, **content)
    except OSError as error:
        _LOG.info("Going without the cache %s (%s).", path, error)


@contextmanager
def without_tfds_warnings() -> Iterator[None]:
    """Holds back two warnings: no OpenCV (Pillow does), and what `load` itself says."""
    held_back = ("OpenCV is not installed", "Variant folder")

    def is_wanted(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(held_back)

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)
