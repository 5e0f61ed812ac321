"""Two processes never train one run; what a killed one left is no obstacle."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import run_cli
from populations import started

from lottery_flow import lock
from lottery_flow.errors import UserError
from lottery_flow.train import train

HOLD = """
import sys, time
from pathlib import Path
from lottery_flow import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `run`."""
    args = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(args, cwd=run_cli.ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_another_process_is_refused_until_the_holder_dies(tmp_path, holder):
    run = tmp_path / "run"
    told = (
        rf"{run} is being trained by process {holder.pid} on {socket.gethostname()}, "
        rf"which holds {run}/lock; .*--workdir"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=told), lock.hold(run):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / "lock").exists()
    with lock.hold(run):
        found = json.loads((run / "lock").read_text())
        assert found == {"host": socket.gethostname(), "pid": os.getpid()}
    assert list(run.iterdir()) == []


def test_the_second_start_of_a_run_changes_nothing(tmp_path, holder):
    members = started(tmp_path, train__seeds=(0, 1))
    members[1].paths.root.symlink_to(tmp_path / "run")
    before = run_cli.snapshot(tmp_path)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(UserError, match=rf"run_1 .*process {holder.pid}"),
    ):
        train(members)
    assert run_cli.snapshot(tmp_path) == before


def test_a_run_is_held_while_it_is_trained_and_written(tmp_path):
    (run,) = started(tmp_path, train__total_steps=1)
    seen = []

    def on_done(own, result):
        with (
            pytest.raises(UserError, match="run_0 is being"),
            lock.hold(own.paths.root),
        ):
            pass
        seen.append(own)

    with jax.numpy_dtype_promotion("standard"):
        train([run], on_done=on_done)
    assert seen == [run]
    names = {p.name for p in run.paths.root.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoints"}


def test_an_empty_directory_goes_with_its_lock(tmp_path):
    (tmp_path / "there").mkdir()
    with lock.hold(tmp_path / "there" / "a" / "b"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    with lock.hold(tmp_path / "there" / "a" / "b"):
        (tmp_path / "there" / "a" / "file").write_text("mine")
    assert (tmp_path / "there" / "a" / "file").read_text() == "mine"
    assert not (tmp_path / "there" / "a" / "b").exists()


def test_a_file_that_its_holder_deleted_meanwhile_locks_nothing(tmp_path, monkeypatch):
    """Between our opening it and our locking it."""
    flock, files = fcntl.flock, []

    def late(file, operation):
        if not files:
            shutil.rmtree(tmp_path / "run")
        files.append(file)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.hold(tmp_path / "run"):
        assert len(files) == 2
        with pytest.raises(UserError), lock.hold(tmp_path / "run"):
            pass


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UserError, match=r"--workdir: cannot write to .*file/run"),
        lock.hold(tmp_path / "file" / "run"),
    ):
        pass


@pytest.fixture
def _no_locks(monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize(
    ("host", "pid", "lives"),
    [
        (socket.gethostname(), os.getppid(), True),
        (socket.gethostname(), 2**22 + 1, False),  # above all process ids
        ("elsewhere", 2**22 + 1, True),
    ],
)
def test_a_file_system_without_locks(tmp_path, caplog, host, pid, lives):
    (tmp_path / "lock").write_text(json.dumps({"host": host, "pid": pid}))
    if lives:
        with (
            pytest.raises(UserError, match=f"process {pid} on {host}"),
            lock.hold(tmp_path),
        ):
            pass
        assert (tmp_path / "lock").exists()
        return
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "has no locks" in caplog.text


def test_a_second_command_is_told_in_one_sentence(tmp_path):
    fields = {"model__widths": "(9,)", "train__total_steps": 10**6}
    fields |= {"train__checkpoint_every_steps": 10**6, "train__figure": False}
    args = run_cli.flag_list("dense_mlp:smoke", tmp_path, **fields)
    with run_cli.process(*args, stderr=subprocess.DEVNULL) as first:
        end = time.monotonic() + run_cli.TIMEOUT
        while not list(Path(tmp_path).glob("*/seed_0/checkpoints/0")):
            assert first.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        outcome = run_cli.in_process(*args)
        assert outcome.status == 2
        (told,) = outcome.errors
        assert f"is being trained by process {first.pid} on" in told
    assert run_cli.run_directory(tmp_path).joinpath("lock").exists()
    with lock.hold(run_cli.run_directory(tmp_path)):
        pass
