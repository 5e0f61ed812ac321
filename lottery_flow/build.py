"""From a configuration to plain values: nothing after it reads one.

What makes no sense is rejected here, before anything is computed or written, in one
sentence that names the field, its value and the remedy.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lottery_flow import check, data, draw, initial, memory, method, models, runs
from lottery_flow import config as config_lib
from lottery_flow.errors import UserError
from lottery_flow.job import Job
from lottery_flow.members import own_fields
from lottery_flow.parallel import Devices
from lottery_flow.sparsity import distributions, granularity
from lottery_flow.sparsity import masks as masks_lib


def build(config: ConfigDict, seed: int) -> Job:
    """The job of a configuration and a seed; reads no data and writes nothing.

    Raises:
      UserError: a field that makes no sense.
    """
    source, model, shapes = _network_of(config)
    spec, key = source.spec, jax.random.key(seed)
    _check_memory(config, spec, shapes)
    decay = method.decay(config)
    fade = method.fade(config, decay)
    n_active = _n_active(config, shapes)
    layers = masks_lib.layers(shapes)
    known = method.Known(
        sizes={k: v.size for k, v in layers.items()},
        n_active=n_active,
        final_sparsity=partial(_layer_sparsity, config, shapes),
        n_train=spec.n_train,
    )
    parameterization = method.parameterization(config, known)
    decayed = (
        masks_lib.in_layers if parameterization is None else parameterization.decayed
    )
    own = own_fields(config) + runs.UNHASHED
    knobs = {"learning_rate": config.optim.learning_rate}
    if fade is not None:
        knobs["drop_fraction"] = config.sparsity.drop_fraction

    def make_method(knobs):
        rate = method.scaled(decay, knobs["learning_rate"])
        fraction = fade and method.scaled(fade, knobs["drop_fraction"])
        inner = method.optimizer(config, rate, decayed)
        return inner, method.rule(config, known, fraction)

    fraction = fade and method.scaled(fade, config.sparsity.drop_fraction)
    return Job(
        seed=seed,
        setting={k: v for k, v in flat_fields(config).items() if k not in own},
        data_seed=seed if config.data.order_seed < 0 else config.data.order_seed,
        model=model,
        spec=spec,
        load_data=lambda: source.load(config.data.dir),
        workers=config.data.workers,
        augment=config.data.augment,
        label_smoothing=config.loss.label_smoothing,
        norm_examples=config.model.norm_examples,
        accumulate_steps=config.train.accumulate_steps,
        ema_decay=config.train.ema_decay,
        rule=method.rule(config, known, fraction),
        parameterization=parameterization,
        make_method=make_method,
        knobs={k: np.float32(v) for k, v in knobs.items()},
        make_network=partial(
            initial.network, config, model, spec, shapes, n_active, seed
        ),
        rewire_key=jax.random.fold_in(key, draw.REWIRE),
        step_key=jax.random.fold_in(key, draw.STEP),
        learning_rate=method.scaled(decay, config.optim.learning_rate),
        drop_fraction=fraction,
        total_steps=method.total_steps(config),
        batch_size=config.train.batch_size,
        probe_examples=config.train.probe_examples,
        grow_examples=config.sparsity.grow_examples if fraction else 0,
        log_every=config.train.log_every_steps,
        checkpoint_every=config.train.checkpoint_every_steps,
        keep_checkpoints=config.train.keep_checkpoints,
        eval_every=config.eval.every_steps,
        eval_batch_size=config.eval.batch_size,
        population=config.train.population,
        devices=Devices(
            config.train.member_devices,
            config.train.data_devices,
            config.train.model_devices,
        ),
        chunk_steps=config.train.chunk_steps,
        execution=config.train.execution,
        storage=config.train.storage,
        skip_nonfinite=config.train.on_nonfinite == "skip",
    )


class Layers(NamedTuple):
    """The layers of a network that can be sparse, by name.

    Attributes:
      shapes: of the kernels, (..., in, out).
      positions: output positions for one image.
      n_active: weights that a random mask, or pruning at its end, leaves.
    """

    shapes: dict[str, tuple[int, ...]]
    positions: dict[str, int]
    n_active: dict[str, int]


def layers(config: ConfigDict) -> Layers:
    """The layers of a configuration's network, with the sparsity that it asks for.

    Raises:
      UserError: a field that makes no sense.
    """
    _, model, params = _network_of(config)
    shapes = {k: v.shape for k, v in masks_lib.layers(params).items()}
    sizes = {k: math.prod(shape) for k, shape in shapes.items()}
    return Layers(shapes, model.positions, sizes | _n_active(config, params))


def flat_fields(config: ConfigDict) -> dict[str, Any]:
    """{'optim.learning_rate': 0.05, ...}, ready for JSON."""

    def walk(prefix, value):
        if not isinstance(value, dict):
            yield prefix, list(value) if isinstance(value, tuple) else value
            return
        for key, child in value.items():
            yield from walk(f"{prefix}.{key}" if prefix else key, child)

    resolved = config.copy_and_resolve_references()
    return dict(sorted(walk("", resolved.to_dict())))


def _network_of(config):
    """The data set, the model, and the shapes of its parameters; all fields checked."""
    check.fields(config)
    source = data.find(config.data.name, config.data.dir, config.data.image_size)
    model = _model(config, source.spec)
    return source, model, jax.eval_shape(model.init, jax.random.key(0))["params"]


def description(config: ConfigDict) -> dict[str, Any]:
    """What the network of a configuration needs to be used: for JSON.

    Returns:
      `name` and `options` of `models.create`; `image_shape` and `n_classes` of the
      data; `mean` and `std` of each channel as fractions of 255, see `make_steps`.
    """
    spec = data.find(config.data.name, config.data.dir, config.data.image_size).spec
    own = ("image_shape", "n_classes", "mean", "std")
    return {
        "name": config.model.name,
        "options": _model_options(config),
        **{k: getattr(spec, k) for k in own},
    }


def _check_memory(config, spec, shapes) -> None:
    train = config.train
    n_together = train.batch_size // train.accumulate_steps
    batches = {
        "train.batch_size": n_together,
        "train.probe_examples": train.probe_examples,
        "eval.batch_size": config.eval.batch_size,
    }
    n_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    n_numbers = math.prod(spec.image_shape)
    memory.check(n_parameters, n_numbers, batches, train.model_devices)


def _model(config, spec):
    name = config.model.name
    options = _model_options(config)
    try:
        return models.create(name, spec.image_shape, spec.n_classes, **options)
    except ValueError as error:
        raise UserError(f"model.name={name}: {error}") from error


def _model_options(config) -> dict[str, Any]:
    """Those of `models.create` that are not at their defaults."""
    name, own = config.model.name, models.options(config.model.name)
    asked = {
        "widths": tuple(config.model.widths),
        "width": config.model.width,
        "norm": config.model.norm,
        "kernel_init": config.model.kernel_init,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "lowering": config.model.lowering,
    }
    default = config_lib.default().model
    options = {k: v for k, v in asked.items() if v != default[k]}
    for field, value in options.items():
        if field not in own:
            raise UserError(
                f"model.{field}={value!r}: {name} has no such choice; leave it at "
                f"{default[field]!r}"
            )
    return options


_COUNTED = ("sparsity", "dense_layers", "layer_sparsity", "granularity")


def _n_active(config, shapes) -> dict[str, int]:
    """Active weights of each layer that a random mask, or pruning, leaves."""
    distribute = distributions.DISTRIBUTIONS[config.sparsity.distribution]
    try:
        layer_shapes, sparsity = _distribution(config, shapes)
        n_active = distribute(layer_shapes, sparsity, **_own(config))
        # n of every m is a sparsity of its own.
        groups = method.granularity(config)
        own = granularity.own_sparsity(groups)
        if own is not None and abs(own - sparsity) > 1e-9:
            raise UserError(
                f"sparsity.granularity={config.sparsity.granularity} has the sparsity "
                f"{own}, not sparsity.sparsity={sparsity}; give that"
            )
        n_active = granularity.round_counts(groups, n_active, layer_shapes)
    except ValueError as error:
        asked = {k: config.sparsity[k] for k in _COUNTED if config.sparsity[k]}
        told = ", ".join(f"sparsity.{k}={v!r}" for k, v in asked.items())
        raise UserError(f"{told}: {error}") from error
    return n_active


def _layer_sparsity(config, shapes) -> dict[str, float]:
    """Sparsity of each layer, before it is rounded to whole weights."""
    kind, own = config.sparsity.distribution, _own(config)
    layer_shapes, sparsity = _distribution(config, shapes)
    if kind != "uniform":
        kernel = kind == "erdos_renyi_kernel"
        return distributions.solve_erdos_renyi(
            layer_shapes, sparsity, kernel=kernel, **own
        ).sparsity
    single = dict.fromkeys(own["dense"], 0.0) | own["layer_sparsity"]
    return {name: single.get(name, sparsity) for name in layer_shapes}


def _distribution(config, shapes) -> tuple[dict[str, tuple[int, ...]], float]:
    layers = masks_lib.layers(shapes)
    return {k: v.shape for k, v in layers.items()}, config.sparsity.sparsity


def _own(config) -> dict[str, Any]:
    dense = (name.strip() for name in config.sparsity.dense_layers.split(","))
    return {
        "dense": tuple(name for name in dense if name),
        "layer_sparsity": distributions.parse_layer_map(config.sparsity.layer_sparsity),
    }
