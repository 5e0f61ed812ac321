"""The host loop of one run: restore, step, log, evaluate, save.

Killed at any instant and started again, a run ends with the same bits as one that
was never interrupted: batches, keys and the choice of the program are functions of
the step, a row of metrics is on the disk before the checkpoint that follows it, and
rows after the restored checkpoint are forgotten.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow import checkpoint, data, metrics, runs
from lottery_flow.data import arrays
from lottery_flow.evaluate import evaluate
from lottery_flow.job import Job
from lottery_flow.metrics import Row, check_finite
from lottery_flow.progress import Progress
from lottery_flow.runs import Fields, RunPaths
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.rules import is_rewire
from lottery_flow.state import TrainState, create
from lottery_flow.steps import Steps, compile_steps

_LOG = logging.getLogger(__name__)


class Result(NamedTuple):
    """A finished run: its last state, and all its rows of metrics."""

    state: TrainState
    rows: list[Row]


def train(
    job: Job, paths: RunPaths, record: Fields, *, tensorboard: bool = False
) -> Result:
    """Trains until `job.total_steps`, going on from the newest checkpoint.

    Args:
      job: what to train.
      paths: where it is kept; made once the data and the network are there.
      record: the contents of config.json.
      tensorboard: write TensorBoard files too.

    Raises:
      UserError: data, masks or weights that are missing; a damaged checkpoint; a loss
        that is not finite any more.
    """
    dataset = job.load_data()
    steps_kept = checkpoint.steps_in(paths.checkpoints)
    restored = steps_kept[-1] if steps_kept else None
    if restored is None:
        network = job.make_network()
    else:
        # Its masks say which leaves are sparse, so that a run goes on even if the run
        # that its masks came from is gone.
        _LOG.info("going on from the checkpoint of step %d", restored)
        _, network = checkpoint.restore_network(paths.checkpoints, restored)
    tx = job.make_tx(network.masks)
    start = network.params, network.batch_stats, job.step_key
    runs.claim(paths, record)
    manager = checkpoint.manager(paths.checkpoints, job.keep_checkpoints)
    # Whatever can fail comes before the metrics are opened, which forgets rows.
    if restored is None:
        state = jax.jit(partial(create, tx))(*start)
    else:
        like = jax.eval_shape(partial(create, tx), *start)
        state = checkpoint.restore(manager, restored, like)
    with (
        manager,
        Progress(job.total_steps, restored or 0) as progress,
        metrics.Writer(
            paths.metrics,
            -1 if restored is None else restored,
            paths.tensorboard if tensorboard else None,
        ) as writer,
    ):
        loop = _Loop(
            job,
            dataset,
            compile_steps(
                job.model.apply, tx, job.rule.timing, job.spec.mean, job.spec.std
            ),
            manager,
            writer,
            progress,
            rewires=_table(partial(is_rewire, job.rule), job.total_steps),
            learning_rate=_table(job.learning_rate, job.total_steps),
            drop_fraction=None
            if job.drop_fraction is None
            else _table(job.drop_fraction, job.total_steps),
        )
        state = loop.run(state, restored)
    return Result(state, writer.rows)


def _table(schedule: Callable, total_steps: int) -> np.ndarray:
    """The values of a schedule at steps 0 to total_steps, on the host."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(total_steps + 1)))


class _Loop(NamedTuple):
    """What stays the same from step to step."""

    job: Job
    dataset: data.Arrays
    steps: Steps
    manager: Any
    writer: metrics.Writer
    progress: Progress
    rewires: np.ndarray  # whether the update after n others rewires
    learning_rate: np.ndarray
    drop_fraction: np.ndarray | None

    def run(self, state: TrainState, restored: int | None) -> TrainState:
        job = self.job
        n_probe, n_grow = job.probe_examples, job.grow_examples
        probe = self._batch(np.arange(n_probe))
        grow = self._batch(np.arange(n_probe, n_probe + n_grow)) if n_grow else None
        saved = restored
        if restored is None:
            self._record(state, {}, probe, saved)
            checkpoint.save(self.manager, state)
            saved = 0
        pending = None
        for step in range(restored or 0, job.total_steps):
            batch = self._batch(self._indices(step))
            if self.rewires[step]:
                state, measured = self.steps.rewire(state, batch, probe, grow)
            else:
                state, measured = self.steps.train(state, batch)
            # One step late, so that the device never waits for the host.
            if pending is not None:
                check_finite("the training loss", float(pending), step, saved)
            pending = measured["loss"]
            done = step + 1
            self.progress.advance(done)
            last = done == job.total_steps
            saves = last or done % job.checkpoint_every == 0
            evaluates = last or (job.eval_every and done % job.eval_every == 0)
            if saves or evaluates or self.rewires[step] or done % job.log_every == 0:
                self._record(state, measured, probe, saved, bool(evaluates))
            if saves:
                checkpoint.save(self.manager, state)
                saved = done
        return state

    def _indices(self, step: int) -> np.ndarray:
        n_train = self.job.spec.n_train
        return arrays.batch_indices(self.job.seed, step, n_train, self.job.batch_size)

    def _batch(self, indices: np.ndarray):
        dataset = self.dataset
        return arrays.gather(dataset.train_images, dataset.train_labels, indices)

    def _record(
        self, state, measured, probe, saved: int | None, evaluates: bool = True
    ) -> None:
        """Writes the row of metrics of the network as it is now."""
        step = int(state.step)
        values = {k: float(v) for k, v in measured.items()}
        values |= {k: float(v) for k, v in self.steps.probe(state, probe).items()}
        for name, value in values.items():
            check_finite(name.replace("_", " "), value, step, saved)
        sizes = {k: v.size for k, v in masks_lib.layers(state.params).items()}
        n_active = masks_lib.counts(state.masks, state.params)
        fraction = self.drop_fraction
        row = {
            "step": step,
            "seed": self.job.seed,
            "loss": values.pop("loss", None),
            "accuracy": values.pop("accuracy", None),
            "learning_rate": float(self.learning_rate[step]),
            **values,
            "drop_fraction": None if fraction is None else float(fraction[step]),
            "density": sum(n_active.values()) / sum(sizes.values()),
            **{f"density/{k}": n / sizes[k] for k, n in n_active.items()},
        }
        if evaluates:
            split = self.dataset.test_images, self.dataset.test_labels
            batches = arrays.padded_batches(*split, self.job.eval_batch_size)
            tested = evaluate(self.steps.evaluate, state, batches)
            check_finite("the test loss", tested["test_loss"], step, saved)
            row |= tested
        self.writer.write(row)
        self.progress.report(row)
