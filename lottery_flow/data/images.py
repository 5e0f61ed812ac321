"""Images of any size, decoded one by one and cut to one size.

    train   a random part of the image, 8 to 100 % of its area with an aspect ratio of
            3/4 to 4/3, resized to size x size; mirrored half the time
    test    the central square, size / (size + 32) of the shorter side, resized

(Szegedy et al. 2014, arXiv 1409.4842; the crops of the usual ResNet-50 recipe.) What an
image becomes in training is a function of the seed and of its place in the stream
alone.

A split is a sequence of *records*: `records[i]` is {"image": encoded bytes or uint8
[h w c], "label": int}, in the order of the data set.
"""

import io
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lottery_flow.data import tfds_arrays
from lottery_flow.data.arrays import Spec
from lottery_flow.errors import UserError

# Of all pixels of ImageNet's training images, as fractions of 255.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Shares of the area, and aspect ratios, of training crops.
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_TRIES = 10
_MARGIN = 32  # pixels that the test crop leaves away, at the size of the network
_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


@runtime_checkable
class Records(Protocol):
    """A split, see above."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...


class Images(NamedTuple):
    """A data set whose images are decoded when they are needed.

    Attributes:
      spec: with the shape of an image as the network sees it.
      train: records of the training split.
      test: records of the split to test on.
    """

    spec: Spec
    train: Records
    test: Records

    @property
    def size(self) -> int:
        """Height and width of an image as the network sees it."""
        return self.spec.image_shape[0]


def decode(image: bytes | np.ndarray) -> Image.Image:
    """An RGB image from its file's content or its pixels [h w c] or [h w].

    Raises:
      ValueError: pixels of another type than uint8, or with neither 1 nor 3 channels; a
        file whose pixels have more than 8 bits, which Pillow would cut off.
      Exception: of Pillow's many, for what is no image or a damaged one.
    """
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        colours = pixels.ndim == 3 and pixels.shape[-1] == 3
        fits = pixels.size and (pixels.ndim == 2 or colours)
        if pixels.dtype != np.uint8 or not fits:
            raise ValueError(
                f"pixels are {image.dtype}{image.shape}, not uint8 with 1 or 3 channels"
            )
        return Image.fromarray(pixels).convert("RGB")
    found = Image.open(io.BytesIO(image))
    if found.mode.startswith(("I", "F")):
        raise ValueError(f"pixels are {found.mode}, not of 8 bits")
    return found.convert("RGB")


def train_crop(
    image: Image.Image, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A random part, resized, mirrored half the time.

    Ten parts are tried; where none fits into a very long image, it is the largest one
    of a permitted aspect ratio in its middle.
    """
    box = _random_box(*image.size, rng)
    pixels = _resize(image, size, box)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def eval_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The central square without a margin, resized."""
    width, height = image.size
    side = min(width, height) * size / (size + _MARGIN)
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(image, size, (left, top, left + side, top + side))


# Number of classes, training and test images: known without the data.
SIZES = {
    "imagenet2012": (1000, 1_281_167, 50_000),
    "imagenette/160px-v2": (10, 9469, 3925),
}


def known_spec(name: str, size: int) -> Spec:
    """The spec of one of `SIZES`."""
    return _spec(name, size, *SIZES[name])


def open_tfds(name: str, data_dir: str, size: int) -> Images:
    """A data set of images and labels that TFDS has prepared, as encoded files.

    Args:
      name: of TFDS, with the configuration, `imagenet2012` or `imagenette/160px-v2`.
      data_dir: where TFDS keeps its data sets; "" for TFDS's own default.
      size: of the images for the network.

    Raises:
      UserError: it is not there, not in ArrayRecord files, or has no images with
        labels; nothing to test on.
    """
    import tensorflow_datasets as tfds  # half a second, which small data do without

    directory = tfds_arrays.data_directory(data_dir)
    with tfds_arrays.without_tfds_warnings():
        builder = tfds_arrays.prepared_builder(name, directory)
        features = builder.info.features
        if not {"image", "label"} <= set(features or ()):
            raise UserError(
                f"Data set {name!r} has no images with labels; take another."
            )
        splits = builder.info.splits
        held_out = next((k for k in ("validation", "test") if k in splits), None)
        if "train" not in splits or held_out is None:
            raise UserError(
                f"Data set {name!r} has the splits {', '.join(splits)}; it needs train"
                " and validation or test."
            )
        try:
            train, test = builder.as_data_source(
                split=["train", held_out],
                decoders={"image": tfds.decode.SkipDecoding()},
            )
        except NotImplementedError as error:
            raise tfds_arrays.wrong_format(builder, directory) from error
    n_classes = features["label"].num_classes
    spec = _spec(name, size, n_classes, len(train), len(test))
    return Images(spec, train, test)


def open_folder(directory: str, size: int) -> Images:
    """Image files in `<directory>/<split>/<class>/`; splits: train, and val or test.

    Classes are numbered, and images ordered, by their names.

    Raises:
      UserError: a split is missing or has no images, or other classes than the other.
    """
    root = Path(directory).expanduser()
    held_out = "val" if (root / "val").is_dir() else "test"
    train, test = _Files(root / "train"), _Files(root / held_out)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{root}: train and {held_out} have different classes ({', '.join(odd)});"
            " give both the same directories"
        )
    spec = _spec(root.name, size, len(train.classes), len(train), len(test))
    return Images(spec, train, test)


def synthetic(
    size: int, n_classes: int = 1000, n_train: int = 1_281_167, n_test: int = 1000
) -> Images:
    """Noise of the shapes of ImageNet, for measuring speed: few images to test on."""
    spec = _spec("synthetic", size, n_classes, n_train, n_test)
    return Images(spec, _Noise(spec, n_train, 0), _Noise(spec, n_test, 1))


class _Files:
    """Records of the image files in the directories of a split's classes."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(
                f"data.name: {directory} is missing; it holds a directory of images "
                "for each class"
            )
        self.classes = sorted(p.name for p in directory.iterdir() if p.is_dir())
        self._files = [
            (str(path), label)
            for label, name in enumerate(self.classes)
            for path in sorted((directory / name).iterdir())
            if path.suffix.lower() in _SUFFIXES
        ]
        if not self._files:
            raise UserError(
                f"{directory} has no images ({', '.join(_SUFFIXES)}) in directories"
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, label = self._files[i]
        return {"image": Path(path).read_bytes(), "label": label}

    def path(self, i: int) -> str:
        """Where a record is read from."""
        return self._files[i][0]


class _Noise:
    """Records of noise, each a function of its number."""

    def __init__(self, spec: Spec, n: int, stream: int) -> None:
        self._spec, self._n, self._stream = spec, n, stream

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> dict[str, Any]:
        rng = np.random.Generator(np.random.Philox(key=[self._stream, i]))
        shape = self._spec.image_shape
        image = np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape)
        return {"image": image, "label": int(rng.integers(self._spec.n_classes))}


def _spec(name, size, n_classes, n_train, n_test) -> Spec:
    return Spec(name, (size, size, 3), n_classes, n_train, n_test, MEAN, STD)


def _random_box(width: int, height: int, rng) -> tuple[float | int, ...]:
    low, high = (math.log(r) for r in _RATIO)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _resize(image: Image.Image, size: int, box) -> UInt8[np.ndarray, "size size 3"]:
    bilinear = Image.Resampling.BILINEAR
    return np.asarray(image.resize((size, size), bilinear, box=box))
