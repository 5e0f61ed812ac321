"""A disk that takes no more: one sentence, nothing lost, and then the same bits."""

import os
import random
import subprocess
from pathlib import Path

import pytest
import run_cli
from faults import starts
from faults.compare import compare, runs

from lottery_flow import checkpoint, metrics


class Disk:
    """A file system in memory, of any size."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")

    def change(self, options: str) -> None:
        options = f"remount,{options}"
        subprocess.run(["mount", "-o", options, str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    found = Disk(tmp_path / "disk")
    yield found
    if os.path.ismount(found.path):
        subprocess.run(["umount", "--lazy", str(found.path)], check=True)


def rows_and_checkpoints(workdir: Path) -> tuple[int, set[str]]:
    """How many rows there are, and which checkpoints; all of them are sound."""
    n, names = 0, set()
    for name in runs(workdir):
        run = workdir / name
        n += len(metrics.read(run / "metrics.jsonl"))
        for step in checkpoint.steps_in(run / "checkpoints"):
            assert checkpoint.damage(run / "checkpoints", step) is None
            names.add(f"{name}/{step}")
    return n, names


def blocks(directory: Path) -> int:
    """Kilobytes that the files of a directory take."""
    found = [p.stat().st_size for p in directory.rglob("*") if p.is_file()]
    return sum(4 * -(-size // 4096) for size in found)


@pytest.mark.faults
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.75, 0.95])
def test_a_full_disk(whole, disk, tally, share):
    size = blocks(whole.workdir("one run"))
    disk.mount(f"size={round(share * size)}k")
    args = starts.RIGL.args(disk.path)
    starts.told_once(starts.end(args), "cannot write to", "No space left on device")
    before = rows_and_checkpoints(disk.path)
    # Started again it clears what was half written, and may come a bit further.
    starts.told_once(starts.end(args), "cannot write to", "No space left on device")
    after = rows_and_checkpoints(disk.path)
    assert before[1] <= after[1]
    disk.change(f"size={4 * size}k")
    starts.finish(args)
    tally(["full disk"], compare(disk.path, whole.workdir("one run")), told=1)


@pytest.mark.faults
@pytest.mark.parametrize("n", [20, 150])
def test_a_disk_that_is_read_only(whole, disk, tally, n):
    disk.mount("size=64m")
    args = starts.RIGL.args(disk.path)
    starts.kill(args, {"at": "step", "n": n, "signal": "SIGKILL"})
    disk.change("ro")
    before = run_cli.snapshot(disk.path)
    starts.told_once(starts.end(args), "cannot write to", "Read-only file system")
    assert run_cli.snapshot(disk.path) == before
    disk.change("rw")
    starts.finish(args)
    tally(["read-only disk"], compare(disk.path, whole.workdir("one run")), told=1)


ERRORS = "ENOSPC", "EROFS", "EDQUOT", "EIO"


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(8))
def test_no_file_can_be_changed_from_some_moment_on(whole, tmp_path, tally, seed):
    draw = random.Random(seed)
    n = draw.randint(1, whole.counts("one run")["file"])
    workdir, error = tmp_path / "runs", ERRORS[seed % len(ERRORS)]
    args = starts.RIGL.args(workdir)
    outcome = starts.end(args, {"at": "file", "n": n, "error": error})
    starts.told_once(outcome, "cannot write to")
    rows_and_checkpoints(workdir)
    starts.finish(args)
    tally(["no file can be changed"], compare(workdir, whole.workdir("one run")), 1)
