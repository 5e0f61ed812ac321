"""Checkpoints by orbax: a network that anyone can read, and the rest of the state.

Each step has three items. `network` is a plain tree of params, batch_stats and masks
that restores without knowing the optimizer: what tickets, analysis and notebooks
need; and the running average of the params, if there is one. `training` is what only
the same run can use: step, key, optimizer state. `record` says what both hold, see
`integrity`; whatever is read is verified by it. Checkpoints of earlier versions have
none, and are read as they are: a missing record is damage only if an older checkpoint
beside it has one.
"""

import contextlib
import gc
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jaxtyping import PyTree

from lottery_flow import integrity
from lottery_flow.errors import UserError
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.state import TrainState

_LOG = logging.getLogger(__name__)

_DELETED, _DAMAGED = ".deleted", ".damaged"
_RECORD = Path("record", "metadata")  # where orbax puts an item of JSON


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

    Its record is made before, which takes about a second for each gigabyte. A
    checkpoint of that step that is there already stays as it is.

    Raises:
      RuntimeError: an inactive weight is not zero; nothing is written.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    network, training = _split(state)
    try:
        record = integrity.record(network, training)
    except ValueError as error:
        raise RuntimeError(
            f"the state after step {step} is not sparse ({error}); it is not saved"
        ) from error
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            network=ocp.args.StandardSave(network),
            training=ocp.args.StandardSave(training),
            record=ocp.args.JsonSave(record),
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
    directory = Path(checkpoints.directory)
    found, reason = _attempt(lambda: checkpoints.restore(step, args=wanted))
    if reason is None:
        items = {name: found[name] for name in ("network", "training")}
        reason = _problem(directory, step, **items)
    if reason is not None:
        raise _damaged(directory, step, reason)
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
    found, reason = _attempt(lambda: _restore_arrays(path))
    if reason is None:
        reason = _problem(directory, step, network=found)
    if reason is not None:
        raise _damaged(directory, step, reason)
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
        metadata: Any = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError(f"what {path.name} holds is unknown")
        tree = metadata.tree
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
        )
        return checkpointer.restore(path, restore_args=as_numpy)


def damage(directory: Path, step: int) -> str | None:
    """Why one cannot go on from a checkpoint, None if one can; reads all of it."""
    directory = directory.absolute()
    items = "network", "training"
    found, reason = _attempt(
        lambda: {k: _restore_arrays(directory / str(step) / k) for k in items}
    )
    return _problem(directory, step, **found) if reason is None else reason


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


def set_aside(directory: Path, steps: Iterable[int]) -> None:
    """Renames damaged checkpoints, so that they neither count nor are deleted."""
    for step in steps:
        name = f"{step}{_DAMAGED}"
        others = len(list(directory.glob(f"{name}*")))
        # Not `name_1`, which would be a checkpoint of step 1 to orbax.
        path = directory / (f"{name}-{others}" if others else name)
        (directory / str(step)).rename(path)


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
    if isinstance(state.skipped, tuple):
        rest.pop("skipped")  # likewise
    return network, rest


def _join(network: PyTree, training: PyTree) -> TrainState:
    opt_state = training["opt_state"]._replace(masks=network["masks"])
    own = {k: network[k] for k in ("params", "batch_stats", "ema") if k in network}
    return TrainState(**training | own | {"opt_state": opt_state})


def _problem(directory: Path, step: int, **items: PyTree) -> str | None:
    """What of a checkpoint that was read is not as it was written."""
    own = directory / str(step) / _RECORD
    if not own.parent.exists():
        older = [s for s in steps_in(directory) if s < step]
        if any((directory / str(s) / _RECORD).exists() for s in older):
            return "is damaged (its record is missing)"
        _LOG.info("%s is of an earlier version: there is no record", own.parents[1])
        return None
    try:
        record = integrity.parse(own.read_text())
    except (OSError, ValueError) as error:
        return f"is damaged (its record cannot be read: {error})"
    found = integrity.problem(record, **items)
    return None if found is None else f"is damaged ({found})"


def _damaged(directory: Path, step: int, reason: str) -> UserError:
    return UserError(
        f"the checkpoint of step {step} in {directory} {reason}; "
        f"move {directory / str(step)} away to go on from an older one"
    )


def _attempt(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `read` returns; or, whatever damaged files make it raise, the reason."""
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    # After its first failure orbax's reader threads and coroutines end in errors of
    # their own, which would bury the one that counts.
    sys.excepthook = threading.excepthook = sys.unraisablehook = lambda *_: None
    try:
        try:
            return read(), None
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
    return None, f"cannot be read ({reason})"
