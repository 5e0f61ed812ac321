"""A record of a split, decoded; or what is wrong with it, by its file or its number."""

import operator
from typing import Any

from PIL import Image

from lottery_flow.data.images import Images, decode
from lottery_flow.errors import UserError


def read(dataset: Images, split: str, i: int) -> tuple[Image.Image, int]:
    """An image, decoded, and its label.

    Args:
      dataset: where from.
      split: "train" or "test".
      i: which record.

    Raises:
      UserError: the record cannot be read, is no image, or has a label of no class.
    """
    records = dataset.train if split == "train" else dataset.test
    try:
        record = records[i]
        image = decode(record["image"])
        label = operator.index(record["label"])
    except Exception as error:  # the ways a damaged file can fail are too many to list
        fault = f"cannot be read ({_reason(error)})"
        raise _unusable(dataset, split, i, fault) from None
    n_classes = dataset.spec.n_classes
    if not 0 <= label < n_classes:
        fault = f"has the label {label}, not one from 0 to {n_classes - 1}"
        raise _unusable(dataset, split, i, fault)
    return image, label


def _unusable(dataset: Images, split: str, i: int, fault: str) -> UserError:
    records: Any = dataset.train if split == "train" else dataset.test
    called = {"train": "training", "test": "test"}[split]
    place = f"{called} image {i} of {dataset.spec.name}"
    if hasattr(records, "path"):
        place = f"{records.path(i)} ({place})"
    return UserError(
        f"data.name: {place} {fault}; mend it, or take it out of the data set"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
