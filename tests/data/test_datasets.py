"""Every spec against its arrays; real data where LOTTERY_FLOW_TEST_DATA has them.

That environment variable names a directory written by `lottery_flow.data.prepare`.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from lottery_flow.data import DATASETS

REAL = os.environ.get("LOTTERY_FLOW_TEST_DATA", "")


def load(name):
    if name != "digits" and not (REAL and Path(REAL, name).is_dir()):
        pytest.skip(f"no {name} in LOTTERY_FLOW_TEST_DATA={REAL!r}")
    return DATASETS[name].load(REAL)


def test_names():
    assert list(DATASETS) == ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"]
    for name, source in DATASETS.items():
        assert source.spec.name == name
        assert len(source.spec.mean) == source.spec.image_shape[-1]
        assert len(source.spec.std) == source.spec.image_shape[-1]


@pytest.mark.parametrize("name", DATASETS)
def test_the_spec_tells_what_is_loaded(name):
    spec, arrays = DATASETS[name].spec, load(name)
    assert arrays.train_images.shape == (spec.n_train, *spec.image_shape)
    assert arrays.test_images.shape == (spec.n_test, *spec.image_shape)
    assert arrays.train_labels.shape == (spec.n_train,)
    assert arrays.test_labels.shape == (spec.n_test,)
    assert arrays.train_images.dtype == arrays.test_images.dtype == np.uint8
    assert arrays.train_labels.dtype == arrays.test_labels.dtype == np.int32
    assert arrays.train_images.min() == 0
    assert arrays.train_images.max() == 255
    classes = np.arange(spec.n_classes)
    np.testing.assert_array_equal(np.unique(arrays.train_labels), classes)
    np.testing.assert_array_equal(np.unique(arrays.test_labels), classes)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_mean_and_std_are_those_of_the_training_pixels(name):
    spec, arrays = DATASETS[name].spec, load(name)
    mean = [arrays.train_images[..., c].mean() / 255 for c in range(3)]
    std = [arrays.train_images[..., c].std() / 255 for c in range(3)]
    np.testing.assert_allclose(spec.mean, mean, atol=1e-4)
    np.testing.assert_allclose(spec.std, std, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "first_labels"),
    [
        ("mnist", [4, 1, 0, 7, 8, 1, 2, 7]),
        ("fashion_mnist", [2, 1, 8, 4, 1, 9, 2, 2]),
        ("cifar10", [7, 8, 4, 4, 6, 5, 2, 9]),
    ],
)
def test_the_order_is_that_of_tfds(name, first_labels):
    assert load(name).train_labels[:8].tolist() == first_labels
