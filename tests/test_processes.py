"""Many real processes on one machine: they train what one does, stop and go on."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, metrics, parallel

AGAIN = 75
LOST_WITHIN = 60.0  # seconds


@contextlib.contextmanager
def processes(
    n: int, n_devices: int, workdir: Path, config: str, **fields: object
) -> Iterator[list[subprocess.Popen]]:
    """The program as `n` processes of `n_devices` each; output in files beside."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args = run_cli.flag_list(config, workdir, **fields)
    args += [f"--coordinator=localhost:{port}", f"--n_processes={n}"]
    with contextlib.ExitStack() as stack:
        found = []
        for i in range(n):
            log = stack.enter_context(open(log_of(workdir, i), "w"))
            own = run_cli.process(
                *args, f"--process={i}", n_devices=n_devices, stdout=log, stderr=log
            )
            found.append(stack.enter_context(own))
        yield found


def log_of(workdir: Path, i: int) -> Path:
    return workdir.with_name(f"{workdir.name}_process_{i}.log")


def wait(started: list[subprocess.Popen], workdir: Path, seconds: float) -> list[int]:
    """The exit statuses; shows the logs of processes that do not end."""
    end = time.monotonic() + seconds
    try:
        return [p.wait(max(0.1, end - time.monotonic())) for p in started]
    except subprocess.TimeoutExpired:
        logs = [log_of(workdir, i).read_text() for i in range(len(started))]
        pytest.fail("a process did not end:\n" + "\n---\n".join(logs))


def network(workdir: Path, seed: int = 0) -> checkpoint.Network:
    directory = run_cli.run_directory(workdir, seed)
    return checkpoint.restore_network(directory / "checkpoints")[1]


FIELDS = {"model__name": "mlp", "model__widths": "(64,)", "train__figure": False}
MEMBERS = {"train__seeds": "(0,1)", "train__population": "together"}
SYNTHETIC = {"data__name": "synthetic", "data__image_size": 8, "eval__batch_size": 500}


@pytest.mark.parametrize(
    ("n", "n_devices", "fields"),
    [
        (2, 2, {**SYNTHETIC, "train__model_devices": 2}),
        (2, 1, {**SYNTHETIC, "train__model_devices": 2}),
        (4, 1, MEMBERS | {"train__member_devices": 2, "train__data_devices": 2}),
    ],
    ids=[
        "images_are_decoded_by_two",
        "state_is_cut_between_two",
        "four_have_two_members",
    ],
)
def test_processes_train_what_one_does(tmp_path, n, n_devices, fields):
    fields = FIELDS | fields
    together, one = tmp_path / "together", tmp_path / "one"
    with processes(n, n_devices, together, "rigl_lenet5:smoke", **fields) as started:
        assert wait(started, together, run_cli.TIMEOUT) == [0] * n
    alone = fields | {f"train__{axis}_devices": 1 for axis in parallel.AXES}
    done = run_cli.in_process(*run_cli.flag_list("rigl_lenet5:smoke", one, **alone))
    assert done.status == 0
    for seed in range(2 if "train__seeds" in fields else 1):
        mine, theirs = network(together, seed), network(one, seed)
        for a, b in zip(*map(jax.tree.leaves, (mine.masks, theirs.masks)), strict=True):
            np.testing.assert_array_equal(a, b)
        found, expected = (jax.tree.leaves(v.params) for v in (mine, theirs))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
        rows = [
            metrics.read(run_cli.run_directory(w, seed) / "metrics.jsonl")
            for w in (together, one)
        ]
        for a, b in zip(*rows, strict=True):
            none = {k for k, v in b.items() if v is None}
            assert none == {k for k, v in a.items() if v is None}
            found, expected = ({k: r[k] for k in r.keys() - none} for r in (a, b))
            assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)
    # What is written once is written by one.
    assert "gradient norm" in log_of(together, 0).read_text()
    assert "gradient norm" not in log_of(together, 1).read_text()


# Far longer than these tests wait.
LONG = FIELDS | {
    "train__total_steps": 1_000_000,
    "sparsity__end_steps": 1_000_000,
    "train__checkpoint_every_steps": 20,
    "train__keep_checkpoints": 2,
    "eval__every_steps": 0,
}


def wait_for_checkpoints(workdir: Path) -> None:
    end = time.monotonic() + run_cli.TIMEOUT
    while time.monotonic() < end:
        if any(
            int(p.name) > 0
            for p in workdir.glob("*/seed_0/checkpoints/[0-9]*")
            if p.name.isdigit()
        ):
            return
        time.sleep(0.1)
    pytest.fail(log_of(workdir, 0).read_text())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two processes, the second of which got SIGTERM."""
    workdir = tmp_path_factory.mktemp("processes") / "runs"
    with processes(2, 1, workdir, "rigl_lenet5:smoke", **LONG) as started:
        wait_for_checkpoints(workdir)
        started[1].send_signal(signal.SIGTERM)
        statuses = wait(started, workdir, LOST_WITHIN)
    return workdir, statuses


def test_all_stop_when_one_is_asked_to(stopped):
    workdir, statuses = stopped
    assert statuses == [AGAIN, AGAIN]
    for i in range(2):
        assert "the same command goes on from there" in log_of(workdir, i).read_text()


@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_process_ends_the_other_and_both_go_on(stopped, victim):
    workdir, _ = stopped
    before = newest(workdir)
    with processes(2, 1, workdir, "rigl_lenet5:smoke", **LONG) as started:
        end = time.monotonic() + run_cli.TIMEOUT
        while newest(workdir) <= before and time.monotonic() < end:
            time.sleep(0.1)
        started[victim].kill()
        killed = time.monotonic()
        other = started[1 - victim]
        status = wait([other], workdir, LOST_WITHIN)[0]
        assert time.monotonic() - killed < LOST_WITHIN
    log = log_of(workdir, 1 - victim).read_text()
    assert f"going on from the checkpoint of step {before}" in log
    # JAX itself ends them where its client notices first.
    assert status != 0
    assert "lost another one" in log or "another task died" in log


def newest(workdir: Path) -> int:
    directory = run_cli.run_directory(workdir)
    return checkpoint.steps_in(directory / "checkpoints")[-1]


def test_one_process_stops_and_exits_with_a_status_of_its_own(tmp_path):
    args = run_cli.flag_list("rigl_lenet5:smoke", tmp_path / "runs", **LONG)
    with run_cli.process(*args, stderr=subprocess.PIPE, text=True) as started:
        wait_for_checkpoints(tmp_path / "runs")
        os.kill(started.pid, signal.SIGTERM)
        _, err = started.communicate(timeout=LOST_WITHIN)
    assert started.returncode == AGAIN
    assert f"stopped after step {newest(tmp_path / 'runs')}, which is saved" in err
