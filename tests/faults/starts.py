"""Starts of the program with a fault in it, and what became of them."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import run_cli

Fault = Mapping[str, Any]  # see `victim`
NONE: Fault = {}

# A few hundred steps, with everything that a kill can come between close together.
OFTEN = {
    "model__widths": "(24,12)",
    "sparsity__sparsity": 0.8,
    "sparsity__interval_steps": 10,
    "train__total_steps": 240,
    "train__log_every_steps": 5,
    "train__checkpoint_every_steps": 12,
    "train__figure": False,
    "eval__every_steps": 20,
}


class Kind(NamedTuple):
    """A kind of runs: the configuration, and its fields beside `OFTEN`."""

    config: str = "rigl_mlp:smoke"
    fields: Mapping[str, object] = {}

    def args(self, workdir: Path) -> list[str]:
        return run_cli.flag_list(self.config, workdir, **(OFTEN | dict(self.fields)))


RIGL = Kind()
KINDS = {
    "one run": RIGL,
    "two members": Kind(fields={"train__seeds": "(0,1)", "train__total_steps": 120}),
    "three checkpoints kept": Kind(fields={"train__keep_checkpoints": 3}),
    "rounds of pruning": Kind(
        "imp_lenet5:smoke",
        {"model__name": "mlp", "tickets__rounds": 1, "train__total_steps": 120},
    ),
    "images that workers decode": Kind(
        "rigl_lenet5:smoke",
        {
            **{"data__name": "synthetic", "data__image_size": 8, "data__workers": 1},
            **{"model__name": "mlp", "eval__batch_size": 500, "eval__every_steps": 60},
            **{"train__total_steps": 120},
        },
    ),
}


@contextmanager
def started(
    args: list[str], fault: Fault = NONE, cache: Path | None = None, **kwargs: object
) -> Iterator[subprocess.Popen]:
    """The program with a fault, which is dead when the context ends.

    Args:
      args: its command line.
      fault: see `victim`.
      cache: of compiled programs; None: that of all tests.
      kwargs: to `subprocess.Popen`.
    """
    own = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with run_cli.process(
        json.dumps(fault),
        *args,
        n_devices=1,
        module="tests.faults.victim",
        environment=own,
        **(pipe | kwargs),
    ) as process:
        yield process


def end(
    args: list[str], fault: Fault = NONE, cache: Path | None = None
) -> run_cli.Outcome:
    """Starts the program with a fault and waits until it ends, and all that it began.

    What it began, as workers, has its stderr, which is read to the end.
    """
    with started(args, fault, cache) as process:
        _, err = process.communicate(timeout=run_cli.TIMEOUT)
    return run_cli.Outcome(process.returncode, "", err)


def together(workdir: Path, faults: Sequence[Fault]) -> list[run_cli.Outcome]:
    """One run of as many processes as there are faults, each with its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args = [*RIGL.args(workdir), f"--coordinator=localhost:{port}"]
    args.append(f"--n_processes={len(faults)}")
    found = []
    with ExitStack() as stack:
        for i, fault in enumerate(faults):
            log = workdir.with_name(f"{workdir.name}_{i}.log")
            file = stack.enter_context(open(log, "w"))
            own = started([*args, f"--process={i}"], fault, stderr=file)
            found.append((stack.enter_context(own), log))
        statuses = [process.wait(run_cli.TIMEOUT) for process, _ in found]
    return [
        run_cli.Outcome(status, "", log.read_text())
        for status, (_, log) in zip(statuses, found, strict=True)
    ]


def finish(args: list[str]) -> run_cli.Outcome:
    """Starts the program without a fault; it must reach its end."""
    outcome = end(args)
    assert outcome.status == 0, outcome.stderr
    return outcome


def kill(args: list[str], fault: Fault, cache: Path | None = None) -> run_cli.Outcome:
    """A start that ends by a signal of its fault, and by nothing else."""
    outcome = end(args, fault, cache)
    number = getattr(signal, fault["signal"])
    assert outcome.status == -number, f"{fault} did not come: {outcome}"
    return outcome


def wait_until_it_stands_still(process: subprocess.Popen) -> None:
    """Until it has stopped itself by SIGSTOP."""
    limit = time.monotonic() + run_cli.TIMEOUT
    while time.monotonic() < limit:
        pid, status = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
        if pid:
            assert os.WIFSTOPPED(status), "the program ended before it stopped"
            return
        time.sleep(0.01)
    raise TimeoutError("the program did not stop")


def told_once(outcome: run_cli.Outcome, *words: str) -> None:
    """One sentence with these words, no traceback, and the status of a mistake."""
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.stderr, outcome.stderr
    (told,) = outcome.errors
    for word in words:
        assert word in told
