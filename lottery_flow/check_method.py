"""What the parts of a method may say together: one sentence for each mistake."""

from ml_collections import ConfigDict

from lottery_flow import config as config_lib
from lottery_flow import limits, method, options
from lottery_flow.errors import UserError
from lottery_flow.sparsity import distributions
from lottery_flow.sparsity.at_init import METHODS
from lottery_flow.sparsity.execution_choice import PATHS
from lottery_flow.sparsity.methods import CONSERVING, PRUNING
from lottery_flow.sparsity.parameterizations import PARAMETERIZATIONS
from lottery_flow.sparsity.ticket_criteria import TICKET_CRITERIA
from lottery_flow.sparsity.ticket_weights import TREATMENTS


def methods(config: ConfigDict) -> None:
    """Raises UserError where the parts of a method do not go together."""
    sparsity = config.sparsity
    prunes = sparsity.rule in PRUNING
    if sparsity.at_init:
        limits.known("sparsity.at_init", sparsity.at_init, METHODS)
        method.at_init(config)
        field = f"sparsity.at_init={sparsity.at_init!r}"
        if method.starts_full(config):
            raise UserError(
                f"{field}: {sparsity.parameterization or sparsity.rule} starts from "
                "all weights; leave one of them out"
            )
        for other in ("masks_from", "granularity"):
            if sparsity[other]:
                raise UserError(
                    f"{field} chooses single weights itself, but "
                    f"sparsity.{other}={sparsity[other]!r}; leave that empty"
                )
    elif sparsity.at_init_options or sparsity.fresh_weights:
        raise UserError(
            f"sparsity.at_init_options={sparsity.at_init_options!r}, "
            f"sparsity.fresh_weights={sparsity.fresh_weights}: nothing is pruned at "
            "initialisation; give sparsity.at_init, or leave them at their defaults"
        )
    if sparsity.parameterization:
        limits.known(
            "sparsity.parameterization", sparsity.parameterization, PARAMETERIZATIONS
        )
        field = f"sparsity.parameterization={sparsity.parameterization!r}"
        what = f"{field} decides itself which weights are active"
        _leave(what, sparsity, "rule", "grow_init")
        if not sparsity.sparsity:
            raise UserError(
                f"{field}: sparsity.sparsity=0.0 makes no layer sparse; give a "
                "sparsity above 0 (which methods without a given number of weights "
                "only take for a yes)"
            )
    elif sparsity.parameterization_options:
        raise UserError(
            "sparsity.parameterization_options="
            f"{sparsity.parameterization_options!r}: there is no parameterization; "
            "leave it empty"
        )
    if sparsity.grow_init != "zeros" and (prunes or sparsity.rule == "static"):
        raise UserError(
            f"sparsity.grow_init={sparsity.grow_init!r}: {sparsity.rule} grows no "
            "weights; write zeros"
        )
    if sparsity.granularity and not (
        sparsity.rule == "static" or method.takes(config, "granularity")
    ):
        raise UserError(
            f"sparsity.granularity={sparsity.granularity!r}: {sparsity.rule} knows "
            "single weights alone; leave it empty"
        )
    if prunes and sparsity.masks_from:
        raise UserError(
            f"sparsity.masks_from={sparsity.masks_from!r}: {sparsity.rule} starts "
            "from full masks; leave it empty"
        )
    if prunes and sparsity.timing == "instead":
        raise UserError(
            f"sparsity.timing='instead': {sparsity.rule} prunes after the gradient "
            "step; write after"
        )


def execution(config: ConfigDict) -> None:
    """Raises UserError where weights that are active cannot stand for the layer."""
    how, kept = config.train.execution, config.train.storage
    limits.known("train.storage", kept, ("masked", "compact"))
    if how not in ("auto", *PATHS):
        options.parse("train.execution", how)
    for field, value, usual in (
        ("execution", how, "dense"),
        ("storage", kept, "masked"),
    ):
        if value == usual:
            continue
        field, sparsity = f"train.{field}={value!r}", config.sparsity
        if sparsity.rule not in CONSERVING or sparsity.parameterization:
            what = sparsity.parameterization or sparsity.rule
            raise UserError(
                f"{field} needs layers whose number of active weights stays the same, "
                f"which {what} changes; write {usual}"
            )
        if config.model.norm_examples:
            raise UserError(f"{field} knows no model.norm_examples; write {usual}")


def tickets(config: ConfigDict) -> None:
    """Raises UserError where rounds of pruning make no sense."""
    own, sparsity, train = config.tickets, config.sparsity, config.train
    limits.at_least("tickets.rounds", own.rounds, 0)
    limits.fraction("tickets.rate", own.rate)
    limits.at_least("tickets.rewind_steps", own.rewind_steps, 0)
    if not 0 <= own.level <= own.rounds:
        raise UserError(
            f"tickets.level={own.level} is set by the program; leave it at 0"
        )
    limits.known("tickets.scope", own.scope, ("layer", "global"))
    limits.known("tickets.criterion", own.criterion, TICKET_CRITERIA)
    limits.known(
        "tickets.rewind", own.rewind, ("weights", "learning_rate", "fine_tune")
    )
    limits.known("tickets.treatment", own.treatment, (*TREATMENTS, "reinit"))
    try:
        distributions.parse_layer_map(own.layer_rates)
    except ValueError as error:
        raise UserError(f"tickets.layer_rates: {error}") from error
    if own.treatment == "reinit":
        if own.treatment_options:
            raise UserError(
                f"tickets.treatment_options={own.treatment_options!r}: reinit has "
                "none; leave it empty"
            )
    else:
        options.check(
            "tickets.treatment_options",
            TREATMENTS[own.treatment],
            ("key", "params", "masks", "std"),
            own.treatment_options,
        )
    if not own.rounds:
        return
    what = f"tickets.rounds={own.rounds} prunes between trainings"
    _leave(what, sparsity, "rule", "at_init", "parameterization")
    if not sparsity.sparsity:
        raise UserError(
            f"tickets.rounds={own.rounds}: sparsity.sparsity=0.0 makes no layer "
            "sparse; give that of the last level (any above 0, with tickets.rate)"
        )
    if own.rewind_steps >= train.total_steps:
        raise UserError(
            f"tickets.rewind_steps={own.rewind_steps} leaves no step of "
            f"train.total_steps={train.total_steps}; go back further"
        )
    if own.rewind == "weights" and own.rewind_steps:
        if own.rewind_steps % train.checkpoint_every_steps or train.keep_checkpoints:
            raise UserError(
                f"tickets.rewind_steps={own.rewind_steps} needs the checkpoint of that "
                "step: make train.checkpoint_every_steps="
                f"{train.checkpoint_every_steps} a divisor, and "
                "train.keep_checkpoints=0 to keep all"
            )
    if own.rewind == "fine_tune" and config.optim.schedule == "cosine":
        raise UserError(
            "tickets.rewind='fine_tune' goes on with the last learning rate, which "
            "optim.schedule='cosine' makes zero; write step or constant"
        )


def _leave(what: str, sparsity: ConfigDict, *fields: str) -> None:
    """Raises UserError unless these fields, and those of masks, say nothing."""
    nothing = config_lib.default().sparsity
    for field in (*fields, "masks_from", "granularity", "shuffle_masks"):
        if sparsity[field] != nothing[field]:
            raise UserError(
                f"{what}, but sparsity.{field}={sparsity[field]!r}; leave that at "
                f"{nothing[field]!r}"
            )
