"""Images in, batches out: data sets as numpy arrays, or decoded on the way.

`DATASETS` maps the names of those that fit in memory to what is known without reading
(`Spec`) and to the function that reads (`load`); `find` knows all others, too. No
module here imports jax, and reading never imports TensorFlow; only
`python -m lottery_flow.data.prepare` does.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from lottery_flow.data import digits, faults, images, stream, tfds_arrays
from lottery_flow.data.arrays import (
    Arrays,
    Spec,
    batch_indices,
    gather,
    padded_batches,
)
from lottery_flow.data.images import Images
from lottery_flow.errors import UserError

Dataset = Arrays | Images


class Source(NamedTuple):
    """A data set that can be read.

    `load` takes the TFDS data directory ("" is TFDS's own default: the environment
    variable TFDS_DATA_DIR, or else ~/tensorflow_datasets) and returns a data set that
    agrees with `spec`. It raises UserError where the data set is missing, damaged or
    other than `spec` says.
    """

    spec: Spec
    load: Callable[[str], Any]


DATASETS: dict[str, Source] = {
    "digits": Source(digits.SPEC, digits.load),
    **{
        name: Source(spec, partial(tfds_arrays.load, spec))
        for name, spec in tfds_arrays.SPECS.items()
    },
}


# Height and width of images for the network, where nobody asks for another.
_SIZE = 224


def find(name: str, data_dir: str, image_size: int = 0) -> Source:
    """A data set by its name.

    Args:
      name: in `DATASETS`; `synthetic`, which is noise; `folder:DIR`, a directory of
        image files (`images.open_folder`); or any of TFDS, `imagenet2012`.
      data_dir: where TFDS keeps its data sets, "" for TFDS's own default.
      image_size: height and width for the network of those that are not in memory; 0:
        224.

    Raises:
      UserError: no such data set, or one in memory is asked for another size. Of
        `images.SIZES` the spec is known even where the data are not there.
    """
    if name in DATASETS:
        if image_size:
            raise UserError(
                f"data.image_size={image_size}: {name} has images of one size; write 0"
            )
        source = DATASETS[name]
        return source._replace(load=partial(_checked, source))
    size = image_size or _SIZE
    try:
        found = _open(name, data_dir, size)
    except UserError:
        if name not in images.SIZES:
            raise
        # Much can be said of it without the data; reading tells that they are missing.
        spec = images.known_spec(name, size)
        return Source(spec, lambda own_dir: _open(name, own_dir, size))
    return Source(found.spec, lambda _: found)


def _checked(source: Source, data_dir: str) -> Arrays:
    """A data set in memory, which is what its spec says."""
    arrays = source.load(data_dir)
    if fault := faults.of_arrays(arrays, source.spec):
        raise UserError(
            f"data.name={source.spec.name!r} has {fault}; mend the data set"
        )
    return arrays


@lru_cache(maxsize=32)
def _open(name: str, data_dir: str, size: int) -> Images:
    if name == "synthetic":
        return images.synthetic(size)
    if name.startswith("folder:"):
        return images.open_folder(name.removeprefix("folder:"), size)
    return images.open_tfds(name, data_dir, size)


def examples(dataset: Dataset, split: str, start: int, end: int) -> stream.Batch:
    """Images and labels `start` to `end` - 1 of a split, in the data set's order.

    Args:
      dataset: where from.
      split: "train" or "test".
      start: the first example.
      end: the example after the last one; more than there are is cut.
    """
    if isinstance(dataset, Images):
        return stream.examples(dataset, split, start, end)
    pixels, labels = dataset[:2] if split == "train" else dataset[2:]
    return {"image": pixels[start:end], "label": labels[start:end]}


__all__ = [
    "DATASETS",
    "Arrays",
    "Dataset",
    "Images",
    "Source",
    "Spec",
    "batch_indices",
    "examples",
    "find",
    "gather",
    "padded_batches",
]
