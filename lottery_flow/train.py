"""The host loop: restore, step, log, evaluate, save; for one run or a population.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow import checkpoint, metrics, population, runs
from lottery_flow.data import arrays
from lottery_flow.errors import UserError
from lottery_flow.evaluate import evaluate
from lottery_flow.job import Job
from lottery_flow.metrics import Row, check_finite
from lottery_flow.population import Population
from lottery_flow.progress import Progress
from lottery_flow.runs import Fields, RunPaths
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.rules import is_rewire
from lottery_flow.state import TrainState, create
from lottery_flow.steps import Batch, make_steps

_LOG = logging.getLogger(__name__)


class Result(NamedTuple):
    """A finished run: its last state, and all its rows of metrics."""

    state: TrainState
    rows: list[Row]


class Run(NamedTuple):
    """One run, or one member of a population.

    Attributes:
      job: what to train.
      paths: where it is kept; made once the data and the network are there.
      record: the contents of config.json.
    """

    job: Job
    paths: RunPaths
    record: Fields


def train(
    started: Sequence[Run],
    *,
    tensorboard: bool = False,
    on_done: Callable[[Run, Result], None] | None = None,
) -> list[Result]:
    """Trains until `total_steps`, going on from the newest checkpoints.

    Members that stand at (about) the same step are trained together; where a crash
    left their newest checkpoints one interval apart, from the older one.

    Args:
      started: the runs, all of the same `Job.setting`.
      tensorboard: write TensorBoard files too.
      on_done: called for each run that reached its last step.

    Raises:
      UserError: runs that cannot be trained together; data, masks or weights that are
        missing; a damaged checkpoint; a loss that is not finite any more. A member
        that diverges does not stop the others: they are finished first.
    """
    shared = started[0].job.setting
    for run in started:
        for name in sorted(shared.keys() | run.job.setting.keys()):
            if shared.get(name) != run.job.setting.get(name):
                raise UserError(
                    f"{name} differs between members, which are trained together and "
                    "need the same; train them apart"
                )
    dataset = started[0].job.load_data()
    results: dict[int, Result | UserError] = {}
    for members, step in _restarts(started):
        group = [started[i] for i in members]
        found = _train(group, step, dataset, tensorboard)
        for i, result in zip(members, found, strict=True):
            results[i] = result
            if on_done is not None and isinstance(result, Result):
                on_done(started[i], result)
    errors = [str(r) for r in results.values() if isinstance(r, UserError)]
    if errors:
        raise UserError("; ".join(errors))
    return [r for _, r in sorted(results.items()) if isinstance(r, Result)]


def _restarts(started: Sequence[Run]) -> list[tuple[list[int], int]]:
    """Which runs go on together, and from which step."""
    kept = [checkpoint.steps_in(run.paths.checkpoints) or [0] for run in started]
    every = started[0].job.checkpoint_every
    groups: list[tuple[list[int], int]] = []
    for i in sorted(range(len(kept)), key=lambda i: kept[i][-1]):
        if groups and groups[-1][1] in kept[i] and kept[i][-1] - groups[-1][1] <= every:
            groups[-1][0].append(i)
        else:
            groups.append(([i], kept[i][-1]))
    return groups


def _train(
    members: list[Run], step: int, dataset, tensorboard: bool
) -> list[Result | UserError]:
    job = members[0].job
    creation = _creation(job)  # compiled once for all members
    states = [_start(run, step, creation) for run in members]
    steps = make_steps(job.model.apply, job.make_method, job.spec.mean, job.spec.std)
    shared = len({run.job.data_seed for run in members}) == 1
    pop = population.make(
        steps,
        len(members),
        lowering=job.lowering,
        n_devices=job.member_devices,
        shared=shared,
    )
    # Whatever can fail comes before the metrics are opened, which forgets rows.
    state = pop.join(states)
    # After a kill the members' newest checkpoints may be one interval apart.
    keep = max(job.keep_checkpoints, 2) if len(members) > 1 else job.keep_checkpoints
    keep = keep if job.keep_checkpoints else 0
    for run in members:
        runs.claim(run.paths, run.record)
        checkpoint.forget_after(run.paths.checkpoints, step)
    with contextlib.ExitStack() as stack:
        managers = [
            stack.enter_context(checkpoint.manager(run.paths.checkpoints, keep))
            for run in members
        ]
        progress = stack.enter_context(Progress(job.total_steps, step))
        writers = [
            stack.enter_context(
                metrics.Writer(
                    run.paths.metrics,
                    step or -1,  # step 0 measures its row again
                    run.paths.tensorboard if tensorboard else None,
                )
            )
            for run in members
        ]
        loop = _Loop(
            job,
            members,
            pop,
            shared,
            Data.of(job, dataset, pop.place),
            managers,
            writers,
            progress,
            sizes={k: v.size for k, v in masks_lib.layers(states[0].params).items()},
            knobs=pop.join([run.job.knobs for run in members]),
            chunk=population.chunk_steps(job.chunk_steps),
            rewires=_table(partial(is_rewire, job.rule), job),
            learning_rate=[_table(run.job.learning_rate, job) for run in members],
            failed={},
            drop_fraction=[
                None if fraction is None else _table(fraction, job)
                for fraction in (run.job.drop_fraction for run in members)
            ],
        )
        state = loop.run(state, step)
    return [
        loop.failed.get(i) or Result(own, writer.rows)
        for i, (own, writer) in enumerate(zip(pop.split(state), writers, strict=True))
    ]


def _creation(job: Job) -> Callable:
    """`(network, rewire_key, step_key, knobs) -> state` before the first step."""

    def creation(network, rewire_key, step_key, knobs):
        tx = job.make_tx(network.masks, rewire_key, knobs)
        return create(tx, network.params, network.batch_stats, step_key)

    return jax.jit(creation)


def _start(run: Run, step: int, creation: Callable) -> TrainState:
    """The state of a run at a step that it has a checkpoint of, or before the first."""
    job, directory = run.job, run.paths.checkpoints
    own = job.rewire_key, job.step_key, job.knobs
    if not checkpoint.steps_in(directory):
        return creation(job.make_network(), *own)
    # Its masks say which leaves are sparse, so that a run goes on even if the run
    # that its masks came from is gone.
    _LOG.info("going on from the checkpoint of step %d", step)
    _, network = checkpoint.restore_network(directory, step)
    with checkpoint.manager(directory, job.keep_checkpoints) as manager:
        return checkpoint.restore(
            manager, step, jax.eval_shape(creation, network, *own)
        )


def _table(schedule: Callable, job: Job) -> np.ndarray:
    """The values of a schedule at steps 0 to total_steps, on the host."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(job.total_steps + 1)))


class Data(NamedTuple):
    """What is on the devices all the time."""

    train: Batch
    probe: Batch
    grow: Batch | None
    test: list[Batch]

    @classmethod
    def of(cls, job: Job, dataset, place: Callable) -> "Data":
        images, labels = dataset.train_images, dataset.train_labels
        n_probe, n_grow = job.probe_examples, job.grow_examples
        test = dataset.test_images, dataset.test_labels

        def examples(start, end):
            return place({"image": images[start:end], "label": labels[start:end]})

        return cls(
            train=examples(0, len(labels)),
            probe=examples(0, n_probe),
            grow=examples(n_probe, n_probe + n_grow) if n_grow else None,
            test=[place(b) for b in arrays.padded_batches(*test, job.eval_batch_size)],
        )


class _Loop(NamedTuple):
    """What stays the same from step to step."""

    job: Job
    members: list[Run]
    population: Population
    shared: bool
    data: Data
    managers: list[Any]
    writers: list[metrics.Writer]
    progress: Progress
    sizes: dict[str, int]  # weights of each layer
    knobs: Any
    chunk: int  # steps that one program takes at most
    rewires: np.ndarray  # whether the update after n others rewires
    learning_rate: list[np.ndarray]
    drop_fraction: list[np.ndarray | None]
    failed: dict[int, UserError]  # members that diverged; they leave no more traces

    def run(self, state: Any, start: int) -> Any:
        """From the state after `start` updates to that after all of them."""
        job, saved = self.job, start
        if start == 0:
            self._record(state, 0, None)
            self._save(state)
        pending, done = None, start
        while done < job.total_steps:
            begin, end = done, self._end(done)
            rewires = bool(self.rewires[begin])
            args = self.knobs, self.data.train, self._indices(begin, end)
            before = None
            if rewires:
                state, measured, before = self.population.rewire(
                    state, *args, self.data.grow
                )
            elif self.chunk == 1:
                state, measured = self.population.train(state, *args)
            else:
                state, measured = self.population.chunk(state, *args)
            done = end
            # One late, so that the device never waits for the host.
            if pending is not None:
                self._check(*pending, saved)
            pending = measured, begin
            self.progress.advance(done)
            last = done == job.total_steps
            saves = last or done % job.checkpoint_every == 0
            evaluates = last or (job.eval_every and done % job.eval_every == 0)
            if saves or evaluates or rewires or done % job.log_every == 0:
                self._check(*pending, saved)
                pending = None
                self._record(state, done, saved, measured, before, bool(evaluates))
            if saves:
                self._save(state)
                saved = done
        return state

    def _end(self, begin: int) -> int:
        """Where the program that begins after `begin` updates ends.

        A function of the step alone, so that a run that was interrupted executes the
        same programs: at each event, and at each multiple of the chunk.
        """
        if self.chunk == 1 or self.rewires[begin]:
            return begin + 1
        job = self.job
        events = self.chunk, job.log_every, job.checkpoint_every, job.eval_every
        ends = [(begin // every + 1) * every for every in events if every]
        following = np.flatnonzero(self.rewires[begin : min(ends)])
        return min(*ends, job.total_steps, *(begin + following[:1]).tolist())

    def _indices(self, begin: int, end: int) -> np.ndarray:
        """The examples of the updates from `begin` on: [n s b], less axes of one."""
        runs_ = self.members[:1] if self.shared else self.members
        n, b = self.job.spec.n_train, self.job.batch_size
        indices = np.stack(
            [
                [arrays.batch_indices(run.job.data_seed, t, n, b) for run in runs_]
                for t in range(begin, end)
            ]
        )
        indices = indices[:, 0] if self.shared else indices
        alone = self.chunk == 1 or self.rewires[begin]
        return indices[0] if alone else indices

    def _of_members(self, metrics_: Any) -> list[Any]:
        return jax.device_get(self.population.split(metrics_))

    def _probe(self, state) -> list[Any]:
        return self._of_members(self.population.probe(state, self.data.probe))

    def _check(self, measured: Any, begin: int, saved: int | None) -> None:
        """Looks for losses that are not finite; `begin` updates came before."""
        for i, values in enumerate(self._of_members(measured)):
            losses = np.atleast_1d(values["loss"])
            for n in np.flatnonzero(~np.isfinite(losses))[:1]:
                step = begin + int(n) + 1
                self._check_finite(i, {"training_loss": losses[n]}, step, saved)

    def _check_finite(self, i: int, values: Row, step: int, saved: int | None) -> bool:
        """Whether a member goes on; raises the error of the last one that does not."""
        if i in self.failed:
            return False
        whose = f" of {self.members[i].paths.root}" if len(self.members) > 1 else ""
        try:
            for name, value in values.items():
                what = f"the {name.replace('_', ' ')}{whose}"
                check_finite(what, float(value), step, saved)
        except UserError as error:
            self.failed[i] = error
            if len(self.failed) == len(self.members):
                raise UserError("; ".join(map(str, self.failed.values()))) from error
            _LOG.warning("%s; the other members go on", error)
        return i not in self.failed

    def _save(self, state) -> None:
        # All of the last step before any of this one: a kill then leaves members no
        # more than one interval apart.
        for manager in self.managers:
            manager.wait_until_finished()
        members = zip(self.managers, self.population.split(state), strict=True)
        for i, (manager, own) in enumerate(members):
            if i not in self.failed:
                checkpoint.save(manager, own)

    def _record(
        self,
        state,
        step: int,
        saved: int | None,
        measured: Any = None,
        before: Any = None,
        evaluates: bool = True,
    ) -> None:
        """Writes the rows of metrics of all members as they are now.

        Args:
          state: of the population.
          step: updates done.
          saved: the step of the newest checkpoint.
          measured: metrics of the last update, or of the last chunk of them.
          before: the population just before the rewire of the last update.
          evaluates: whether test loss and accuracy belong in the row.
        """
        nothing = [{}] * len(self.members)
        found = zip(
            nothing if measured is None else self._of_members(measured),
            nothing if before is None else self._probe(before),
            self._probe(state),
            evaluate(self.population, state, self.data.test) if evaluates else nothing,
            strict=True,
        )
        rows = []
        for i, (trained, rewired, probed, tested) in enumerate(found):
            values = {k: float(np.atleast_1d(v)[-1]) for k, v in trained.items()}
            own = {k: int(n) for k, n in probed.pop("n_active").items()}
            n_active = {k: own.get(k, size) for k, size in self.sizes.items()}
            values |= {k: float(v) for k, v in probed.items()} | tested
            if rewired:
                values["gradient_norm_before"] = float(rewired["gradient_norm"])
                values["gradient_norm_after"] = values["gradient_norm"]
            if not self._check_finite(i, values, step, saved):
                continue
            fraction = self.drop_fraction[i]
            row = {
                "step": step,
                "seed": self.members[i].job.seed,
                "loss": values.pop("loss", None),
                "accuracy": values.pop("accuracy", None),
                "learning_rate": float(self.learning_rate[i][step]),
                **values,
                "drop_fraction": None if fraction is None else float(fraction[step]),
                "density": sum(n_active.values()) / sum(self.sizes.values()),
                **{f"density/{k}": n / self.sizes[k] for k, n in n_active.items()},
            }
            self.writers[i].write(row)
            rows.append(row)
        self.progress.report(rows)
