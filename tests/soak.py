"""Trains for very many steps, and looks at what the process holds at each checkpoint.

    python tests/soak.py --steps=100000 --workdir=DIR --out=samples.json

The real program, of which only the saving of checkpoints is watched. With
`--leaks=state,...` it holds on to something at each of them, for `problems` to find.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lottery_flow.main
from lottery_flow import checkpoint

CONFIG = """
from lottery_flow.config import default, finish
def get_config(arg=""):
    config = default()
    config.name = "soak"
    config.model.name = "mlp"
    config.model.widths = ({width},)
    config.sparsity.rule = "rigl"
    config.sparsity.sparsity = 0.9
    config.sparsity.interval_steps = {rewire}
    config.sparsity.drop_schedule = "cosine"
    config.sparsity.grow_examples = 100
    config.train.total_steps = {steps}
    config.train.batch_size = 16
    config.train.probe_examples = 100
    config.train.log_every_steps = {save}
    config.train.checkpoint_every_steps = {save}
    config.train.keep_checkpoints = 3
    config.train.figure = False
    config.eval.every_steps = 4 * {save}
    config.optim.learning_rate = 0.01
    return finish(config, arg)
"""
WIDTH = 256  # a state of two megabytes
# Of samples, the first that count: what is filled once is full by then.
WARM = 0.3


class Sample(NamedTuple):
    """What the process holds after a checkpoint.

    Attributes:
      step: of the checkpoint.
      resident: bytes of memory.
      arrays: bytes of arrays of JAX.
      files, threads: how many are open, or alive.
      programs: compiled so far.
    """

    step: int
    resident: int
    arrays: int
    files: int
    threads: int
    programs: int


def problems(samples: list[Sample], state_bytes: int) -> list[str]:
    """What grew from checkpoint to checkpoint, after the warm-up.

    Memory may grow by a quarter of a state for each checkpoint: a leak would be a whole
    one. A slope is the median of the slopes between all pairs of samples, which few
    outliers do not move.
    """
    own = samples[int(WARM * len(samples)) :]
    found = []
    for name in ("resident", "arrays"):
        grown = slope([getattr(s, name) for s in own])
        if grown > state_bytes / 4:
            found.append(
                f"{name}: {grown / 1e6:.2f} MB more at each checkpoint; a state has "
                f"{state_bytes / 1e6:.2f} MB"
            )
    for name in ("files", "threads"):
        # Readers come and go, and pools fill up when a machine is busy; a
        # leak leaves one more at each checkpoint, and half of that is too much.
        counts = [getattr(s, name) for s in own]
        if slope(counts) > 0.5:
            found.append(f"{name}: from {counts[0]} to {counts[-1]}")
    if own[-1].programs != own[0].programs:
        found.append(f"programs: from {own[0].programs} to {own[-1].programs}")
    return found


def slope(values: list[float]) -> float:
    """Theil and Sen's: the median of the slopes between all pairs."""
    y = np.asarray(values, np.float64)
    i, j = np.triu_indices(len(y), 1)
    return float(np.median((y[j] - y[i]) / (j - i)))


def leak(what: str, kept: list, state: Any) -> None:
    """Holds on to something, for ever."""
    if what == "state":
        kept.append(jax.tree.map(lambda v: np.array(v, copy=True), state.params))
        kept.append(jax.tree.map(lambda v: np.array(v, copy=True), state.params))
    elif what == "arrays":
        kept.append(jax.tree.map(lambda v: v + 0, (state.params, state.params)))
    elif what == "file":
        kept += [open(os.devnull), open(os.devnull)]
    elif what == "thread":
        for _ in range(2):
            thread = threading.Thread(target=threading.Event().wait, daemon=True)
            thread.start()
            kept.append(thread)
    elif what == "program":
        kept.append(jax.jit(lambda x: x + len(kept))(np.zeros(len(kept) + 1)))


def watch(samples: list[Sample], leaks: list[str], leaks_from: int) -> Callable:
    """Saves as `checkpoint.save`, leaks from a step on, and looks."""
    programs, kept, save = [], [], checkpoint.save
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: programs.append(name) if "backend_compile" in name else 0
    )

    def watched(manager, state):
        save(manager, state)
        # The background's writer opens a dozen files and more, now or a little later.
        manager.wait_until_finished()
        for what in leaks if state.step >= leaks_from else ():
            leak(what, kept, state)
        statm = Path("/proc/self/statm").read_text().split()
        samples.append(
            Sample(
                step=int(state.step),
                resident=int(statm[1]) * os.sysconf("SC_PAGE_SIZE"),
                arrays=sum(v.nbytes for v in jax.live_arrays()),
                files=len(os.listdir("/proc/self/fd")),
                threads=len(os.listdir("/proc/self/task")),
                programs=len(programs),
            )
        )

    return watched


def run() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rewire", type=int, default=50)
    parser.add_argument("--save", type=int, default=500)
    parser.add_argument("--leaks", default="")
    parser.add_argument("--leaks_from", type=int, default=0)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    samples: list[Sample] = []
    leaks = [k for k in args.leaks.split(",") if k]
    checkpoint.save = watch(samples, leaks, args.leaks_from)
    path = args.out.with_suffix(".py")
    numbers = {k: getattr(args, k) for k in ("steps", "rewire", "save")}
    path.write_text(CONFIG.format(width=WIDTH, **numbers))
    sys.argv = ["soak", f"--config={path}", f"--workdir={args.workdir}"]
    try:
        lottery_flow.main.cli()
    finally:
        args.out.write_text(json.dumps([s._asdict() for s in samples]))


if __name__ == "__main__":
    run()
