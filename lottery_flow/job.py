"""A run as plain values: what `build` makes of a configuration and `train` trains.

Jobs that differ in nothing but their members' own fields (`seed`, `data_seed`,
`make_network`, the keys and the knobs) can be trained together, as a population.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from lottery_flow import augment, data, models, state
from lottery_flow.parallel import Devices
from lottery_flow.sparsity import reparameterize
from lottery_flow.sparsity.parameterization import Parameterization
from lottery_flow.sparsity.rules import Rule
from lottery_flow.sparsity.transform import sparsify
from lottery_flow.state import TrainState
from lottery_flow.steps import Steps, make_steps


class Job(NamedTuple):
    """One run, as plain values.

    Attributes:
      seed: of the run.
      setting: what all members of a population share, as comparable values.
      data_seed: of the order of the training examples.
      model: see `models.Model`.
      spec: of the data set.
      load_data: reads it.
      workers: processes that decode images, where they are not in memory.
      augment: of images in memory, see `augment`.
      label_smoothing, norm_examples, accumulate_steps, ema_decay: see `make_steps`.
      rule: how the topology changes.
      parameterization: what is trained instead of the weights, or None.
      make_method: `(knobs) -> (optimizer, rule)`; the knobs may be traced.
      knobs: float32 scalars that members may differ in, {} of `learning_rate` (the
        peak) and `drop_fraction` (the first).
      make_network: `(dataset=None) -> checkpoint.Network`, the network before the first
        step; reads the run that masks or weights come from, and looks at training
        examples if they are pruned by.
      rewire_key: typed key of the rule.
      step_key: typed key of the train state.
      learning_rate: step -> rate.
      drop_fraction: step -> fraction, None where nothing is dropped.
      skip_nonfinite: an update that is not finite is skipped, see `make_steps`.
      execution, storage: see `plans`.
      total_steps, batch_size, ...: the fields of the same names.
    """

    seed: int
    setting: Any
    data_seed: int
    model: models.Model
    spec: data.Spec
    load_data: Callable[[], data.Dataset]
    workers: int
    augment: str
    label_smoothing: float
    norm_examples: int
    accumulate_steps: int
    ema_decay: float
    rule: Rule
    parameterization: Parameterization | None
    make_method: Callable
    knobs: dict[str, Any]
    make_network: Callable
    rewire_key: Any
    step_key: Any
    learning_rate: optax.Schedule
    drop_fraction: optax.Schedule | None
    total_steps: int
    batch_size: int
    probe_examples: int
    grow_examples: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    eval_every: int
    eval_batch_size: int
    population: str
    devices: Devices
    chunk_steps: int
    execution: str
    storage: str
    skip_nonfinite: bool

    def make_steps(self) -> Steps:
        """What is done to a network of this run, see `steps`."""
        spec, apply = self.spec, self.model.apply
        return make_steps(
            apply,
            self.make_method,
            spec.mean,
            spec.std,
            label_smoothing=self.label_smoothing,
            norm_examples=self.norm_examples,
            accumulate_steps=self.accumulate_steps,
            ema_decay=self.ema_decay,
            parameterization=self.parameterization,
            skip_nonfinite=self.skip_nonfinite,
        )

    def draws(self, step: int) -> Any:
        """The examples of a step, from data in memory, see `augment.draws`."""
        n, b = self.spec.n_train, self.batch_size
        return augment.draws(self.augment, self.data_seed, step, n, b)

    def create(self, network: Any, rewire_key, step_key, knobs) -> TrainState:
        """The state of a `checkpoint.Network` before the first step."""
        inner, rule = self.make_method(knobs)
        params, stats, ema = network.params, network.batch_stats, self.ema_decay > 0
        if self.parameterization is None:
            tx = sparsify(inner, network.masks, rule, key=rewire_key)
            found = state.create(tx, params, stats, step_key, ema=ema)
        else:
            params, opt_state = reparameterize.init(
                self.parameterization, inner, params, network.masks, key=rewire_key
            )
            found = state.begin(params, opt_state, stats, step_key, ema=ema)
        if self.skip_nonfinite:
            found = found._replace(skipped=jnp.zeros((), jnp.int32))
        return found
