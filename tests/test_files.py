"""Files that are written whole or not at all."""

import errno
import os

import pytest

from lottery_flow import files


def names(directory):
    return [path.name for path in directory.iterdir()]


def test_writing_replaces_the_file_whole(tmp_path):
    path = tmp_path / "DONE"
    files.write(path, "one")
    files.write(path, b"two")
    assert path.read_text() == "two"
    assert names(tmp_path) == ["DONE"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / "DONE"
    files.write(path, "one")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, "two")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["DONE"]


def test_a_writer_that_stops_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.csv"
    files.write(path, "one")

    def write_half():
        with files.replacing(path) as temporary:
            temporary.write_text("half of someth")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "one"
    assert names(tmp_path) == ["x.csv"]


def test_what_an_earlier_crash_left_is_no_obstacle(tmp_path):
    path = tmp_path / "DONE"
    (tmp_path / ".partial-DONE").write_text("half of something that was longer")
    files.write(path, "one")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["DONE"]


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "cache"
    with files.replacing(path, "a") as a, files.replacing(path, "b") as b:
        a.write_text("one")
        b.write_text("two")
    assert path.read_text() == "one"  # the outer one ends last
    assert names(tmp_path) == ["cache"]


def test_the_content_is_on_the_disk_before_its_name_and_the_name_before_all_else(
    tmp_path, monkeypatch
):
    """Otherwise a loss of power leaves an empty file, or the old one."""
    path, done, sync, replace = tmp_path / "DONE", [], os.fsync, os.replace

    def watched_sync(descriptor):
        sync(descriptor)
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def watched_replace(*args):
        replace(*args)
        done.append("replaced")

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    files.write(path, "one")
    assert done == [str(tmp_path / ".partial-DONE"), "replaced", str(tmp_path)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_need_not_sync_directories(tmp_path, monkeypatch, number):
    sync = os.fsync

    def no_directories(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, "told")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", no_directories)
    if number == errno.EIO:
        with pytest.raises(OSError, match="told"):
            files.write(tmp_path / "DONE", "one")
    else:
        files.write(tmp_path / "DONE", "one")
    assert (tmp_path / "DONE").read_text() == "one"


def test_other_files_of_similar_names_are_left_alone(tmp_path):
    (tmp_path / ".env").write_text("mine")
    os.link(tmp_path / ".env", tmp_path / ".partial-env")  # left by a crash, say
    files.write(tmp_path / "env", "one")
    assert (tmp_path / ".env").read_text() == "mine"
    assert sorted(names(tmp_path)) == [".env", "env"]
