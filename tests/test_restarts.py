"""Where the members of a population go on, and what is on the disk then."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import run_cli
from populations import assert_same, leaves, started

from lottery_flow import checkpoint, metrics, restarts
from lottery_flow.train import train


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(("how", "chunk"), [("one_by_one", 1), ("together", 5)])
def test_a_population_resumes_where_its_slowest_member_was(tmp_path, how, chunk):
    fields = {"train__seeds": (0, 1), "sparsity__rule": "rigl"}
    fields |= {"train__population": how, "train__chunk_steps": chunk}
    fields |= {"train__checkpoint_every_steps": 3, "train__total_steps": 9}
    whole = train(started(tmp_path / "whole", **fields))
    cut = started(tmp_path / "cut", **fields)
    train([run._replace(job=run.job._replace(total_steps=6)) for run in cut])
    # As a kill leaves it, while the members save one after another.
    shutil.rmtree(cut[1].paths.checkpoints / "6")
    assert restarts.find(cut) == [([1, 0], 3, [[], []])]
    resumed = train(cut)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert_same(mine, theirs)
    for run in cut:
        assert checkpoint.steps_in(run.paths.checkpoints) == [0, 3, 6, 9]
        steps = [row["step"] for row in metrics.read(run.paths.metrics)]
        assert steps == sorted(set(steps))


def test_members_far_apart_go_on_each_from_where_it_is(tmp_path):
    fields = {"train__seeds": (0, 1), "train__checkpoint_every_steps": 3}
    fields |= {"eval__every_steps": 3, "train__total_steps": 9}
    whole = train(started(tmp_path / "whole", **fields))
    cut = started(tmp_path / "cut", **fields)
    train([cut[0]._replace(job=cut[0].job._replace(total_steps=6))])
    assert restarts.find(cut) == [([1], 0, [[]]), ([0], 6, [[]])]
    kept = (cut[0].paths.checkpoints / "6").stat().st_mtime_ns
    for mine, theirs in zip(train(cut), whole, strict=True):
        assert_same(mine, theirs)
    assert (cut[0].paths.checkpoints / "6").stat().st_mtime_ns == kept


def test_a_member_goes_on_alone_from_where_the_others_took_it(tmp_path):
    """Rolled back to the step of a slower one, a member loses rows and checkpoints
    alike, so that it can go on without that one."""
    fields = {"train__seeds": (0, 1), "sparsity__rule": "rigl"}
    whole = train(started(tmp_path / "whole", **fields))
    cut = started(tmp_path / "cut", **fields)
    ahead = cut[1]._replace(job=cut[1].job._replace(total_steps=6))
    train([ahead])
    both = [run._replace(job=run.job._replace(total_steps=2)) for run in cut]
    train(both)
    (resumed,) = train([cut[1]])
    assert [row["step"] for row in resumed.rows[-2:]] == [10, 12]
    for a, b in zip(leaves(resumed), leaves(whole[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [row["step"] for row in metrics.read(cut[1].paths.metrics)]
    assert set(steps) >= {row["step"] for row in whole[1].rows}


def test_two_checkpoints_are_kept_while_members_save_one_after_another(tmp_path):
    fields = {"train__seeds": (0, 1), "train__keep_checkpoints": 1}
    fields |= {"train__checkpoint_every_steps": 1, "train__total_steps": 3}
    cut = started(tmp_path, **fields)
    train(cut)
    for run in cut:
        assert checkpoint.steps_in(run.paths.checkpoints) == [0, 2, 3]


def test_a_half_deleted_checkpoint_is_none(tmp_path):
    (run,) = started(tmp_path)
    train([run])
    directory = run.paths.checkpoints
    (directory / "12").rename(directory / "12.deleted")
    shutil.rmtree(directory / "12.deleted" / "network")
    assert checkpoint.steps_in(directory) == [0, 6]
    checkpoint.forget_after(directory, 6)
    assert {p.name for p in directory.iterdir()} == {"0", "6"}


READ = """
import sys
from pathlib import Path
from lottery_flow import checkpoint
for directory in map(Path, sys.argv[1:]):
    step, network = checkpoint.restore_network(directory)
    print(step, network.params["fc1"]["kernel"].sum())
"""


def test_checkpoints_of_many_devices_are_read_on_one(tmp_path):
    fields = {"train__seeds": (0, 1, 2, 3), "train__population": "together"}
    fields |= {"train__total_steps": 2, "train__checkpoint_every_steps": 2}
    cut = started(tmp_path, train__member_devices=4, **fields)
    results = train(cut)
    environment = os.environ | {"XLA_FLAGS": ""}
    paths = [str(run.paths.checkpoints) for run in cut]
    found = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        **{"env": environment, "cwd": run_cli.ROOT},
        **{"capture_output": True, "text": True},
    )
    assert found.returncode == 0, found.stderr
    for line, result in zip(found.stdout.splitlines(), results, strict=True):
        step, total = line.split()
        assert step == "2"
        expected = np.asarray(result.state.params["fc1"]["kernel"]).sum()
        assert float(total) == pytest.approx(expected, rel=1e-5)
