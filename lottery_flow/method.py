"""How a configuration trains: schedules, the optimizer, and the rule of its masks."""

from typing import Any

import optax
from ml_collections import ConfigDict

from lottery_flow.errors import UserError
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules, schedules
from lottery_flow.sparsity.rules import Rule


def decay(config: ConfigDict) -> optax.Schedule:
    """The learning rate over its peak."""
    warmup = config.optim.warmup_steps
    if config.optim.schedule == "constant":
        after = optax.constant_schedule(1.0)
    elif config.optim.schedule == "step":
        factor = config.optim.decay_factor
        after = optax.piecewise_constant_schedule(
            1.0, {step - warmup: factor for step in config.optim.milestone_steps}
        )
    else:
        after = optax.cosine_decay_schedule(1.0, _schedule_steps(config) - warmup)
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, warmup), after], [warmup]
    )


def fade(config: ConfigDict, decay: optax.Schedule) -> optax.Schedule | None:
    """The drop fraction over its first value; None where nothing is dropped."""
    sparsity = config.sparsity
    if sparsity.rule in ("static", "gradual_pruning"):
        return None
    if sparsity.drop_schedule == "constant":
        return schedules.constant(1.0)
    if sparsity.drop_schedule == "cosine":
        end = _schedule_steps(config) if sparsity.end_steps < 0 else sparsity.end_steps
        return schedules.cosine(1.0, max(end, 1))
    if config.optim.warmup_steps:
        raise UserError(
            "sparsity.drop_schedule='learning_rate' divides by the first learning "
            f"rate, which optim.warmup_steps={config.optim.warmup_steps} makes zero; "
            "take cosine"
        )
    return schedules.follow_learning_rate(1.0, decay)


def scaled(schedule: optax.Schedule, factor: Any) -> optax.Schedule:
    """The schedule times a number, which may differ between members."""
    return lambda step: factor * schedule(step)


def optimizer(
    config: ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    optim = config.optim
    decay = optax.add_decayed_weights(
        optim.weight_decay,
        mask=masks_lib.in_layers,
    )
    step = optax.scale_by_learning_rate(learning_rate)
    trace = optax.trace(optim.momentum, nesterov=optim.nesterov)
    chains = {
        # Keras keeps the rate inside the buffer, which differs once it decays.
        "keras_momentum": (decay, step, trace),
        "momentum": (decay, trace, step),
        "adam": (decay, optax.scale_by_adam(), step),
        "adamw": (optax.scale_by_adam(), decay, step),
    }
    return optax.chain(*chains[optim.name])


def rule(
    config: ConfigDict,
    layer_sparsity: dict[str, float],
    fraction: optax.Schedule | None,
) -> Rule:
    """When and how masks change.

    Args:
      config: all fields.
      layer_sparsity: at the end of gradual pruning.
      fraction: of the active weights to drop, for the rules that drop any.
    """
    sparsity = config.sparsity
    if sparsity.rule == "static":
        return rules.static()
    if sparsity.rule == "gradual_pruning":
        return rules.gradual_pruning(
            begin=sparsity.begin_steps,
            end=sparsity.end_steps,
            interval=sparsity.interval_steps,
            final_sparsity=layer_sparsity,
        )
    assert fraction is not None
    end = None if sparsity.end_steps == -1 else sparsity.end_steps
    due = schedules.every(sparsity.interval_steps, sparsity.begin_steps, end)
    make = {"set": rules.set_, "rigl": rules.rigl, "rigl_inverted": rules.rigl_inverted}
    return make[sparsity.rule](due, fraction, timing=sparsity.timing)


def _schedule_steps(config) -> int:
    return config.optim.schedule_steps or config.train.total_steps
