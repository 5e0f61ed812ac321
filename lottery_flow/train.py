"""Training one run or a population, from wherever its checkpoints left off.

Killed at any instant and started again, a run ends with the same bits as one that
was never interrupted: batches, keys and the choice of the program are functions of
the step (and of who is trained together), a row of metrics is on the disk before the
checkpoint that follows it, and rows after the restored checkpoint are forgotten. The
members of a population are runs of their own, each with its directory, rows and
checkpoints.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lottery_flow import (
    checkpoint,
    data,
    disk,
    lock,
    metrics,
    parallel,
    plans,
    population,
    restarts,
    runs,
    stopping,
    storage,
)
from lottery_flow.errors import UserError
from lottery_flow.feed import Data
from lottery_flow.job import Job
from lottery_flow.loop import Loop, Result, Run
from lottery_flow.progress import Progress
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.rules import is_rewire
from lottery_flow.state import TrainState

_LOG = logging.getLogger(__name__)


def train(
    started: Sequence[Run],
    *,
    tensorboard: bool = False,
    on_done: Callable[[Run, Result], None] | None = None,
) -> list[Result]:
    """Trains until `total_steps`, going on from the newest checkpoints.

    Members that stand at (about) the same step are trained together; where a crash
    left their newest checkpoints one interval apart, or one of them damaged, from an
    older one, see `restarts`.

    Args:
      started: the runs, all of the same `Job.setting`.
      tensorboard: write TensorBoard files too.
      on_done: called for each run that reached its last step, in every process.

    Raises:
      UserError: runs that cannot be trained together, or that another process is
        training; data, masks or weights that are missing; no undamaged checkpoint; a
        disk that takes no more; a loss that is not finite any more. A member that
        diverges does not stop the others: they are finished first.
      Stopped: SIGTERM came; everything is saved, and the same call goes on.
    """
    shared = started[0].job.setting
    for run in started:
        for name in sorted(shared.keys() | run.job.setting.keys()):
            if shared.get(name) != run.job.setting.get(name):
                raise UserError(
                    f"{name} differs between members, which are trained together and "
                    "need the same; train them apart"
                )
    roots = [run.paths.root for run in started]
    with disk.told(roots), contextlib.ExitStack() as locks:
        if parallel.is_first():
            for run in started:
                locks.enter_context(lock.hold(run.paths.root))
        return _train_all(started, tensorboard, on_done)


def _train_all(started, tensorboard: bool, on_done) -> list[Result]:
    dataset = started[0].job.load_data()
    results: dict[int, Result | UserError] = {}
    groups = restarts.find(started)
    parallel.barrier("read")  # before any process writes what others look for
    with stopping.watch() as asked_to_stop:
        for restart in groups:
            group = [started[i] for i in restart.members]
            found = _train(group, restart, dataset, tensorboard, asked_to_stop)
            for i, result in zip(restart.members, found, strict=True):
                results[i] = result
                if on_done is not None and isinstance(result, Result):
                    on_done(started[i], result)
    errors = [str(r) for r in results.values() if isinstance(r, UserError)]
    if errors:
        raise UserError("; ".join(errors))
    return [r for _, r in sorted(results.items()) if isinstance(r, Result)]


def _train(
    members: list[Run],
    restart: restarts.Restart,
    dataset,
    tensorboard: bool,
    asked_to_stop: Callable,
) -> list[Result | UserError]:
    job, step = members[0].job, restart.step
    create_fn = creation(job)  # compiled once for all members
    shared = len({run.job.data_seed for run in members}) == 1
    streamed = isinstance(dataset, data.Images)
    if streamed and not shared:
        raise UserError(
            f"data.name={job.spec.name!r} is decoded on the way, so all members need "
            "the same batches; give one data.order_seed, for instance 0"
        )
    pop = population.make(
        job.make_steps(),
        len(members),
        way=job.population,
        devices=job.devices,
        batch_size=job.batch_size,
        shared=shared,
    )
    takes_turns = population.takes_turns(job.population, len(members), job.devices)
    # Whatever can fail comes before the metrics are opened, which forgets rows.
    states = [start(run, step, create_fn, pop.mesh, dataset) for run in members]
    state = pop.join(states)
    keep = job.keep_checkpoints
    if keep and len(members) > 1:
        keep = max(keep, 2)  # a kill may leave newest checkpoints an interval apart
    record = members[0].paths.execution
    paths = plans.choose(job, states[0], record)
    alone = pop.mesh.size == 1 and (len(members) == 1 or takes_turns)
    for field, own, usual in (
        ("execution", job.execution if paths else "dense", "dense"),
        ("storage", job.storage, "masked"),
    ):
        if own != usual and not alone:
            raise UserError(
                f"train.{field}={own!r} needs members that take turns on one device; "
                f"write train.population=one_by_one, or train.{field}={usual}"
            )
    knobs = [run.job.knobs for run in members]
    rewires = table(partial(is_rewire, job.rule), job)
    has_row = with_rows(job, rewires)
    if parallel.is_first() and step:
        kept = np.flatnonzero(has_row[: step + 1]).tolist()
        for run in members:
            metrics.check_whole(run.paths.metrics, kept)
    if parallel.is_first():
        for run, damaged in zip(members, restart.damaged, strict=True):
            runs.claim(run.paths, run.record)
            plans.keep(paths, run.paths.execution)
            checkpoint.set_aside(run.paths.checkpoints, damaged)
            checkpoint.forget_after(run.paths.checkpoints, step)
    parallel.barrier("directories")
    with contextlib.ExitStack() as stack:
        managers = [
            stack.enter_context(checkpoint.manager(run.paths.checkpoints, keep))
            for run in members
        ]
        progress = stack.enter_context(Progress(job.total_steps, step))
        writers = [
            stack.enter_context(_writer(run, step, tensorboard)) for run in members
        ]
        loop = Loop(
            job,
            members,
            pop,
            shared,
            Data.of(job, dataset, pop.mesh),
            managers,
            writers,
            progress,
            sizes={k: v.size for k, v in masks_lib.layers(states[0].params).items()},
            knobs=pop.join(knobs),
            chunk=1 if streamed else population.chunk_steps(job.chunk_steps),
            rewires=rewires,
            has_row=has_row,
            learning_rate=[table(run.job.learning_rate, job) for run in members],
            asked_to_stop=asked_to_stop,
            failed={},
            paths=paths,
            storage=storage.make(job, knobs, states[0].params),
            drop_fraction=[
                None if fraction is None else table(fraction, job)
                for fraction in (run.job.drop_fraction for run in members)
            ],
        )
        state = loop.run(state, step)
    return [
        loop.failed.get(i) or Result(own, writer.rows)
        for i, (own, writer) in enumerate(zip(pop.split(state), writers, strict=True))
    ]


def _writer(run: Run, step: int, tensorboard: bool) -> metrics.Writer:
    last = step or -1  # step 0 measures its row again
    if not parallel.is_first():
        return metrics.Writer(None, last)
    board = run.paths.tensorboard if tensorboard else None
    return metrics.Writer(run.paths.metrics, last, board)


def creation(job: Job) -> Callable:
    """`Job.create`, compiled."""
    return jax.jit(job.create)


def start(
    run: Run,
    step: int,
    create_fn: Callable,
    mesh: Mesh,
    dataset: data.Dataset | None = None,
) -> TrainState:
    """The state of a run at a step that it has a checkpoint of, or before the first.

    The examples are for a network that is pruned by them before it is trained.
    """
    job, directory = run.job, run.paths.checkpoints
    own = job.rewire_key, job.step_key, job.knobs
    if not checkpoint.steps_in(directory):
        network = job.make_network(dataset)
        _tell_lost_classes(run, network)
        state = create_fn(network, *own)
        return parallel.put(state, parallel.state_shardings(mesh, state))
    # Its masks say which leaves are sparse, so that a run goes on even if the run
    # that its masks came from is gone.
    _LOG.info("going on from the checkpoint of step %d", step)
    _, network = checkpoint.restore_network(directory, step)
    with checkpoint.manager(directory, read_only=True) as manager:
        like = jax.eval_shape(create_fn, network, *own)
        return checkpoint.restore(manager, step, parallel.state_like(mesh, like))


def _tell_lost_classes(run: Run, network: checkpoint.Network) -> None:
    """Of masks that no training makes good, unless it grows weights."""
    last = run.job.model.classifier
    mask = masks_lib.by_layer(network.masks).get(last)
    if mask is None:
        return
    empty = masks_lib.empty_outputs(np.asarray(mask))  # there is nothing to compile
    if empty.any():
        which = [str(i) for i in np.flatnonzero(empty)]
        shown = ", ".join(which[:10] + ["..."] * (len(which) > 10))
        _LOG.warning(
            "%s: the masks leave %d of the %d classes without any weight in %s (%s); "
            "unless one is grown, only biases tell them apart. Where the masks are "
            "made, lower the sparsity or add %s to sparsity.dense_layers",
            *(run.paths.root, len(which), empty.size, last, shown, last),
        )


def table(schedule: Callable, job: Job) -> np.ndarray:
    """The values of a schedule at steps 0 to total_steps, on the host."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(job.total_steps + 1)))


def with_rows(job: Job, rewires: np.ndarray) -> np.ndarray:
    """Whether there is a row of metrics after n updates, for n from 0 on.

    Args:
      job: of the run.
      rewires: whether the update after n others rewires.
    """
    steps = np.arange(job.total_steps + 1)
    found = (steps == job.total_steps) | (steps % job.log_every == 0)
    found |= steps % job.checkpoint_every == 0
    if job.eval_every:
        found |= steps % job.eval_every == 0
    found[1:] |= rewires[:-1].astype(bool)
    return found
