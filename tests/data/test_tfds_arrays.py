"""Reading prepared TFDS data: real ArrayRecord files, only tiny."""

import importlib
import json
import logging
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lottery_flow.data import DATASETS, tfds_arrays
from lottery_flow.errors import UserError


def tiny(name="mnist", n_train=5, n_test=3):
    """The spec of a small data set, and random splits that agree with it."""
    spec = DATASETS[name].spec._replace(n_train=n_train, n_test=n_test)
    rng = np.random.default_rng(0)
    splits = {
        split: (
            rng.integers(0, 256, (n, *spec.image_shape), np.uint8),
            rng.integers(0, spec.n_classes, n).astype(np.int32),
        )
        for split, n in (("train", n_train), ("test", n_test))
    }
    return spec, splits


def assert_read(arrays, splits):
    for got, expected in zip(arrays, [*splits["train"], *splits["test"]], strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def cache_of(directory):
    (path,) = (directory / ".lottery_flow").iterdir()
    return path


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_reads_in_dataset_order_without_tensorflow(
    name, tmp_path, write_tfds, monkeypatch, caplog
):
    spec, splits = tiny(name, n_train=1203)  # more than one block
    folder = write_tfds(tmp_path, name, splits)
    # TFDS asks once for each type whether it is of TensorFlow, and would take the entry
    # below for the module.
    tfds = importlib.import_module("tensorflow_datasets")
    tfds.builder(name, data_dir=str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)
    assert cache_of(tmp_path).name == f"{name}-{folder.name}.npz"
    assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_default_directory_is_that_of_tfds(tmp_path, write_tfds, monkeypatch):
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", splits)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert_read(tfds_arrays.load(spec), splits)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", "/somewhere")
    assert tfds_arrays.data_directory("") == "/somewhere/tensorflow_datasets"
    assert tfds_arrays.data_directory("~/data") == "/somewhere/data"


def test_a_missing_data_set_is_told_in_one_sentence(tmp_path, caplog):
    directory = tmp_path / "my data"
    with pytest.raises(UserError) as error:
        DATASETS["mnist"].load(str(directory))
    assert str(error.value) == (
        f"Data set 'mnist' was not found in {directory}: run `pip install"
        " 'lottery_flow[prepare]' && python -m lottery_flow.data.prepare mnist"
        f" --data_dir='{directory}'`, or set --config.data.dir to the directory that"
        " has it."
    )
    assert not caplog.records or max(r.levelno for r in caplog.records) < 30
    assert not directory.exists()


def test_tfrecord_files_are_told_from_missing_ones(tmp_path, write_tfds):
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", splits, file_format="tfrecord")
    with pytest.raises(UserError, match=r"prepared as tfrecord, not") as error:
        tfds_arrays.load(spec, str(tmp_path))
    assert f"prepare mnist --data_dir={tmp_path}/array_record`" in str(error.value)
    assert f"--config.data.dir={tmp_path}/array_record." in str(error.value)


def test_missing_and_damaged_record_files(tmp_path, write_tfds):
    spec, splits = tiny()
    folder = write_tfds(tmp_path, "mnist", splits)
    (record,) = folder.glob("*-test.*")
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(UserError, match=r"'mnist'.*cannot be read .* delete this"):
        tfds_arrays.load(spec, str(tmp_path))
    record.unlink()
    with pytest.raises(UserError, match=r"'mnist'.*cannot be read .* delete this"):
        tfds_arrays.load(spec, str(tmp_path))


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("{'train': 5, 'test': 3} images, not", lambda spec: spec._replace(n_test=4)),
        ("labels from", lambda spec: spec._replace(n_classes=2)),
        (
            r"uint8\(5, 28, 28, 1\), not uint8\(5, 28, 28, 3\)",
            lambda spec: spec._replace(image_shape=(28, 28, 3)),
        ),
    ],
)
def test_other_data_than_the_spec_tells(fault, change, tmp_path, write_tfds):
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", splits)
    with pytest.raises(UserError, match=f"Data set 'mnist' in .* has .*{fault}"):
        tfds_arrays.load(change(spec), str(tmp_path))
    assert not (tmp_path / ".lottery_flow").exists()


def test_a_split_that_is_missing(tmp_path, write_tfds):
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", {"train": splits["train"]})
    with pytest.raises(UserError, match=r"has \{'train': 5\} images, not"):
        tfds_arrays.load(spec, str(tmp_path))


def test_the_cache_is_used(tmp_path, write_tfds):
    spec, splits = tiny()
    folder = write_tfds(tmp_path, "mnist", splits)
    tfds_arrays.load(spec, str(tmp_path))
    for record in folder.glob("*.array_record-*"):
        record.unlink()
    assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)


def test_the_cache_of_data_prepared_anew_is_rewritten(tmp_path, write_tfds, caplog):
    spec, splits = tiny()
    folder = write_tfds(tmp_path, "mnist", splits)
    tfds_arrays.load(spec, str(tmp_path))
    folder.rename(tmp_path / "old")
    splits["train"] = (255 - splits["train"][0], splits["train"][1])
    folder = write_tfds(tmp_path, "mnist", splits)
    info = folder / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"downloadSize": "1"}))
    for _ in range(2):
        assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)
    assert "damaged" not in caplog.text


def test_a_damaged_cache_is_rewritten_with_a_warning(tmp_path, write_tfds, caplog):
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", splits)
    tfds_arrays.load(spec, str(tmp_path))
    cache = cache_of(tmp_path)
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)
    assert f"Ignoring the damaged cache {cache}" in caplog.text
    assert cache_of(tmp_path).stat().st_size == len(whole)


@given(start=st.floats(0, 1, exclude_max=True), garbage=st.binary(min_size=1))
@example(start=0.0, garbage=b"")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_to_the_cache_gets_through(start, garbage, tmp_path, write_tfds):
    spec, splits = tiny()
    if not (tmp_path / "mnist").exists():
        write_tfds(tmp_path, "mnist", splits)
        tfds_arrays.load(spec, str(tmp_path))
    cache = cache_of(tmp_path)
    content = bytearray(cache.read_bytes())
    offset = int(start * len(content))
    content[offset : offset + len(garbage)] = garbage
    cache.write_bytes(content if garbage else b"")
    assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)


def test_a_cache_of_other_contents_is_rewritten(tmp_path, write_tfds, caplog):
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", splits)
    arrays = tfds_arrays.load(spec, str(tmp_path))
    cache = cache_of(tmp_path)
    with np.load(cache) as file:
        content = dict(file)
    np.savez(cache, **content | {"test_labels": arrays.test_labels + 10})
    assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)
    assert "not within 0 to 9" in caplog.text


def test_goes_without_a_cache_where_none_can_be_written(tmp_path, write_tfds, caplog):
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", splits)
    (tmp_path / ".lottery_flow").write_text("in the way")
    with caplog.at_level(logging.INFO, "lottery_flow"):
        assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)
    assert "Going without the cache" in caplog.text
    assert not caplog.records or max(r.levelno for r in caplog.records) < 40


def test_a_failed_write_leaves_nothing_behind(tmp_path, write_tfds, monkeypatch):
    def full(path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    spec, splits = tiny()
    write_tfds(tmp_path, "mnist", splits)
    assert_read(tfds_arrays.load(spec, str(tmp_path)), splits)
    assert list((tmp_path / ".lottery_flow").iterdir()) == []


def test_a_remote_directory_has_no_cache():
    assert tfds_arrays._cache_path("gs://bucket/data", "mnist-3.0.1.npz") is None
