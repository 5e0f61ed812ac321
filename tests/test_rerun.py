"""A run once more, from what its directory says."""

import json
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, environment, recorded, runs, study
from lottery_flow.errors import UserError

FIELDS = {"model__widths": "(12,)", "train__figure": False, "train__seeds": "(3,4)"}
FIELDS |= {"train__population": "one_by_one"}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A run of two seeds; no test changes it."""
    workdir = tmp_path_factory.mktemp("rerun") / "runs"
    args = run_cli.flag_list("rigl_mlp:smoke", workdir, **FIELDS)
    assert run_cli.in_process(*args).status == 0
    return run_cli.run_directory(workdir, 4)


def rerun(directory: Path, workdir: Path, *args: str) -> run_cli.Outcome:
    own = f"--rerun={directory}", f"--workdir={workdir}"
    return run_cli.in_process(*own, *args)


def assert_equal_networks(a: Path, b: Path) -> None:
    mine, theirs = (checkpoint.restore_network(r / "checkpoints") for r in (a, b))
    assert mine[0] == theirs[0]
    for x, y in zip(*map(jax.tree.leaves, (mine[1], theirs[1])), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_rerun_has_the_same_bits(first, tmp_path):
    outcome = rerun(first, tmp_path / "again")
    assert outcome.status == 0, outcome.stderr
    line = outcome.stdout.splitlines()[0]
    assert line == f"{first} was trained in the same environment"
    again = run_cli.run_directory(tmp_path / "again", 4)
    assert again.parent.name == first.parent.name
    assert [p.name for p in again.parent.iterdir()] == ["seed_4"]
    assert_equal_networks(again, first)
    for name in "metrics.jsonl", "summary.txt", "DONE":
        assert (again / name).read_bytes() == (first / name).read_bytes()


def test_a_rerun_of_all_levels(tmp_path):
    fields = {"model__widths": "(12,)", "train__figure": False, "tickets__rounds": 1}
    fields |= {"sparsity__sparsity": 0.5}
    args = run_cli.flag_list("dense_mlp:smoke", tmp_path / "runs", **fields)
    assert run_cli.in_process(*args).status == 0
    root = run_cli.run_directory(tmp_path / "runs")
    for given, workdir in (root, "a"), (root / "level_1", "b"):
        refused = rerun(given, tmp_path / "runs")
        assert refused.status == 2
        assert "another --workdir" in refused.errors[0]
        assert rerun(given, tmp_path / workdir).status == 0
        again = run_cli.run_directory(tmp_path / workdir)
        for level in "level_0", "level_1":
            assert_equal_networks(again / level, root / level)


def test_it_is_not_trained_where_it_is(first):
    before = run_cli.snapshot(first.parents[1])
    outcome = rerun(first, first.parents[1])
    assert outcome.status == 2
    assert f"--workdir={first.parents[1]} is where that run is" in outcome.errors[0]
    assert run_cli.snapshot(first.parents[1]) == before


def test_a_configuration_beside_it_is_refused(first, tmp_path):
    args = run_cli.flag_list("rigl_mlp:smoke", tmp_path)
    outcome = run_cli.in_process(*args, f"--rerun={first}")
    assert outcome.status == 2
    assert f"--rerun={first} takes the conf" in outcome.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run(tmp_path):
    outcome = rerun(tmp_path / "none", tmp_path / "again")
    assert outcome.status == 2
    assert "give the seed_N directory of a run" in outcome.errors[0]
    for text in "[]", "{}", '{"name": "x"}', "rubbish":
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json cannot be read"):
            recorded.read(tmp_path)


def test_a_run_says_what_it_was_computed_with(first):
    found = json.loads((first / "config.json").read_text())["environment"]
    assert found == environment.describe()
    assert found["jax"] == jax.__version__
    assert found["device_count"] == jax.device_count()
    assert found["backend"] == "cpu"
    assert study.open_run(first).job.seed == 4


def test_another_environment_is_another_run_for_nobody(first, tmp_path):
    """It is told, is no part of the identity, and older runs have none."""
    copy = shutil.copytree(first, tmp_path / "runs" / first.parent.name / "seed_4")
    path = copy / "config.json"
    record = json.loads(path.read_text())
    there = record["environment"] | {"jax": "0.1", "device_kind": "abacus"}
    path.write_text(json.dumps(record | {"environment": there}))
    runs.check(runs.RunPaths(copy), record)
    args = run_cli.flag_list("rigl_mlp:smoke", tmp_path / "runs", **FIELDS)
    args = [a for a in args if "seeds" not in a]
    outcome = run_cli.in_process(*args, "--config.train.seeds=(4,)")
    assert "is finished; nothing to do" in outcome.stdout
    line = rerun(copy, tmp_path / "again").stdout.splitlines()[0]
    assert line == (
        f"{copy} was trained in another environment: jax 0.1 there and "
        f"{jax.__version__} here; device_kind abacus there and cpu here"
    )
    del record["environment"]
    path.write_text(json.dumps(record))
    runs.check(runs.RunPaths(copy), record | {"environment": there})
    line = rerun(copy, tmp_path / "again").stdout.splitlines()[0]
    assert line == f"{copy} does not say in which environment it was trained"


def test_the_commit_of_a_package(tmp_path):
    assert environment.commit(tmp_path) == ""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*args: str) -> str:
        own = "-c", "user.name=a", "-c", "user.email=a@b"
        command = ["git", "-C", str(tmp_path), *own, *args]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    assert environment.commit(package) == ""  # a package that git does not know
    git("add", ".")
    git("commit", "-m", "one")
    assert environment.commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = 1")
    assert environment.commit(package) == git("rev-parse", "HEAD") + "+"


def test_differences_in_one_line():
    there = {"jax": "1", "numpy": "2", "gone": "x"}
    here = {"numpy": "3", "jax": "1", "new": 4}
    assert environment.difference(there, here) == (
        "numpy 2 there and 3 here; new (unknown) there and 4 here; "
        "gone x there and (unknown) here"
    )
    assert environment.difference(here, here) == ""
