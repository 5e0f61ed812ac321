"""Handwritten digits that are always there: scikit-learn's 1,797 images, enlarged.

The UCI "optical recognition of handwritten digits" test set (8x8 pixels, 0 ... 16)
becomes 28x28 uint8, so that whatever runs on MNIST runs on it, in seconds and without
preparing any data. It is a stand-in for trying things out, not MNIST.
"""

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from lottery_flow.data.arrays import Arrays, Spec

SPEC = Spec("digits", (28, 28, 1), 10, 1442, 355, mean=(0.0,), std=(1.0,))

_MAX_PIXEL = 16


def load(data_dir: str = "") -> Arrays:
    """The digits: 1,442 for training and 355 for testing, each split in its own order.

    In each class, every fifth image in the order of the source is for testing (the 5th,
    the 10th, ...), 34 to 36 images a class. Writers therefore occur in both splits,
    which makes the test easier than MNIST's.

    Args:
      data_dir: not used; the images come with scikit-learn.
    """
    del data_dir
    from sklearn.datasets import load_digits  # slow to import, and needed here alone

    pixels, target = load_digits(return_X_y=True)
    pixels = np.asarray(pixels, np.int64).reshape(-1, 8, 8)
    images = _enlarge(pixels)[..., np.newaxis]
    labels = np.asarray(target, np.int32)
    is_test = _every_fifth_of_each_class(labels)
    return Arrays(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _enlarge(images: Integer[np.ndarray, "n 8 8"]) -> UInt8[np.ndarray, "n 28 28"]:
    """Bilinear, and 0 ... 16 to 0 ... 255; in integers: the same bits everywhere."""
    weights = _bilinear_weights()
    total = weights @ images @ weights.T
    highest = 14 * 14 * _MAX_PIXEL
    return ((2 * 255 * total + highest) // (2 * highest)).astype(np.uint8)


def _bilinear_weights() -> Integer[np.ndarray, "28 8"]:
    """Fourteenths of each input pixel in each output pixel, along one axis.

    The centre of output pixel o lies at (o + 1/2) 8/28 - 1/2 = (4 o - 5) / 14 input
    pixels; beyond the outermost centres the image goes on unchanged.
    """
    output = np.arange(28)
    pixel, part = np.divmod(np.clip(4 * output - 5, 0, 14 * 7), 14)
    weights = np.zeros((28, 8), np.int64)
    weights[output, pixel] = 14 - part
    weights[output, np.minimum(pixel + 1, 7)] += part
    return weights


def _every_fifth_of_each_class(
    labels: Integer[np.ndarray, "n"],
) -> Bool[np.ndarray, "n"]:
    """True for the 5th, 10th, ... occurrence of each label."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[4::5]] = True
    return chosen
