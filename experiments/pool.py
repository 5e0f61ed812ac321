"""Work spread over the cores: a process for each, or one after the other.

One process on one core does more of our small networks in a second than one process
on two cores, because two of its threads wait for each other at every operation.
"""

import contextlib
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lottery_flow import command, stopping
from lottery_flow.errors import UserError

_EVERY_SECONDS = 60.0  # between two lines of progress


def run(
    work: Callable[[Any], None],
    items: Sequence[Any],
    *,
    jobs: int,
    programs: Path,
    label: Callable[[Any], str],
    progress: Callable[[Any], str] = lambda item: "",
) -> None:
    """Calls `work(item)` for every item.

    Args:
      work: a function of a module, whose results are files.
      items: what pickle can send to another process.
      jobs: processes at the same time; 0 is one for each core, and one where there is
        an accelerator. One works in this process.
      programs: folder for compiled programs, which the items share.
      label: what an item is called.
      progress: how far a running item is.

    Raises:
      UserError: some items failed; all others were finished before.
      Stopped: SIGTERM came; what was in training is saved.
    """
    waiting, cores = list(items), sorted(os.sched_getaffinity(0))
    jobs = min(n_jobs(jobs), len(waiting))
    failed: list[str] = []
    if jobs <= 1:
        _keep(programs)
        for item in waiting:
            say(label(item))
            try:
                work(item)
            except UserError as error:
                say(f"error: {error}")
                failed.append(label(item))
        return _report(failed)
    context = multiprocessing.get_context("spawn")
    free = [cores[i::jobs] for i in range(jobs)]
    running: list[tuple[Any, Any, list[int]]] = []
    told = time.monotonic()
    with stopping.watch() as asked_to_stop, _ended(running):
        while waiting or running:
            if asked_to_stop():
                raise stopping.Stopped(f"stopped, {len(waiting)} wait")
            while waiting and free:
                item, own = waiting.pop(0), free.pop(0)
                process = context.Process(
                    target=_work, args=(work, item, own, programs)
                )
                process.start()
                running.append((process, item, own))
                say(f"begins: {label(item)}")
            time.sleep(0.1)
            for entry in [e for e in running if not e[0].is_alive()]:
                process, item, own = entry
                running.remove(entry)
                free.append(own)
                if process.exitcode:
                    failed.append(label(item))
                say(f"{'failed' if process.exitcode else 'finished'}: {label(item)}")
            if time.monotonic() - told > _EVERY_SECONDS:
                told = time.monotonic()
                for _, item, _ in running:
                    say(f"running: {label(item)} {progress(item)}")
                say(f"{len(waiting)} wait")
    return _report(failed)


@contextlib.contextmanager
def _ended(running: list[tuple[Any, Any, list[int]]]) -> Iterator[None]:
    """No process is left at the end; a run in training is saved first."""
    try:
        yield
    finally:
        for process, _, _ in running:
            process.terminate()
        for process, _, _ in running:
            process.join()


def n_jobs(asked: int) -> int:
    """Processes at the same time; 0 chooses, see `run`."""
    on_cpu = jax.default_backend() == "cpu"
    return asked or (len(os.sched_getaffinity(0)) if on_cpu else 1)


def say(text: str) -> None:
    """A line for whoever waits, with the time of day."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def _report(failed: list[str]) -> None:
    if failed:
        raise UserError(f"{len(failed)} failed, see above: {'; '.join(failed)}")


def _keep(programs: Path) -> None:
    """Compiled programs go there: items compile the same ones, in one process too."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(programs.resolve()))


def _work(work: Callable, item: Any, cores: list[int], programs: Path) -> None:
    """In a process of its own, on its own cores."""
    os.sched_setaffinity(0, cores)  # before JAX counts them
    command.prepare(logging.WARNING)
    _keep(programs)
    try:
        work(item)
    except UserError as error:
        sys.exit(f"error: {error}")
    except stopping.Stopped:
        sys.exit(command.AGAIN)
