"""Damaged files: passed over or told in a sentence; never a start from nothing."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import run_cli
from faults import starts
from faults.compare import compare, runs

from lottery_flow import checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory) -> Path:
    """A run that was killed not far from its end; copied, never changed."""
    workdir = tmp_path_factory.mktemp("broken_off") / "runs"
    fault = {"at": "step", "n": 197, "signal": "SIGKILL"}
    starts.kill(starts.RIGL.args(workdir), fault)
    return workdir


@pytest.fixture
def run(broken_off, tmp_path) -> Path:
    """A copy of it."""
    workdir = shutil.copytree(broken_off, tmp_path / "runs")
    (name,) = runs(workdir)
    return workdir / name


def workdir_of(run: Path) -> Path:
    return run.parents[1]


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size or 1))


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


HOW = {"cut": cut, "flip": flip, "delete": delete}
NAMED = {
    "cut": "file of a checkpoint cut short",
    "flip": "bit of a checkpoint flipped",
    "delete": "file of a checkpoint deleted",
}


def spoil(run: Path, how: str, seed: int) -> None:
    """Damages one file of the newest checkpoint, or, the newest gone, of the next."""
    draw, steps = random.Random(seed), checkpoint.steps_in(run / "checkpoints")
    if seed % 2:
        record = run / f"checkpoints/{steps.pop()}/record/metadata"
        record.write_text("{}")
    files = [p for p in (run / f"checkpoints/{steps[-1]}").rglob("*") if p.is_file()]
    HOW[how](draw.choice(sorted(files, key=_drawn_alike)), draw)


def _drawn_alike(path: Path) -> tuple[str, int]:
    """Names of files are drawn by orbax anew in each run."""
    return str(path.parent), path.stat().st_size


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", HOW)
def test_files_of_a_checkpoint(whole, run, tally, how, seed):
    """Of the newest checkpoint, or of the two newest."""
    spoil(run, how, seed)
    args = starts.RIGL.args(workdir_of(run))
    if seed == 3:  # killed while it puts the damaged one aside
        starts.kill(args, {"at": "file", "n": 4, "signal": "SIGKILL"})
    outcome = starts.finish(args)
    assert "going on from the checkpoint of step" in outcome.stderr
    assert "starting over" not in outcome.stderr
    assert "Traceback" not in outcome.stderr
    told = int("going on from that of step" in outcome.stderr)
    found = compare(workdir_of(run), whole.workdir("one run"))
    tally([NAMED[how]], found, told)


def refused(args: list[str], run: Path, spoilt: Path, whole, *words: str):
    """It is told and nothing changes; with the file brought back the run goes on."""
    before = run_cli.snapshot(run)
    starts.told_once(starts.end(args), *words)
    after = run_cli.snapshot(run)
    assert {k: v for k, v in after.items() if k != "lock"} == {
        k: v for k, v in before.items() if k != "lock"
    }
    target = run / spoilt.name
    if spoilt.is_dir():
        shutil.rmtree(target)
        shutil.copytree(spoilt, target)
    else:
        shutil.copy(spoilt, target)
    starts.finish(args)
    return compare(workdir_of(run), whole.workdir("one run"))


def test_all_checkpoints(whole, run, broken_off, tally):
    for record in run.glob("checkpoints/*/record/metadata"):
        record.write_text("{}")
    args, own = starts.RIGL.args(workdir_of(run)), run.relative_to(workdir_of(run))
    spoilt = broken_off / own / "checkpoints"
    found = refused(args, run, spoilt, whole, "no undamaged checkpoint", "from a copy")
    tally(["all checkpoints damaged"], found, told=1)


ROWS = {
    "cut": (lambda b: b[: len(b) // 2], "has no row of step"),
    "deleted": (lambda b: b"", "has no row of step 0"),
    "line": (lambda b: b.replace(b"\n", b" ", 5), "is damaged in line 1"),
    "bit": (lambda b: b[:900] + bytes([b[900] ^ 128]) + b[901:], "is damaged in line"),
    "twice": (lambda b: b[: b.index(b"\n") + 1] + b, "has rows twice"),
}


@pytest.mark.parametrize("how", ROWS)
def test_rows(whole, run, broken_off, tally, how):
    spoil_, told = ROWS[how]
    path = run / "metrics.jsonl"
    path.write_bytes(spoil_(path.read_bytes()))
    args, own = starts.RIGL.args(workdir_of(run)), path.relative_to(workdir_of(run))
    found = refused(args, run, broken_off / own, whole, told)
    tally(["rows of metrics damaged"], found, told=1)


def test_config(whole, run, broken_off, tally):
    path = run / "config.json"
    path.write_bytes(path.read_bytes()[:200])
    args, own = starts.RIGL.args(workdir_of(run)), path.relative_to(workdir_of(run))
    found = refused(args, run, broken_off / own, whole, "not a readable configuration")
    tally(["config.json cut short"], found, told=1)


OLDER = {
    "fewer fields": lambda r: {
        k: v for k, v in r.items() if not k.startswith(("tickets", "train.on", "loss"))
    },
    "no environment": lambda r: {k: v for k, v in r.items() if k != "environment"},
    "another field": lambda r: r | {"train.of_another_version": 0},
}


@pytest.mark.parametrize("how", OLDER)
def test_a_run_of_another_version(whole, run, tally, how):
    """It goes on where it is."""
    path = run / "config.json"
    record = json.loads(path.read_text())
    changed = OLDER[how](record)
    assert changed != record
    path.write_text(json.dumps(changed))
    outcome = starts.finish(starts.RIGL.args(workdir_of(run)))
    assert "going on from the checkpoint of step" in outcome.stderr
    assert json.loads(path.read_text()) == changed
    found = compare(workdir_of(run), whole.workdir("one run"))
    tally(["config.json of another version"], found)


def test_times_of_files_in_the_future(whole, run, tally):
    draw = random.Random(0)
    for path in sorted(run.rglob("*")):
        os.utime(path, times=(draw.uniform(0, 4e9), draw.uniform(0, 4e9)))
    starts.finish(starts.RIGL.args(workdir_of(run)))
    tally(["clock jumps"], compare(workdir_of(run), whole.workdir("one run")))


@pytest.mark.parametrize("clock", ["backwards", "leaps"])
def test_a_clock_that_jumps(whole, tmp_path, tally, clock):
    """Of the checkpoints the right ones are kept."""
    name = "three checkpoints kept"
    args = starts.KINDS[name].args(tmp_path / "runs")
    fault = {"at": "save", "n": 9, "signal": "SIGKILL"}
    starts.kill(args, fault | {"clock": clock})
    outcome = starts.end(args, {"clock": clock})
    assert outcome.status == 0, outcome.stderr
    tally(["clock jumps"], compare(tmp_path / "runs", whole.workdir(name)))
