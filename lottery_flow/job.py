"""A run as plain values: what `build` makes of a configuration and `train` trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from lottery_flow import data, models
from lottery_flow.sparsity.rules import Rule


class Job(NamedTuple):
    """One run, as plain values.

    Attributes:
      seed: of the run.
      model: see `models.Model`.
      spec: of the data set.
      load_data: reads it.
      rule: how the topology changes.
      make_tx: `(masks) -> optax transformation`.
      make_network: `() -> checkpoint.Network`, the network before the first step;
        reads the run that masks or weights come from.
      step_key: typed key of the train state.
      learning_rate: step -> rate.
      drop_fraction: step -> fraction, None where nothing is dropped.
      total_steps, batch_size, ...: the fields of the same names.
    """

    seed: int
    model: models.Model
    spec: data.Spec
    load_data: Callable[[], data.Arrays]
    rule: Rule
    make_tx: Callable
    make_network: Callable
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
