"""The host loop: step, log, evaluate, save; for all members of a population at once."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lottery_flow import checkpoint, metrics
from lottery_flow import plans as plans_lib
from lottery_flow.errors import UserError
from lottery_flow.evaluate import evaluate
from lottery_flow.feed import Data
from lottery_flow.job import Job
from lottery_flow.metrics import Row, check_finite
from lottery_flow.population import Population
from lottery_flow.progress import Progress
from lottery_flow.runs import Fields, RunPaths
from lottery_flow.state import TrainState, not_finite
from lottery_flow.stopping import Stopped
from lottery_flow.storage import Storage

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


class Loop(NamedTuple):
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
    has_row: np.ndarray  # whether there is a row after n updates
    learning_rate: list[np.ndarray]
    drop_fraction: list[np.ndarray | None]
    paths: dict[str, str]  # of layers, see `plans`; {}: all are dense
    storage: Storage
    asked_to_stop: Callable[[], bool]
    failed: dict[int, UserError]  # members that diverged; they leave no more traces

    def run(self, state: Any, start: int) -> Any:
        """From the state after `start` updates to that after all of them.

        Stops early where no member is left that has not diverged.

        Raises:
          Stopped: it was asked to end; the state is saved.
        """
        job, saved = self.job, start
        if start == 0:
            self._record(state, 0, None)
            self._save(state)
        pending: tuple[Any, int] | None = None
        done = start
        streamed = self.data.stream
        batches = None if streamed is None else streamed(start)
        plans, storage = self._plans(state), self.storage
        while done < job.total_steps and len(self.failed) < len(self.members):
            if self.asked_to_stop():
                self._check(state, pending, saved)
                self._save(storage.unpack(state, plans))
                raise Stopped(f"stopped after step {done}, which is saved")
            begin, end = done, self._end(done)
            rewires = bool(self.rewires[begin])
            if batches is not None:
                examples = next(batches), None
            else:
                examples = self.data.train, self._indices(begin, end)
            args = self.knobs, *examples
            before = None
            if rewires:
                state = storage.unpack(state, plans)
                state, measured, before = self.population.rewire(
                    state, *args, self.data.grow
                )
                plans = self._plans(state)
            else:
                alone = self.chunk == 1
                train = self.population.train if alone else self.population.chunk
                own = {} if plans is None else {"plans": plans}
                state = storage.pack(state, plans)
                state, measured = train(state, *args, **own)
            done = end
            # One late, so that the device never waits for the host.
            self._check(state, pending, saved)
            pending = measured, begin
            self.progress.advance(done)
            last = done == job.total_steps
            saves = last or done % job.checkpoint_every == 0
            evaluates = last or (job.eval_every and done % job.eval_every == 0)
            if self.has_row[done]:
                self._check(state, pending, saved)
                pending = None
                state = storage.unpack(state, plans)
                self._record(state, done, saved, measured, before, bool(evaluates))
            if saves:
                self._save(state)
                saved = done
        return state

    def _plans(self, state) -> list[Any] | None:
        """Where the active weights of each member lie, after a rewire anew."""
        compact = self.storage.is_compact
        if not self.paths and not compact:
            return None
        return [
            plans_lib.of_masks(self.paths, member.masks, compact=compact)
            for member in self.population.split(state)
        ]

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
        """The examples of the updates from `begin` on: [n s ...], less axes of one."""
        members = self.members[:1] if self.shared else self.members
        indices = np.stack(
            [[run.job.draws(t) for run in members] for t in range(begin, end)]
        )
        indices = indices[:, 0] if self.shared else indices
        alone = self.chunk == 1 or self.rewires[begin]
        return indices[0] if alone else indices

    def _of_members(self, metrics_: Any) -> list[Any]:
        return jax.device_get(self.population.split(metrics_))

    def _probe(self, state) -> list[Any]:
        return self._of_members(self.population.probe(state, self.data.probe))

    def _evaluate(self, state) -> list[dict[str, float]]:
        return evaluate(self.population, state, self.data.test())

    def _check(self, state, pending: tuple[Any, int] | None, saved: int | None) -> None:
        """Looks for losses that are not finite, in metrics and the updates before."""
        if pending is None:
            return
        measured, begin = pending
        # The losses alone: this is fetched at every step.
        split = [m["loss"] for m in self.population.split(measured)]
        fetched = jax.device_get(split)
        if self.job.skip_nonfinite:
            return  # such updates were not applied
        for i, losses in enumerate(map(np.atleast_1d, fetched)):
            for n in np.flatnonzero(~np.isfinite(losses))[:1]:
                step = begin + int(n) + 1
                self._check_finite(state, i, {"training_loss": losses[n]}, step, saved)

    def _check_finite(
        self, state, i: int, values: Row, step: int, saved: int | None
    ) -> bool:
        """Whether a member goes on; notes why, where it does not."""
        if i in self.failed:
            return False
        whose = f" of {self.members[i].paths.root}" if len(self.members) > 1 else ""
        try:
            for name, value in values.items():
                what = f"the {name.replace('_', ' ')}{whose}"
                check_finite(
                    what,
                    float(value),
                    step,
                    saved,
                    lambda: not_finite(self.population.split(state)[i].params),
                )
        except UserError as error:
            self.failed[i] = error
            if len(self.failed) < len(self.members):
                _LOG.warning("%s; the other members go on", error)
        return i not in self.failed

    def _skipped(self, i: int, step: int, values: Row) -> Row:
        """The column of updates that were skipped; the last one then has no loss."""
        if not self.job.skip_nonfinite:
            return {}
        n, rows = int(values.pop("skipped", 0)), self.writers[i].rows
        if n > (rows[-1].get("skipped", 0) if rows else 0):
            _LOG.warning(
                "%s: %d of %d updates were not finite and skipped",
                *(self.members[i].paths.root, n, step),
            )
        if not np.isfinite(values.get("loss", 0.0)):
            del values["loss"], values["accuracy"]
        return {"skipped": n}

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
            self._evaluate(state) if evaluates else nothing,
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
            skipped = self._skipped(i, step, values)
            if not self._check_finite(state, i, values, step, saved):
                continue
            fraction = self.drop_fraction[i]
            row = {
                "step": step,
                "seed": self.members[i].job.seed,
                "loss": values.pop("loss", None),
                "accuracy": values.pop("accuracy", None),
                "learning_rate": float(self.learning_rate[i][step]),
                **values,
                **skipped,
                "drop_fraction": None if fraction is None else float(fraction[step]),
                "density": sum(n_active.values()) / sum(self.sizes.values()),
                **{f"density/{k}": n / self.sizes[k] for k, n in n_active.items()},
            }
            self.writers[i].write(row)
            rows.append(row)
        if rows:
            self.progress.report(rows)
