"""How a configuration trains: schedules, the optimizer, and the method of its masks.

A rule, a way to prune at initialisation or a parameterization is a function in a dict;
`options.call` gives it what it asks for by name. What there is to give:

    n_active            weights that stay active, by layer; as n_active_forward too,
                        and twice as many as n_active_backward
    final_sparsity      the same as a share of each layer, before rounding
    total_sparsity      the same of all layers together
    is_due              the steps that rewire
    begin end interval  of those steps
    fraction            step -> share of the active weights to drop
    timing granularity  see `rules`
    warmup              step -> factor of a penalty
    kl_scale            1 / number of training examples
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax
from ml_collections import ConfigDict

from lottery_flow import limits, options
from lottery_flow.errors import UserError
from lottery_flow.sparsity import granularity as granularity_lib
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import schedules, tickets
from lottery_flow.sparsity.at_init import METHODS, PruneAtInit
from lottery_flow.sparsity.granularity import Granularity
from lottery_flow.sparsity.methods import PRUNING, RULES
from lottery_flow.sparsity.parameterization import Parameterization
from lottery_flow.sparsity.parameterizations import PARAMETERIZATIONS
from lottery_flow.sparsity.rules import Rule
from lottery_flow.sparsity.rules_growth import with_grown


def decay(config: ConfigDict) -> optax.Schedule:
    """The learning rate over its peak."""
    whole, first = _whole_decay(config), _first_step(config)
    return whole if not first else lambda step: whole(step + first)


def _whole_decay(config) -> optax.Schedule:
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
    if not takes(config, "fraction"):
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
    config: ConfigDict,
    learning_rate: optax.Schedule,
    decayed: Callable = masks_lib.in_layers,
) -> optax.GradientTransformation:
    """The optimizer; `decayed` says of what is trained which leaves decay."""
    optim = config.optim
    decay = optax.add_decayed_weights(optim.weight_decay, mask=decayed)
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


class Known(NamedTuple):
    """What a configuration says of the layers that can be sparse.

    Attributes:
      sizes: weights of each layer.
      n_active: those that stay active.
      final_sparsity: `() ->` the share of the others, by layer, before it is rounded
        to whole weights.
      n_train: training examples.
    """

    sizes: Mapping[str, int]
    n_active: Mapping[str, int]
    final_sparsity: Callable[[], Mapping[str, float]]
    n_train: int


def rule(config: ConfigDict, known: Known, fraction: optax.Schedule | None) -> Rule:
    """When and how masks change.

    Args:
      config: all fields.
      known: of the layers.
      fraction: of the active weights to drop, for the rules that take one.
    """
    sparsity = config.sparsity
    given = _given(config, known) | {"fraction": lambda: fraction}
    field, text = "sparsity.rule_options", sparsity.rule_options
    made = options.call(field, RULES[sparsity.rule], given, text)
    if sparsity.grow_init == "zeros":
        return made
    try:
        return with_grown(made, sparsity.grow_init, sparsity.grow_init_divisor)
    except ValueError as error:
        raise UserError(
            f"sparsity.grow_init={sparsity.grow_init!r}: {error}"
        ) from error


def at_init(config: ConfigDict) -> PruneAtInit:
    """How masks are chosen before training."""
    name = config.sparsity.at_init
    field, text = "sparsity.at_init_options", config.sparsity.at_init_options
    asked = options.parse(field, text)
    known = PruneAtInit._fields[2:]  # but its name and its score
    for option, value in asked.items():
        if option not in known:
            raise UserError(
                f"{field}: {option} is no option here; there are {', '.join(known)}"
            )
        own = getattr(METHODS[name], option)
        if type(value) is not type(own):
            raise UserError(
                f"{field}: {option}={value!r} is not of the kind of its default "
                f"{own!r}; give one that is"
            )
    chosen = METHODS[name]._replace(**asked)
    limits.known(f"{field}: scope", chosen.scope, ("layer", "global"))
    limits.at_least(f"{field}: rounds", chosen.rounds, 1)
    limits.at_most(f"{field}: rounds", chosen.rounds, 10_000)
    limits.at_least(f"{field}: n_examples", chosen.n_examples, 0)
    return chosen


def parameterization(config: ConfigDict, known: Known) -> Parameterization | None:
    """What is trained instead of the weights; None: the weights themselves."""
    name = config.sparsity.parameterization
    if not name:
        return None
    field, text = "parameterization_options", config.sparsity.parameterization_options
    make, given = PARAMETERIZATIONS[name], _given(config, known)
    return options.call(f"sparsity.{field}", make, given, text)


def total_steps(config: ConfigDict) -> int:
    """Steps of a run; those that follow a round of pruning begin later."""
    own, steps = config.tickets, config.train.total_steps
    return steps - own.rewind_steps if own.level else steps


def rate_of_round(config: ConfigDict) -> float:
    """The share of the active weights that a round of pruning removes."""
    own = config.tickets
    return own.rate or 1.0 - (1.0 - config.sparsity.sparsity) ** (1.0 / own.rounds)


def _first_step(config) -> int:
    """The step of the learning rate's schedule that a run begins at."""
    own, steps = config.tickets, config.train.total_steps
    if not own.level:
        return 0
    return tickets.first_step(
        own.rewind, own.level, rewind_step=own.rewind_steps, n_steps=steps
    )


def granularity(config: ConfigDict) -> Granularity | None:
    """What is kept or dropped as one; None: single weights."""
    text = config.sparsity.granularity
    if not text:
        return None
    if text == "channel":
        return granularity_lib.channel()
    found = re.fullmatch(r"(\d+):(\d+)|block(\d+)x(\d+)", text)
    if not found:
        raise UserError(
            f"sparsity.granularity={text!r} is unknown; write '' for single weights, "
            "2:4, block4x4 or channel"
        )
    make = granularity_lib.n_of_m if found[1] else granularity_lib.block
    try:
        return make(*(int(number) for number in found.groups() if number))
    except ValueError as error:
        raise UserError(f"sparsity.granularity={text!r}: {error}") from error


def starts_full(config: ConfigDict) -> bool:
    """Whether the layers that will be sparse begin with all of their weights."""
    prunes = config.sparsity.rule in PRUNING or config.tickets.rounds > 0
    return prunes or bool(config.sparsity.parameterization)


def holds_counts(config: ConfigDict) -> bool:
    """Whether the program of a step knows how many weights shall be active."""
    sparsity = config.sparsity
    names = set(options.arguments(RULES[sparsity.rule]))
    if sparsity.parameterization:
        names |= set(options.arguments(PARAMETERIZATIONS[sparsity.parameterization]))
    return any(name in names for name in _COUNTS)


def takes(config: ConfigDict, argument: str) -> bool:
    """Whether the rule asks for an argument."""
    return argument in options.arguments(RULES[config.sparsity.rule])


_COUNTS = (
    *("n_active", "n_active_forward", "n_active_backward"),
    *("final_sparsity", "total_sparsity"),
)


def _given(config: ConfigDict, known: Known) -> dict[str, Any]:
    """By name of an argument, what returns it."""
    sparsity = config.sparsity
    sparse = {k: n for k, n in known.n_active.items() if n != known.sizes[k]}

    def is_due():
        end = None if sparsity.end_steps == -1 else sparsity.end_steps
        return schedules.every(sparsity.interval_steps, sparsity.begin_steps, end)

    def total_sparsity():
        return 1.0 - sum(sparse.values()) / sum(known.sizes[k] for k in sparse)

    def final_sparsity():
        return {k: v for k, v in known.final_sparsity().items() if k in sparse}

    def n_active_backward():
        return {k: min(2 * n, known.sizes[k]) for k, n in sparse.items()}

    def warmup():
        steps = sparsity.penalty_warmup_steps
        return optax.linear_schedule(0.0, 1.0, steps) if steps else None

    return {
        "n_active": lambda: sparse,
        "n_active_forward": lambda: sparse,
        "n_active_backward": n_active_backward,
        "final_sparsity": final_sparsity,
        "total_sparsity": total_sparsity,
        "is_due": is_due,
        "begin": lambda: sparsity.begin_steps,
        "end": lambda: sparsity.end_steps,
        "interval": lambda: sparsity.interval_steps,
        "timing": lambda: sparsity.timing,
        "granularity": lambda: granularity(config),
        "warmup": warmup,
        "kl_scale": lambda: 1.0 / known.n_train,
    }


def _schedule_steps(config) -> int:
    return config.optim.schedule_steps or config.train.total_steps
