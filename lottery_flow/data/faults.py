"""What is wrong with a data set in memory: the split, and the number of the image."""

import numpy as np

from lottery_flow.data.arrays import Arrays, Spec


def of_arrays(arrays: Arrays, spec: Spec) -> str | None:
    """What is wrong with data in memory, None if nothing is.

    Images have the spec's shape and number and are uint8, so that no pixel is out of
    range or not a number; there is a label for each of them, int32, of one of the
    classes.
    """
    for split, n, images, labels in (
        ("training", spec.n_train, arrays.train_images, arrays.train_labels),
        ("test", spec.n_test, arrays.test_images, arrays.test_labels),
    ):
        if len(images) != len(labels):
            return f"{len(images)} {split} images and {len(labels)} labels"
        shape = (n, *spec.image_shape)
        if (images.shape, images.dtype) != (shape, np.uint8):
            return (
                f"{split} images {images.dtype}{images.shape}, not uint8{shape}"
                f"{_not_finite(split, images)}"
            )
        if (labels.shape, labels.dtype) != ((n,), np.int32):
            return f"{split} labels {labels.dtype}{labels.shape}, not int32{(n,)}"
        wrong = np.flatnonzero((labels < 0) | (labels >= spec.n_classes))
        if wrong.size:
            i = wrong[0]
            return (
                f"{split} labels from {labels.min()} to {labels.max()}, not within 0 "
                f"to {spec.n_classes - 1}: the first is {labels[i]}, of {split} image "
                f"{i}"
            )
    return None


def _not_finite(split: str, images: np.ndarray) -> str:
    """The first image with a pixel that is no number."""
    if not np.issubdtype(images.dtype, np.floating):
        return ""
    wrong = ~np.isfinite(images.reshape(len(images), -1)).all(axis=1)
    if not wrong.any():
        return ""
    return (
        f": the first with a pixel that is not finite is {split} image {wrong.argmax()}"
    )
