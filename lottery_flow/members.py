"""Who is trained together: the members of a population, from one configuration.

    --config.train.seeds='(0,1,2)'
    --config.train.vary='model.init=masked_dense|per_neuron; optim.learning_rate=0.1'

makes six members: every combination of the seeds and the varied fields. Each is a run
of its own configuration, in a directory of its own, as if it had been trained alone.
"""

import copy
import itertools
from typing import Any

from ml_collections import ConfigDict

from lottery_flow import limits, method
from lottery_flow.errors import UserError
from lottery_flow.sparsity.methods import RULES
from lottery_flow.sparsity.parameterizations import PARAMETERIZATIONS

# Fields that change what a member starts from, or one of its numbers, but not the
# program that trains it.
OWN = (
    "data.order_seed",
    "model.init",
    "model.init_distribution",
    "model.init_fan",
    "model.init_gain",
    "optim.learning_rate",
    "sparsity.at_init",
    "sparsity.at_init_options",
    "sparsity.distribution",
    "sparsity.drop_fraction",
    "sparsity.fresh_weights",
    "sparsity.layer_sparsity",
    "sparsity.masks_from",
    "sparsity.masks_step",
    "sparsity.shuffle_masks",
    "sparsity.sparsity",
    "sparsity.weights_from",
    "sparsity.weights_step",
)
# Of a method whose program knows how many weights shall be active.
_COUNTS = ("sparsity.distribution", "sparsity.layer_sparsity", "sparsity.sparsity")


def own_fields(config: ConfigDict) -> tuple[str, ...]:
    """The fields that members with this configuration may differ in."""
    fixed = _COUNTS if method.holds_counts(config) else ()
    return tuple(name for name in OWN if name not in fixed)


def seeds(config: ConfigDict) -> tuple[int, ...]:
    """The seeds to train.

    Raises:
      UserError: none, one twice, or one that is no seed.
    """
    found = tuple(config.train.seeds)
    if not found or len(set(found)) != len(found):
        raise UserError(f"train.seeds={found}: give one or more seeds, each once")
    for seed in found:
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise UserError(
                f"train.seeds={found}: give whole numbers from 0 to 2^32 - 1"
            )
    return found


def members(config: ConfigDict) -> list[tuple[ConfigDict, int]]:
    """The configuration and the seed of every member.

    Raises:
      UserError: `train.vary` or `train.seeds` make no sense, or what they depend on.
    """
    # What decides which fields may vary, and how often members are trained.
    limits.known("sparsity.rule", config.sparsity.rule, RULES)
    limits.known(
        "sparsity.parameterization",
        config.sparsity.parameterization,
        ("", *PARAMETERIZATIONS),
    )
    limits.at_least("tickets.rounds", config.tickets.rounds, 0)
    varied = _varied(config)
    found = []
    for values in itertools.product(*varied.values()):
        own = copy.deepcopy(config)  # with the references between its fields
        with own.unlocked():
            own.update_from_flattened_dict(dict(zip(varied, values, strict=True)))
            own.train.vary = ""
        for name, value in zip(varied, values, strict=True):
            group, _, field = name.partition(".")
            if own[group][field] != value:
                raise UserError(
                    f"train.vary={config.train.vary!r}: {name} follows another varied "
                    "field in this configuration; vary one of them"
                )
        found += [(own.lock(), seed) for seed in seeds(config)]
    _check_devices(config, len(found))
    return found


def _check_devices(config: ConfigDict, n: int) -> None:
    how, devices = config.train.population, config.train.member_devices
    if devices > 1 and how == "one_by_one":
        raise UserError(
            f"train.member_devices={devices}: members that are trained one_by_one are "
            "on one device; write train.population=together"
        )
    if devices > 1 and n % devices:
        raise UserError(
            f"train.member_devices={devices} does not divide the {n} members; give a "
            "number that does, or 0"
        )


def _varied(config: ConfigDict) -> dict[str, list[Any]]:
    """{'optim.learning_rate': [0.05, 0.1], ...}, from `train.vary`."""
    text, varied = config.train.vary, {}
    for part in filter(str.strip, text.split(";")):
        name, equals, values = (s.strip() for s in part.partition("="))
        if not equals or name in varied:
            raise UserError(
                f"train.vary={text!r}: write field=value|value; field=value|value, "
                "each field once"
            )
        own = own_fields(config)
        if name not in own:
            raise UserError(
                f"train.vary={text!r}: {name} cannot differ between members that are "
                f"trained together; the fields that can are {', '.join(own)}"
            )
        group, _, field = name.partition(".")
        like = config[group][field]
        varied[name] = [_parse(name, v.strip(), like) for v in values.split("|")]
        if len(set(varied[name])) != len(varied[name]):
            raise UserError(f"train.vary={text!r}: {name} has a value twice")
    return varied


def _parse(name: str, text: str, like: Any) -> Any:
    """The value of a field, of the type of `like`."""
    if isinstance(like, bool):
        if text not in ("True", "False"):
            raise UserError(f"train.vary: {name}={text!r} is not True or False")
        return text == "True"
    try:
        return type(like)(text)
    except ValueError as error:
        kind = "a whole number" if isinstance(like, int) else "a number"
        raise UserError(f"train.vary: {name}={text!r} is not {kind}") from error
