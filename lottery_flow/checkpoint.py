"""Checkpoints by orbax: a network that anyone can read, and the rest of the state.

Each step has two items. `network` is a plain tree of params, batch_stats and masks
that restores without knowing the optimizer: what tickets, analysis and notebooks
need; and the running average of the params, if there is one. `training` is what only
the same run can use: step, key, optimizer state.
"""

import contextlib
import gc
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jaxtyping import PyTree

from lottery_flow.errors import UserError
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.state import TrainState

_DELETED = ".deleted"


class Network(NamedTuple):
    """What a checkpoint says of a network, as numpy arrays.

    Attributes:
      params, batch_stats: nested dicts.
      masks: likewise, with None where a leaf is dense.
      ema: the running average of the params, () without one.
    """

    params: Any
    batch_stats: Any
    masks: Any
    ema: Any = ()


def manager(
    directory: Path, keep: int = 0, *, read_only: bool = False
) -> ocp.CheckpointManager:
    """An orbax manager of a run's checkpoints.

    Args:
      directory: made if it does not exist.
      keep: newest checkpoints to keep, beside that of step 0; 0 keeps all.
      read_only: only restores, and leaves alone what another process is writing.
    """
    if read_only:
        options = {"read_only": True, "save_interval_steps": 0, "create": False}
        with _without_warnings():
            return ocp.CheckpointManager(
                directory.absolute(), options=ocp.CheckpointManagerOptions(**options)
            )
    policies = ocp.checkpoint_managers
    # Of its own for each run: many processes save many members at the same time.
    key = "-".join(directory.absolute().parts[-3:])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(keep or None), _KeepFirst()]
        ),
        cleanup_tmp_directories=True,  # what a killed process left half written
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=key
        ),
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


@contextlib.contextmanager
def _without_warnings():
    """orbax warns of what we want: read-only, and an item without its siblings."""
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(level)


def save(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    """Writes the state in the background; the arrays may be donated at once.

    A checkpoint of that step that is there already stays as it is.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    network, training = _split(state)
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            network=ocp.args.StandardSave(network),
            training=ocp.args.StandardSave(training),
        ),
    )


def restore(
    checkpoints: ocp.CheckpointManager, step: int, like: TrainState
) -> TrainState:
    """The state of a step, in the structure, dtypes and shardings of `like`.

    Raises:
      UserError: the checkpoint is damaged or of another model.
    """
    network, training = _split(like)
    wanted = ocp.args.Composite(
        network=ocp.args.StandardRestore(network),
        training=ocp.args.StandardRestore(training),
    )
    found = _read(
        checkpoints.directory, step, lambda: checkpoints.restore(step, args=wanted)
    )
    return _join(found["network"], found["training"])


def restore_network(directory: Path, step: int = -1) -> tuple[int, Network]:
    """A network alone, from the checkpoints of any run; -1 is the newest.

    Returns:
      The step, and the network.

    Raises:
      UserError: no such checkpoint (names the steps that there are), or damaged.
    """
    directory = Path(directory).absolute()
    steps = steps_in(directory)
    if not steps:
        raise UserError(
            f"{directory} has no checkpoints; give the seed_N directory of a run"
        )
    step = steps[-1] if step == -1 else step
    if step not in steps:
        raise UserError(
            f"{directory} has no checkpoint of step {step}; it has "
            f"{', '.join(map(str, steps))}"
        )
    path = directory / str(step) / "network"
    found = _read(directory, step, lambda: _restore_arrays(path))
    # Without a target orbax leaves out what holds no array.
    params = found["params"]
    masks = masks_lib.from_named(
        masks_lib.named_leaves(found.get("masks") or {}), params
    )
    stats, ema = found.get("batch_stats", {}), found.get("ema", ())
    return step, Network(params, stats, masks, ema)


def _restore_arrays(path: Path) -> PyTree:
    """Everything as numpy arrays, whatever devices it was saved from."""
    with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
        tree: Any = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
        )
        return checkpointer.restore(path, restore_args=as_numpy)


def steps_in(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in a directory, ascending."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; move that file away")
    return sorted(ocp.path.step.checkpoint_steps(directory))


def forget_after(directory: Path, step: int) -> None:
    """Deletes the checkpoints after a step, each whole or not at all."""
    for newer in reversed(steps_in(directory)):
        if newer > step:
            # No checkpoint has such a name, so that a kill leaves none half deleted.
            (directory / str(newer)).rename(directory / f"{newer}{_DELETED}")
    for leftover in directory.glob(f"*{_DELETED}"):
        shutil.rmtree(leftover)


class _KeepFirst:
    """Never deletes step 0, the initialisation that lottery tickets rewind to."""

    def should_preserve(self, checkpoints, *, context):
        del context
        return [info.step == 0 for info in checkpoints]


def _split(state: TrainState) -> tuple[PyTree, PyTree]:
    network = {
        "params": state.params,
        "batch_stats": state.batch_stats,
        "masks": state.opt_state.masks,
    }
    if state.ema != ():
        network["ema"] = state.ema
    opt_state = state.opt_state._replace(masks=())
    rest = state._replace(params=(), batch_stats=(), opt_state=opt_state)._asdict()
    rest.pop("ema")  # older checkpoints have no such field
    return network, rest


def _join(network: PyTree, training: PyTree) -> TrainState:
    opt_state = training["opt_state"]._replace(masks=network["masks"])
    own = {k: network[k] for k in ("params", "batch_stats", "ema") if k in network}
    return TrainState(**training | own | {"opt_state": opt_state})


def _read(directory: Any, step: int, read: Callable[[], Any]) -> Any:
    """What `read` returns; whatever a damaged file makes it raise, as a UserError."""
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    # After its first failure orbax's reader threads and coroutines end in errors of
    # their own, which would bury the one that counts.
    sys.excepthook = threading.excepthook = sys.unraisablehook = lambda *_: None
    try:
        try:
            return read()
        except Exception as error:  # of many types
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            link: BaseException | None = error
            while link is not None:  # tracebacks keep those coroutines alive
                link.__traceback__ = None
                link = link.__cause__ or link.__context__
        time.sleep(0.5)  # the other readers are still running
        gc.collect()
    finally:
        sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    raise UserError(
        f"the checkpoint of step {step} in {directory} cannot be read ({reason}); "
        f"move {Path(directory) / str(step)} away to go on from an older one"
    )
