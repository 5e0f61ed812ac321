"""Starts the program with thousands of bad configurations, and counts what it says.

    python tests/search_input.py --examples=2000 --trained=40 --seed=0

A process of its own, because the test run checks annotations, which the program does
not. An example of each kind of fault is told, and the status is 1 if there is any; the
last line has the counts.
"""

import argparse
import collections
import json
import os
import re
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_input
import hypothesis
import try_input

SECONDS, GIGABYTES = 60, 8


class Hang(BaseException):
    """No answer in time."""


def guarded(
    fn: Callable, example: bad_input.Input, directory: Path, seconds: int = SECONDS
) -> tuple[Any, str, str]:
    """What `fn` finds, the kind of fault ("" for none) and what is to be told."""

    def alarm(*_):
        raise Hang()

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try:
        return fn(example, directory), "", ""
    except (Exception, Hang) as error:
        is_told = isinstance(error, try_input.Fault)
        told = str(error) if is_told else traceback.format_exc()[-2500:]
        return None, _kind(error), f"{example}\n{told}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def search(n_examples: int, n_trained: int, seed: int) -> dict[str, Any]:
    """Tries that many inputs; the counts, and the shortest fault of each kind."""
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, str] = {}
    short: list[bad_input.Input] = []

    def note(fn, example):
        found, kind, told = guarded(fn, example, directory)
        if kind:
            counts["faults"] += 1
            faults[kind] = min(faults.get(kind, told), told, key=len)
        return found, not kind

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=n_examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(bad_input.inputs())
    def each(example):
        runs, well = note(try_input.try_one, example)
        counts["tried"] += 1
        if well:
            counts["rejected" if runs is None else "accepted"] += 1
        if runs and try_input.is_small(runs):
            short.append(example)

    with tempfile.TemporaryDirectory(prefix="lottery_flow_input_") as name:
        directory = Path(name)
        (directory / "cwd").mkdir()
        os.chdir(directory / "cwd")
        each()
        for i in range(min(n_trained, len(short))):
            example = short[i * len(short) // min(n_trained, len(short))]
            ended, well = note(try_input.train_one, example)
            if well:
                counts["trained" if ended else "rejected in training"] += 1
        os.chdir("/")
    return {"counts": counts, "faults": faults}


def _kind(error: BaseException) -> str:
    """What makes two faults the same."""
    if isinstance(error, try_input.Fault):
        return re.sub(r"'[^']*'|[\d.]+", "_", str(error))[:60]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "lottery_flow/" in f.filename] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"


def run() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    for name, value in (("examples", 200), ("trained", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    most = GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    began = time.process_time()
    found = search(args.examples, args.trained, args.seed)
    for kind, text in found["faults"].items():
        print(f"--- {kind}\n{text}\n")
    seconds = round(time.process_time() - began)
    print(json.dumps({**found["counts"], "seconds": seconds}))
    raise SystemExit(bool(found["faults"]))


if __name__ == "__main__":
    run()
