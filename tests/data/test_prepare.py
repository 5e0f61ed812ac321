"""Preparing data sets, up to the point where TFDS's builders take over."""

import importlib.util

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lottery_flow.data import prepare
from lottery_flow.errors import UserError

SPLITS = {
    "train": (np.zeros((2, 28, 28, 1), np.uint8), np.zeros(2, np.int32)),
    "test": (np.zeros((1, 28, 28, 1), np.uint8), np.zeros(1, np.int32)),
}


@pytest.fixture
def packages(monkeypatch):
    """The packages that can be imported, as `prepare` sees it."""
    found = {"tensorflow", "importlib_resources"}

    def find_spec(name):
        return name if name in found else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return found


@pytest.fixture
def calls(monkeypatch):
    """What TFDS's builder is asked to do; it does nothing."""
    calls = []
    monkeypatch.setattr(
        tfds.core.DatasetBuilder,
        "download_and_prepare",
        lambda self, **kwargs: calls.append((self, kwargs)),
    )
    return calls


@pytest.mark.parametrize("missing", ["tensorflow", "importlib_resources"])
def test_a_missing_package(missing, packages, calls, tmp_path):
    packages.remove(missing)
    with pytest.raises(UserError) as error:
        prepare.prepare("mnist", str(tmp_path))
    assert str(error.value) == (
        f"Preparing 'mnist' needs the package {missing}, which is not installed: run"
        " `pip install 'lottery_flow[prepare]'`."
    )
    assert not calls


def test_an_unknown_name_stops_before_the_first_download(
    packages, calls, tmp_path, capsys
):
    assert prepare.main(["mnist", "mnits", f"--data_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        "NAME must be one that TFDS knows, mnist, fashion_mnist, cifar10, cifar100,"
        " imagenet2012 or another, not 'mnits' (digits needs no preparing).\n"
    )
    assert not calls


def test_asks_tfds_for_array_record(
    packages, monkeypatch, tmp_path, write_tfds, capsys
):
    def download_and_prepare(self, *, download_dir, download_config, file_format):
        assert download_dir == str(tmp_path / "downloads")
        assert not download_config.try_download_gcs
        write_tfds(tmp_path, self.name, SPLITS, file_format.value)

    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare
    )
    assert prepare.main(["mnist", f"--data_dir={tmp_path}"]) == 0
    (folder,) = (tmp_path / "mnist").iterdir()
    assert capsys.readouterr().out == f"mnist: {folder}\n"
    assert tfds.data_source("mnist", split="train", data_dir=tmp_path, download=False)


def test_the_download_directory_can_be_chosen(packages, calls, tmp_path):
    with pytest.raises(UserError, match="holds no data set"):
        prepare.prepare("mnist", str(tmp_path), "elsewhere")
    ((_, kwargs),) = calls
    assert kwargs["download_dir"] == "elsewhere"


def test_a_data_set_that_is_there_is_left_alone(packages, calls, tmp_path, write_tfds):
    folder = write_tfds(tmp_path, "mnist", SPLITS)
    assert prepare.prepare("mnist", str(tmp_path)) == str(folder)
    assert not calls


def test_tfrecord_files_in_the_way(packages, calls, tmp_path, write_tfds):
    write_tfds(tmp_path, "mnist", SPLITS, file_format="tfrecord")
    with pytest.raises(UserError, match=f"--data_dir={tmp_path}/array_record`"):
        prepare.prepare("mnist", str(tmp_path))
    assert not calls


@pytest.mark.parametrize(
    "failure", [OSError("no network"), tfds.download.DownloadError("no network")]
)
def test_a_failed_download(failure, packages, monkeypatch, tmp_path, capsys):
    def download_and_prepare(self, **_):
        raise failure

    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare
    )
    assert prepare.main(["cifar10", f"--data_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"Preparing 'cifar10' in {tmp_path} failed (no network): mend this and run the"
        " same command again.\n"
    )
