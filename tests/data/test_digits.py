"""The digits: the split, the enlargement, and that they are worth learning."""

import zlib

import numpy as np
import pytest
import scipy.ndimage
from sklearn.datasets import load_digits

from lottery_flow.data import digits


@pytest.fixture(scope="module")
def source():
    return load_digits()


@pytest.fixture(scope="module")
def arrays():
    return digits.load("")


def test_every_fifth_image_of_each_class_is_for_testing(source, arrays):
    seen = dict.fromkeys(range(10), 0)
    train, test = [], []
    for label in source.target.tolist():
        seen[label] += 1
        (test if seen[label] % 5 == 0 else train).append(label)
    assert arrays.train_labels.tolist() == train
    assert arrays.test_labels.tolist() == test
    assert np.bincount(arrays.test_labels).min() == 34
    assert np.bincount(arrays.test_labels).max() == 36


def test_the_splits_are_the_whole_source(source, arrays):
    both = np.concatenate([arrays.train_images, arrays.test_images])
    enlarged = digits._enlarge(source.images.astype(np.int64))
    assert sorted(map(bytes, both)) == sorted(map(bytes, enlarged))


def test_the_enlargement_is_scipys_linear_zoom(source):
    exact = scipy.ndimage.zoom(
        source.images * (255 / 16),
        (1, 3.5, 3.5),
        order=1,
        mode="nearest",
        grid_mode=True,
    )
    enlarged = digits._enlarge(source.images.astype(np.int64))
    np.testing.assert_allclose(enlarged, exact, atol=0.5 + 1e-9)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (8, 128), (16, 255)])
def test_a_flat_image_stays_flat(value, expected):
    enlarged = digits._enlarge(np.full((1, 8, 8), value))
    assert (enlarged == expected).all()


def test_the_bits_are_the_same_everywhere(arrays):
    sums = [zlib.crc32(array.tobytes()) for array in arrays]
    assert sums == [790571723, 4274068449, 3878997323, 3450393484]


def test_the_nearest_class_mean_recognises_most_of_them(arrays):
    train = arrays.train_images.reshape(len(arrays.train_labels), -1) / 255
    test = arrays.test_images.reshape(len(arrays.test_labels), -1) / 255
    means = np.stack([train[arrays.train_labels == c].mean(0) for c in range(10)])
    distances = np.linalg.norm(test[:, None] - means, axis=-1)
    assert (distances.argmin(1) == arrays.test_labels).mean() > 0.85
