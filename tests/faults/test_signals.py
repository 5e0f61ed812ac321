"""Asked to end, halted, started twice, left behind: a run ends with the same bits."""

import signal

import pytest
from faults import starts
from faults.compare import compare

ASKED = [
    {"at": "compile", "n": 15},
    {"at": "step", "n": 101},
    {"at": "rewire", "n": 9, "delay": 0.002},
    {"at": "save", "n": 4, "delay": 0.01},
    {"at": "file", "n": 300},
    {"at": "row", "n": 40},
    {"at": "final", "n": 2},
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", ASKED, ids=lambda f: f["at"])
def test_a_run_that_is_asked_to_end(whole, tmp_path, tally, fault):
    args = starts.RIGL.args(tmp_path / "runs")
    outcome = starts.end(args, fault | {"signal": "SIGTERM"})
    if fault["at"] == "final":  # nothing is left to be stopped
        assert outcome.status == 0
    else:
        assert outcome.status == 75, outcome
        assert "which is saved; the same command goes on from there" in outcome.stderr
        assert not list(tmp_path.rglob("DONE"))
        starts.finish(args)
    found = compare(tmp_path / "runs", whole.workdir("one run"), may_have_more=True)
    tally(["SIGTERM"], found, told=int(outcome.status == 75))


HALTED = {"step": 60, "save": 5, "row": 20, "file": 200}


@pytest.mark.faults
@pytest.mark.parametrize("at", HALTED)
def test_a_run_that_stands_still_and_goes_on(whole, tmp_path, tally, at):
    args = starts.RIGL.args(tmp_path / "runs")
    fault = {"at": at, "n": HALTED[at], "signal": "SIGSTOP"}
    with starts.started(args, fault) as process:
        starts.wait_until_it_stands_still(process)
        second = starts.end(args)
        starts.told_once(second, f"is being trained by process {process.pid} on")
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=starts.run_cli.TIMEOUT)
    assert process.returncode == 0, err
    found = compare(tmp_path / "runs", whole.workdir("one run"))
    tally(["SIGSTOP, a second start, SIGCONT"], found, told=1)


@pytest.mark.faults
@pytest.mark.parametrize("at", ["save", "row"])
def test_what_a_dead_process_left_is_taken_over(whole, tmp_path, tally, at):
    args = starts.RIGL.args(tmp_path / "runs")
    fault = {"at": at, "n": HALTED[at], "signal": "SIGSTOP"}
    with starts.started(args, fault) as process:
        starts.wait_until_it_stands_still(process)
        assert starts.end(args).status == 2
        process.kill()
        process.wait()
        assert len(list(tmp_path.rglob("lock"))) == 1
        starts.finish(args)
    assert process.returncode == -signal.SIGKILL
    found = compare(tmp_path / "runs", whole.workdir("one run"))
    tally(["lock of a dead process"], found)


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "at"), [(0, "save"), (1, "rewire"), (1, "step")])
def test_a_lost_process_of_two(whole, tmp_path, tally, victim, at):
    fault = {"at": at, "n": HALTED.get(at, 5), "signal": "SIGKILL"}
    faults = [starts.NONE, starts.NONE]
    faults[victim] = fault
    outcomes = starts.together(tmp_path / "runs", faults)
    assert outcomes[victim].status == -signal.SIGKILL, outcomes
    assert outcomes[1 - victim].status not in (0, None)
    assert not list(tmp_path.rglob("DONE"))
    for outcome in starts.together(tmp_path / "runs", [starts.NONE] * 2):
        assert outcome.status == 0, outcome.stderr
    found = compare(tmp_path / "runs", whole.workdir("two processes"))
    tally(["one of two processes lost"], found, told=1)
