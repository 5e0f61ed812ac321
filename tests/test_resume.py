"""Killed at any instant and started again, a run ends with the same bits."""

import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import run_cli

FIELDS = {
    "model__widths": "(24,12)",
    "optim__weight_decay": 1e-4,
    "train__total_steps": 240,
    "train__log_every_steps": 5,
    "train__checkpoint_every_steps": 12,
    "train__figure": False,
    "eval__every_steps": 20,
}


def command(workdir: Path, source: Path) -> list[str]:
    fields = FIELDS | {"sparsity__masks_from": source}
    return run_cli.flag_list("rigl_mlp:smoke", workdir, **fields)


def complete(run: Path) -> set[int]:
    """Steps whose checkpoint is complete."""
    return {int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()}


def half_written(run: Path) -> list[Path]:
    """Temporary directories of checkpoints after step 0."""
    return [
        p
        for p in run.glob("checkpoints/*")
        if re.match(r"[1-9]\d*\.orbax-checkpoint-tmp", p.name)
    ]


def start_and_kill(args: list[str], moment: Callable[[], bool], delay: float) -> None:
    """Starts the run and sends SIGKILL as soon as `moment()`, plus a delay."""
    with run_cli.process(*args, stderr=subprocess.DEVNULL) as started:
        limit = time.monotonic() + run_cli.TIMEOUT
        while not moment():
            assert started.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < limit, "the moment to kill never came"
            time.sleep(1e-4)
        time.sleep(delay)
    assert started.returncode == -9, "the run ended before it could be killed"


class Victim:
    """A run that is killed at chosen moments."""

    def __init__(self, workdir: Path, source: Path):
        self.args = command(workdir, source)
        self.workdir = workdir

    @property
    def run(self) -> Path:
        return next(self.workdir.glob("*/seed_0"), self.workdir / "none")

    def kill_before_the_first_checkpoint(self) -> None:
        start_and_kill(self.args, lambda: _size(self.run / "metrics.jsonl") > 0, 0.0)

    def kill_during_a_checkpoint(self) -> None:
        for _ in range(5):
            start_and_kill(self.args, lambda: bool(half_written(self.run)), 0.0)
            if half_written(self.run):
                return
        pytest.fail("no kill came while a checkpoint was written")

    def kill_after_a_checkpoint(self, delay: float = 0.0) -> None:
        before = complete(self.run)
        start_and_kill(self.args, lambda: bool(complete(self.run) - before), delay)

    def tear_the_last_line(self) -> None:
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write('{"step": 23')


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def finish(args: list[str]) -> run_cli.Outcome:
    outcome = run_cli.subprocess_run(*args)
    assert outcome.status == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(uninterrupted run, killed and resumed run, command line of the second)."""
    root = tmp_path_factory.mktemp("resume")
    fields = {"model__widths": "(24,12)", "train__figure": False}
    pruned = run_cli.flag_list("scratch_mlp:smoke", root / "pruned", **fields)
    assert run_cli.in_process(*pruned).status == 0
    source = run_cli.run_directory(root / "pruned")
    # Processes of their own have the bits of this one.
    assert run_cli.in_process(*command(root / "whole", source)).status == 0

    victim = Victim(root / "killed", source)
    victim.kill_before_the_first_checkpoint()
    victim.kill_during_a_checkpoint()
    shutil.rmtree(root / "pruned")  # resuming needs only the run's own directory
    victim.tear_the_last_line()
    victim.kill_after_a_checkpoint()
    for delay in random.Random(0).choices(np.linspace(0.0, 0.3, 100), k=2):
        victim.kill_after_a_checkpoint(float(delay))
    assert not (victim.run / "DONE").exists()
    finish(victim.args)
    return run_cli.run_directory(root / "whole"), victim.run, victim.args


def raw(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, keys as their bits."""
    found = {}
    for item in ("network", "training"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(run / "checkpoints" / str(step) / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def test_the_same_checkpoints_are_kept(runs):
    whole, killed, _ = runs
    assert complete(whole) == complete(killed) == set(range(0, 241, 12))


@pytest.mark.parametrize("step", [0, 12, 24, 48, 120, 240])
def test_every_array_has_the_same_bits(runs, step):
    whole, killed, _ = runs
    expected, found = raw(whole, step), raw(killed, step)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def test_a_checkpoint_holds_all_that_a_run_needs(runs):
    names = raw(runs[0], 240)
    parts = ("'params'", "'masks'", "step", "key", "inner_state")
    assert all(any(part in name for name in names) for part in parts)
    steps = [v for k, v in names.items() if v.shape == () and "step" in k]
    assert steps
    assert all(step == 240 for step in steps)


def test_masks_changed_in_between(runs):
    first, last = raw(runs[0], 0), raw(runs[0], 240)
    masks = [name for name in first if "'masks'" in name]
    assert len(masks) == 3
    assert any((first[name] != last[name]).any() for name in masks)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.txt", "DONE"])
def test_files_are_the_same_byte_for_byte(runs, name):
    whole, killed, _ = runs
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_nothing_half_written_is_left(runs):
    names = {p.name for p in runs[1].iterdir()}
    wanted = {"config.json", "metrics.jsonl", "checkpoints", "summary.txt", "DONE"}
    assert names == wanted
    assert all(p.name.isdigit() for p in (runs[1] / "checkpoints").iterdir())


def test_a_finished_run_returns_at_once_and_touches_nothing(runs):
    _, killed, args = runs
    before = run_cli.snapshot(killed)
    outcome = run_cli.in_process(*args)
    assert outcome.status == 0
    assert "is finished" in outcome.stdout
    assert (killed / "summary.txt").read_text() in outcome.stdout
    assert run_cli.snapshot(killed) == before
