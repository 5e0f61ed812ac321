"""What the faults are judged by notices what it is there for."""

import json
import shutil
from pathlib import Path

import pytest
from faults import moments, page
from faults.compare import compare, runs


def test_a_run_is_the_same_as_itself(few):
    assert compare(few, few) == (0, 0, [])


def flip_a_weight(run: Path) -> None:
    """A checkpoint that was written so, with the record of what it holds."""
    record = run / "checkpoints/120/record/metadata"
    found = json.loads(record.read_text())
    found["sha256"]["network/params/fc1/kernel"] = "0" * 64
    record.write_text(json.dumps(found))


def lose_a_row(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:7] + lines[8:]))


def double_a_row(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:8], *lines[7:]]))


def change_a_row(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace("0.05", "0.06", 1))


def other_last_arrays(run: Path) -> None:
    """Sound as such: those of another step."""
    shutil.rmtree(run / "checkpoints/240/network")
    shutil.copytree(run / "checkpoints/228/network", run / "checkpoints/240/network")


CHANGES = {
    flip_a_weight: (0, 0, "other arrays in the checkpoint of step 120"),
    lose_a_row: (1, 0, "metrics.jsonl is not the same"),
    double_a_row: (0, 1, "metrics.jsonl is not the same"),
    change_a_row: (0, 0, "metrics.jsonl is not the same"),
    other_last_arrays: (0, 0, "the checkpoint of step 240 is damaged"),
    lambda run: shutil.rmtree(run / "checkpoints/12"): (0, 0, "checkpoints of [0, 120"),
    lambda run: (run / "checkpoints/12.orbax-tmp").mkdir(): (0, 0, "are left"),
    lambda run: (run / ".partial-DONE").touch(): (0, 0, "its files are"),
    shutil.rmtree: (65, 0, "there are other runs"),
}


@pytest.fixture(scope="module")
def few(whole, tmp_path_factory) -> Path:
    """A run with few checkpoints, to be compared soon."""
    root = tmp_path_factory.mktemp("few") / "runs"
    workdir = shutil.copytree(whole.workdir("one run"), root)
    for path in workdir.glob("*/*/checkpoints/*"):
        if int(path.name) not in (0, 12, 120, 228, 240):
            shutil.rmtree(path)
    return workdir


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_difference_is_noticed(few, tmp_path, change):
    workdir = shutil.copytree(few, tmp_path / "runs")
    (name,) = runs(workdir)
    change(workdir / name)
    found, (lost, doubled, told) = compare(workdir, few), CHANGES[change]
    assert (found.lost, found.doubled) == (lost, doubled)
    assert any(told in difference for difference in found.differences)


def test_moments_are_drawn_by_a_seed_and_of_all_kinds():
    counts = dict.fromkeys(moments.NAMES, 100)
    chains = [moments.chain(seed, counts, 21) for seed in (0, 0, 1)]
    assert chains[0] == chains[1] != chains[2]
    assert {fault["at"] for fault in chains[0]} == set(moments.NAMES)
    assert all(len(chain) == 21 for chain in chains)


def test_the_page_adds_up():
    figures = [
        page.Figures("a", True, True, 0, 0),
        page.Figures("b", False, False, 2, 1),
        page.Figures("a", True, False, 0, 0),
    ]
    lines = page.text(figures, ["And more."], failed=1).splitlines()
    assert "| a | 2 | 2 | 1 | 0 | 0 |" in lines
    assert "| b | 1 | 0 | 0 | 2 | 1 |" in lines
    assert "| **all** | 3 | 2 | 1 | 2 | 1 |" in lines
    assert lines[-1] == "**1 tests failed.**"
