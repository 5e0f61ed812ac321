"""What a configuration may say: one sentence for each mistake.

Each names the field, its value and what to write instead. `build` calls this before
anything is computed or written.
"""

import itertools
import re

from ml_collections import ConfigDict

from lottery_flow import (
    augment,
    check_kinds,
    check_method,
    data,
    limits,
    method,
    models,
    population,
)
from lottery_flow.errors import UserError
from lottery_flow.sparsity import distributions, initializers
from lottery_flow.sparsity.methods import RULES

OPTIMIZERS = ("keras_momentum", "momentum", "adam", "adamw")
DROP_SCHEDULES = ("learning_rate", "cosine", "constant")


def fields(config: ConfigDict) -> None:
    """Raises UserError at the first field that makes no sense."""
    check_kinds.fields(config)
    if not re.fullmatch(r"\w[\w.-]{,99}", config.name):
        raise UserError(
            f"name={config.name!r} cannot name a directory; give up to 100 letters, "
            "digits, dots, dashes and underscores, the first no dot or dash"
        )
    limits.at_least("data.image_size", config.data.image_size, 0)
    limits.at_least("data.workers", config.data.workers, 0)
    limits.at_most("data.workers", config.data.workers, 1000)
    spec = data.find(config.data.name, config.data.dir, config.data.image_size).spec
    limits.known("model.name", config.model.name, models.MODELS)
    limits.known("model.init", config.model.init, initializers.INITIALIZERS)
    limits.known("model.lowering", config.model.lowering, models.LOWERINGS)
    limits.known("model.norm", config.model.norm, ("", *models.NORMS))
    limits.known(
        "model.kernel_init", config.model.kernel_init, ("", *models.KERNEL_INITS)
    )
    limits.known("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    fans, draws = ("fan_in", "fan_out", "fan_avg"), ("normal", "uniform", "truncated")
    limits.known("model.init_fan", config.model.init_fan, ("", *fans))
    limits.known(
        "model.init_distribution", config.model.init_distribution, ("", *draws)
    )
    limits.at_least("model.init_gain", config.model.init_gain, 0.0)
    if config.model.init == "module":
        for field in ("init_fan", "init_distribution", "init_gain"):
            if config.model[field]:
                raise UserError(
                    f"model.{field}={config.model[field]!r}: model.init='module' has "
                    "no such choice; leave it out, or take another init"
                )
    elif config.model.kernel_init or config.model.norm == "fixup":
        field = "kernel_init" if config.model.kernel_init else "norm"
        raise UserError(
            f"model.{field}={config.model[field]!r} says how the network draws its "
            f"kernels, which model.init={config.model.init!r} draws anew; write "
            "model.init=module"
        )
    limits.known("optim.name", config.optim.name, OPTIMIZERS)
    limits.known(
        "optim.schedule", config.optim.schedule, ("cosine", "constant", "step")
    )
    milestones = tuple(config.optim.milestone_steps)
    if bool(milestones) != (config.optim.schedule == "step"):
        raise UserError(
            f"optim.milestone_steps={milestones}: optim.schedule="
            f"{config.optim.schedule!r} needs {'none' if milestones else 'some'}"
        )
    first = config.optim.warmup_steps + 1
    if any(b <= a for a, b in itertools.pairwise((first - 1, *milestones))):
        raise UserError(
            f"optim.milestone_steps={milestones}: give rising numbers from {first}"
        )
    for milestone in milestones[-1:]:
        limits.at_most("optim.milestone_steps", milestone, limits.INT32)
    limits.above("optim.decay_factor", config.optim.decay_factor, 0.0)
    limits.fraction("loss.label_smoothing", config.loss.label_smoothing)
    limits.above("optim.learning_rate", config.optim.learning_rate, 0.0)
    limits.at_least("optim.weight_decay", config.optim.weight_decay, 0.0)
    limits.fraction("optim.momentum", config.optim.momentum)
    sparsity, train = config.sparsity, config.train
    limits.known("sparsity.rule", sparsity.rule, RULES)
    limits.known(
        "sparsity.distribution", sparsity.distribution, distributions.DISTRIBUTIONS
    )
    limits.known("sparsity.drop_schedule", sparsity.drop_schedule, DROP_SCHEDULES)
    limits.known("sparsity.timing", sparsity.timing, ("after", "instead"))
    limits.fraction("sparsity.sparsity", sparsity.sparsity)
    limits.at_least("sparsity.drop_fraction", sparsity.drop_fraction, 0.0)
    limits.at_most("sparsity.drop_fraction", sparsity.drop_fraction, 1.0)
    limits.at_least("sparsity.interval_steps", sparsity.interval_steps, 1)
    limits.at_least("sparsity.begin_steps", sparsity.begin_steps, 0)
    limits.at_least("sparsity.grow_examples", sparsity.grow_examples, 0)
    limits.at_least("sparsity.penalty_warmup_steps", sparsity.penalty_warmup_steps, 0)
    limits.above("sparsity.grow_init_divisor", sparsity.grow_init_divisor, 0.0)
    for field in ("end_steps", "masks_step", "weights_step"):
        limits.at_least(f"sparsity.{field}", sparsity[field], -1)
    for field in ("total_steps", "batch_size", "probe_examples"):
        limits.at_least(f"train.{field}", train[field], 1)
    # Schedules are tables of all steps.
    limits.at_most("train.total_steps", train.total_steps, 100_000_000)
    for field in ("log_every_steps", "checkpoint_every_steps"):
        limits.at_least(f"train.{field}", train[field], 1)
    for field in ("keep_checkpoints", "member_devices", "data_devices", "chunk_steps"):
        limits.at_least(f"train.{field}", train[field], 0)
    limits.at_least("train.model_devices", train.model_devices, 1)
    limits.at_least("train.accumulate_steps", train.accumulate_steps, 1)
    limits.fraction("train.ema_decay", train.ema_decay)
    limits.at_least("model.norm_examples", config.model.norm_examples, 0)
    parts = train.accumulate_steps
    if train.batch_size % parts:
        raise UserError(
            f"train.accumulate_steps={parts} does not divide train.batch_size="
            f"{train.batch_size}; give a divisor"
        )
    if config.model.norm_examples and train.batch_size // parts % (
        config.model.norm_examples
    ):
        raise UserError(
            f"model.norm_examples={config.model.norm_examples} does not divide the "
            f"{train.batch_size // parts} images of a step (of a part of it, with "
            "train.accumulate_steps); give a divisor"
        )
    limits.known("data.augment", config.data.augment, augment.AUGMENTATIONS)
    if config.data.augment and config.data.name not in data.DATASETS:
        raise UserError(
            f"data.augment={config.data.augment!r}: {config.data.name} is decoded on "
            "the way, with crops and flips of its own; leave it empty"
        )
    limits.known("train.population", train.population, population.WAYS)
    limits.known("train.on_nonfinite", train.on_nonfinite, ("stop", "skip"))
    limits.at_least("data.order_seed", config.data.order_seed, -1)
    limits.at_least("optim.warmup_steps", config.optim.warmup_steps, 0)
    limits.at_least("eval.every_steps", config.eval.every_steps, 0)
    limits.at_least("eval.batch_size", config.eval.batch_size, 1)
    if config.optim.warmup_steps >= train.total_steps:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps} leaves no step of "
            f"train.total_steps={train.total_steps}; warm up for fewer"
        )
    if 0 != config.optim.schedule_steps < train.total_steps:
        raise UserError(
            f"optim.schedule_steps={config.optim.schedule_steps} ends before "
            f"train.total_steps={train.total_steps}; give at least as many, or 0"
        )
    end = sparsity.end_steps
    if sparsity.rule != "static" and end != -1 and end < sparsity.begin_steps:
        raise UserError(
            f"sparsity.end_steps={end} is before "
            f"sparsity.begin_steps={sparsity.begin_steps}; give a later end, or -1"
        )
    check_method.tickets(config)
    check_method.methods(config)
    check_method.execution(config)
    if method.takes(config, "end"):
        if end <= sparsity.begin_steps:
            raise UserError(
                f"sparsity.end_steps={end}: gradual pruning needs an end after "
                f"sparsity.begin_steps={sparsity.begin_steps}"
            )
        if (end - sparsity.begin_steps) % sparsity.interval_steps:
            raise UserError(
                f"sparsity.interval_steps={sparsity.interval_steps} does not divide "
                f"the {end - sparsity.begin_steps} steps from begin to end, so the "
                "final sparsity would not be reached; give a divisor"
            )
        if end > train.total_steps:
            raise UserError(
                f"sparsity.end_steps={end} is after train.total_steps="
                f"{train.total_steps}, so the final sparsity would not be reached; "
                "give an earlier end"
            )
    n_train = spec.n_train
    grow = sparsity.grow_examples if method.takes(config, "fraction") else 0
    if train.probe_examples + grow > n_train:
        raise UserError(
            f"train.probe_examples={train.probe_examples} and "
            f"sparsity.grow_examples={grow} together exceed the "
            f"{n_train} training images of {config.data.name}; give fewer"
        )
    if train.batch_size > n_train:
        raise UserError(
            f"train.batch_size={train.batch_size} exceeds the {n_train} training "
            f"images of {config.data.name}; give a smaller one"
        )
