"""The program with one fault in it.

    python -m tests.faults.victim '{"at": "row", "n": 3, "signal": "SIGKILL"}' ...

The fault is JSON:

    at, n       the n-th event of that name, see `EVENTS`
    signal      that the program then sends itself,
    delay       so many seconds later, from a thread beside;
    cut         of a row: so many of its bytes are not on the disk
    error       instead of a signal: from then on no file can be changed (`ENOSPC`)
    clock       what time it is: `backwards` or `leaps`
    counts      file that tells in the end how often each event came

SIGKILL ends a process in whatever it is doing, so that what is on the disk then is what
a crash leaves. Files are watched by an audit hook, which the interpreter calls before
it opens, renames or deletes one, in all threads.
"""

import atexit
import collections
import datetime
import errno
import json
import os
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

EVENTS = {
    "cpu": "the process has used `n` seconds of a processor",
    "compile": "a program is compiled, or looked for in the cache",
    "step": "an update was dispatched",
    "rewire": "masks are about to change",
    "save": "a checkpoint is being written in the background",
    "file": "a file below the work directory is about to be changed",
    "row": "a row of metrics is in its file, and not yet forced to the disk",
    "final": "summary.txt or DONE is about to be changed",
}
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fault:
    """Counts events, and does what was asked for at the n-th of one kind."""

    def __init__(self, wanted: dict[str, Any], workdir: str):
        self.wanted, self.workdir = wanted, workdir
        self.counts: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()
        self.failing = False

    def happen(self, event: str, file: int | None = None) -> None:
        with self.lock:
            self.counts[event] += 1
            due = (event, self.counts[event]) == (
                self.wanted.get("at"),
                self.wanted.get("n"),
            )
        if due and "error" in self.wanted:
            self.failing = True
        elif due and self.wanted.get("delay"):
            threading.Thread(target=self.act, daemon=True).start()
        elif due:
            if file is not None and self.wanted.get("cut"):
                size = os.fstat(file).st_size
                os.ftruncate(file, size - min(size, self.wanted["cut"]))
            self.act()

    def act(self) -> None:
        time.sleep(self.wanted.get("delay", 0.0))
        os.kill(os.getpid(), getattr(signal, self.wanted["signal"]))

    def audit(self, event: str, args: tuple) -> None:
        """Called before everything that the interpreter has hooks for."""
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & _FOR_WRITING
        else:
            changes = event in _CHANGES
        if not changes or not isinstance(args[0], str | os.PathLike):
            return
        path = os.fspath(args[0])
        if not isinstance(path, str) or not path.startswith(self.workdir):
            return
        self.happen("file")
        name = Path(path).name.removeprefix(".partial-")
        if name in ("summary.txt", "figure.png", "DONE"):
            self.happen("final")
        if self.failing:
            number = getattr(errno, self.wanted["error"])
            raise OSError(number, os.strerror(number), path)

    def watch_cpu(self) -> None:
        while time.process_time() < self.wanted["n"]:
            time.sleep(1e-3)
        self.act()


def _watch(fault: Fault) -> None:
    """Lets the program tell what it does."""
    import jax

    from lottery_flow import checkpoint, population, progress

    def compiles(event: str, **kwargs: object) -> None:
        if event.endswith("/compile_requests_use_cache"):
            fault.happen("compile")

    jax.monitoring.register_event_listener(compiles)
    advance, save, make, fsync = (
        progress.Progress.advance,
        checkpoint.save,
        population.make,
        os.fsync,
    )

    def advanced(self, step):
        advance(self, step)
        fault.happen("step")

    def saved(manager, state):
        save(manager, state)
        fault.happen("save")

    def made(*args, **kwargs):
        found = make(*args, **kwargs)

        def rewire(*args):
            fault.happen("rewire")
            return found.rewire(*args)

        return found._replace(rewire=rewire)

    def forced(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith("/metrics.jsonl"):
            fault.happen("row", file)
        fsync(file)

    progress.Progress.advance = advanced
    checkpoint.save, population.make, os.fsync = saved, made, forced


def _set_clock(how: str) -> None:
    """Another time of day at each call, to us and to what writes checkpoints.

    Forward at most two minutes: orbax measures by it how long a write takes, and gives
    one up after five.
    """
    draw, now = random.Random(0), [2.2e9]  # in 2039

    def seconds() -> float:
        if how == "backwards":
            now[0] -= 1000.0
            return now[0]
        return now[0] + draw.uniform(-60.0, 60.0)

    class Moment(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(seconds(), tz)

    time.time, time.time_ns = seconds, lambda: int(seconds() * 1e9)
    # Compiled modules need the class itself in `datetime`.
    shown = types.SimpleNamespace(**(vars(datetime) | {"datetime": Moment}))
    for name, module in list(sys.modules.items()):
        if name.startswith("orbax.") and getattr(module, "datetime", 0) is datetime:
            module.datetime = shown


def main() -> None:
    wanted = json.loads(sys.argv.pop(1))
    (workdir,) = (a.partition("=")[2] for a in sys.argv if a.startswith("--workdir="))
    fault = Fault(wanted, os.path.abspath(workdir))
    if "counts" in wanted:
        path = Path(wanted["counts"])
        atexit.register(lambda: path.write_text(json.dumps(fault.counts)))
    if wanted.get("at") == "cpu":
        threading.Thread(target=fault.watch_cpu, daemon=True).start()
    from lottery_flow import main as program

    if "clock" in wanted:
        _set_clock(wanted["clock"])
    _watch(fault)
    sys.addaudithook(fault.audit)
    program.cli()


if __name__ == "__main__":
    main()
