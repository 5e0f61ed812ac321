"""Work over the cores: all of it is done, and failures are told at the end."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from experiments import pool
from lottery_flow import stopping
from lottery_flow.errors import UserError


def touch(name: str, folder: Path) -> None:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    (folder / name).write_text(f"{os.getpid()} {cores}")
    if name.startswith("bad"):
        raise UserError("it is bad")


@pytest.mark.parametrize("jobs", [1, 2])
def test_everything_is_done_before_a_failure_is_told(tmp_path, jobs):
    names = ["a", "bad", "b", "c"]
    work = functools.partial(touch, folder=tmp_path)
    with pytest.raises(UserError, match=r"1 failed.*item bad"):
        pool.run(
            work,
            names,
            jobs=jobs,
            programs=tmp_path / "programs",
            label=lambda name: f"item {name}",
        )
    written = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert sorted(written) == sorted(names)
    mine = str(os.getpid())
    processes = {process for process, _ in written.values()}
    if jobs == 1:
        assert processes == {mine}
    else:
        assert mine not in processes
        cores = {cores for _, cores in written.values()}
        assert len(cores) == min(2, len(os.sched_getaffinity(0)))


def test_nothing_to_do_is_nothing_done(tmp_path):
    pool.run(print, [], jobs=2, programs=tmp_path, label=str)


def linger(name: str, folder: Path) -> None:
    with stopping.watch() as asked:
        (folder / f"{name}_began").touch()
        while not (folder / "a_began").exists() or not (folder / "b_began").exists():
            time.sleep(0.01)
        if name == "a":
            os.kill(os.getppid(), signal.SIGTERM)
        while not asked():
            time.sleep(0.01)
        (folder / f"{name}_saved").touch()
        raise stopping.Stopped("stopped")


def test_all_save_when_asked_to_end(tmp_path):
    work = functools.partial(linger, folder=tmp_path)
    options = {"programs": tmp_path / "programs", "label": str}
    with pytest.raises(stopping.Stopped, match="1 wait"):
        pool.run(work, ["a", "b", "c"], jobs=2, **options)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"a_began", "b_began", "a_saved", "b_saved"}
