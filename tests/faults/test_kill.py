"""Killed at any instant and started again, a run ends with the same bits."""

import pytest
from faults import moments, starts
from faults.compare import compare


def kill_and_finish(name, faults, whole, workdir, cold):
    """Kills start after start of a run; the one after them goes through."""
    args = starts.KINDS[name].args(workdir)
    for fault in faults:
        is_cold = fault["at"] == "compile" and fault["n"] % 2
        starts.kill(args, fault, cold() if is_cold else None)
    starts.finish(args)
    return compare(workdir, whole.workdir(name))


def names(faults) -> list[str]:
    return [moments.NAMES[fault["at"]] for fault in faults]


def test_a_few_kills(whole, tmp_path, tally, cold):
    """One of each that is rare, for every run of the tests."""
    faults = [
        {"at": "row", "n": 4, "cut": 30, "signal": "SIGKILL"},
        {"at": "file", "n": 77, "signal": "SIGKILL"},
        {"at": "final", "n": 3, "signal": "SIGKILL"},
    ]
    found = kill_and_finish("one run", faults, whole, tmp_path / "runs", cold)
    tally(names(faults), found)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_of_one_run(whole, tmp_path, tally, cold, seed):
    faults = moments.chain(seed, whole.counts("one run"), 21)
    found = kill_and_finish("one run", faults, whole, tmp_path / "runs", cold)
    tally(names(faults), found)


@pytest.mark.faults
@pytest.mark.parametrize("name", [k for k in starts.KINDS if k != "one run"])
def test_kills_of_other_runs(whole, tmp_path, tally, cold, name):
    faults = moments.chain(100, whole.counts(name), 8)
    found = kill_and_finish(name, faults, whole, tmp_path / "runs", cold)
    tally([f"SIGKILL in {name}"] * len(faults), found)
