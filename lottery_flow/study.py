"""A finished run, opened to be analysed: its networks, data, and next rewire."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lottery_flow import (
    checkpoint,
    data,
    feed,
    parallel,
    population,
    recorded,
    runs,
    train,
)
from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import objective as objective_lib
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.objective import Objective
from lottery_flow.build import build, flat_fields
from lottery_flow.checkpoint import Network
from lottery_flow.errors import UserError
from lottery_flow.job import Job
from lottery_flow.loop import Run
from lottery_flow.sparsity.rules import is_rewire
from lottery_flow.steps import Batch, normalize


class Study(NamedTuple):
    """A network of a run, and what it was trained on.

    Attributes:
      run: the job, its directory and its record.
      config: of the run.
      step: of the network.
      network: params, batch_stats and masks, on the host.
    """

    run: Run
    config: ConfigDict
    step: int
    network: Network

    @property
    def job(self) -> Job:
        """What was trained."""
        return self.run.job

    @property
    def name(self) -> str:
        """The configuration's name and the seed."""
        return f"{self.config.name}, seed {self.job.seed}"

    def steps(self) -> list[int]:
        """Of all checkpoints, ascending."""
        return checkpoint.steps_in(self.run.paths.checkpoints)

    def at(self, step: int) -> "Study":
        """The same run at the checkpoint of another step, -1 being the newest."""
        step, network = checkpoint.restore_network(self.run.paths.checkpoints, step)
        return self._replace(step=step, network=network)

    def networks(self) -> Iterator[tuple[int, Network]]:
        """The network of each checkpoint, one at a time."""
        for step in self.steps():
            yield checkpoint.restore_network(self.run.paths.checkpoints, step)

    def objective(self, norms: str, weight_decay: float = 0.0) -> Objective:
        """Mean cross-entropy on uint8 images, see `analysis.objective`.

        Networks without statistics of norms have one objective in common, and what is
        compiled for it.
        """
        spec = self.job.spec
        if not self.network.batch_stats:
            own = self.job.model.apply, spec.mean, spec.std, norms, weight_decay
            return _objective_without_statistics(*own, self.job.label_smoothing)
        return objective_lib.classification(
            self.job.model.apply,
            self.network.batch_stats,
            norms=norms,
            weight_decay=weight_decay,
            label_smoothing=self.job.label_smoothing,
            preprocess=self.preprocess,
        )

    @property
    def preprocess(self) -> Any:
        """From uint8 images to what the model takes."""
        spec = self.job.spec
        return functools.partial(normalize, mean=spec.mean, std=spec.std)

    def train_batches(self, examples: int, batch_size: int) -> Batches:
        """The first training images, in the order of the data set; 0: all of them."""
        most = self.job.spec.n_train
        n = examples or most
        if n > most:
            raise UserError(
                f"--examples={n}: the data set has {most} training images; give at "
                "most as many, or 0 for all"
            )
        return _batches(data.examples(_load(self), "train", 0, n), batch_size)

    def test_batches(self, batch_size: int) -> Batches:
        """All test images."""
        n = self.job.spec.n_test
        return _batches(data.examples(_load(self), "test", 0, n), batch_size)

    def check_same_model(self, other: "Study") -> None:
        """Raises UserError unless the other run has the same model and data set."""
        same = "model.name", "model.widths", "model.width", "model.norm"
        for field in (*same, "data.name", "data.image_size"):
            mine, theirs = (flat_fields(s.config)[field] for s in (self, other))
            if mine != theirs:
                raise UserError(
                    f"--against={other.run.paths.root}: {field} is {theirs!r} there "
                    f"and {mine!r} in --run; give a run of the same model and data"
                )


def open_run(directory: str | Path, step: int = -1, data_dir: str = "") -> Study:
    """Opens a run.

    Args:
      directory: its seed_N directory.
      step: of a checkpoint; -1 is the newest.
      data_dir: where the data set is now; "" takes the configuration's.

    Raises:
      UserError: it is not the directory of a run, or has no such checkpoint.
    """
    directory = Path(directory)
    config, seed, _, record = recorded.read(directory)
    if data_dir:
        config.data.dir = data_dir
    run = Run(build(config, seed), runs.RunPaths(directory), record)
    step, network = checkpoint.restore_network(run.paths.checkpoints, step)
    return Study(run, config, step, network)


def next_rewire(study: Study) -> tuple[int, Network, Network]:
    """Trains on to the first rewire after the checkpoint, as the run did.

    Returns:
      Updates done, and the networks just before and just after the rewire, as in the
      row of metrics of that step.

    Raises:
      UserError: no rewire follows.
    """
    job, start = study.job, study.step
    rewires = train.table(functools.partial(is_rewire, job.rule), job)
    due = np.flatnonzero(rewires[: job.total_steps])
    if not np.any(due >= start):
        raise UserError(
            f"--step={start}: no rewire follows in {study.run.paths.root}; "
            + (f"the last one is at {due[-1] + 1}" if len(due) else "it has none")
        )
    last = int(due[due >= start][0])  # updates before the one that rewires
    pop = population.one_by_one(
        job.make_steps(), mesh=parallel.one_device(), shared=True
    )
    state = train.start(study.run, start, train.creation(job), pop.mesh)
    state, knobs = pop.join([state]), pop.join([job.knobs])
    own = feed.Data.of(job, _load(study), pop.mesh)
    examples = feed.steps(job, own, start)
    for _ in range(start, last):
        state, _ = pop.train(state, knobs, *next(examples))
    state, _, before = pop.rewire(state, knobs, *next(examples), own.grow)

    def network(state):
        own = pop.split(state)[0]
        return Network(own.params, own.batch_stats, own.masks)

    return last + 1, network(before), network(state)


@functools.lru_cache(maxsize=32)
def _objective_without_statistics(
    apply, mean, std, norms, weight_decay, label_smoothing
) -> Objective:
    return objective_lib.classification(
        apply,
        {},
        norms=norms,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        preprocess=functools.partial(normalize, mean=mean, std=std),
    )


@functools.lru_cache(maxsize=4)
def _dataset(name: str, directory: str, image_size: int) -> data.Dataset:
    return data.find(name, directory, image_size).load(directory)


def _load(study: Study) -> data.Dataset:
    own = study.config.data
    return _dataset(own.name, own.dir, own.image_size)


def _batches(examples: Batch, batch_size: int) -> Batches:
    on_device = {k: jnp.asarray(v) for k, v in examples.items()}
    return batches_lib.split(on_device, batch_size)
