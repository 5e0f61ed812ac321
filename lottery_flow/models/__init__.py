"""Networks, behind one value: nothing outside this package sees flax.

A `Model` holds pure functions of plain parameter trees. Models know nothing of
sparsity: a sparse network is the same module with zeros in its kernels.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lottery_flow.models import execution
from lottery_flow.models.layers import LOWERINGS, delta_orthogonal
from lottery_flow.models.lenet import LeNet5
from lottery_flow.models.mlp import MLP
from lottery_flow.models.mobilenet import MobileNetV1
from lottery_flow.models.resnet import (
    NORMS,
    he_fan_out,
    resnet18,
    resnet20,
    resnet34,
    resnet50,
    resnet101,
)
from lottery_flow.models.vgg import vgg16, vgg16_bn
from lottery_flow.models.vit import ViT
from lottery_flow.models.wide_resnet import wrn16_4, wrn22_2
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.execution_choice import Layer

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "mlp": MLP,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet20": resnet20,
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "mobilenet_v1": MobileNetV1,
    "vit_s16": ViT,
    "wrn16_4": wrn16_4,
    "wrn22_2": wrn22_2,
}


# What networks can draw for their convolutions.
KERNEL_INITS: dict[str, Callable] = {
    "he_fan_out": he_fan_out,
    "delta_orthogonal": delta_orthogonal,
}

__all__ = [
    "KERNEL_INITS",
    "LOWERINGS",
    "MODELS",
    "NORMS",
    "Model",
    "create",
    "from_module",
    "options",
]


class Model(NamedTuple):
    """A network for images of one shape.

    Attributes:
      init: `(key) -> variables`, a dict with `params` and, with norms, `batch_stats`.
      apply: `(params, batch_stats, images, train, key, plans) -> (logits, batch_stats)`
        for float images [b h w c]; `key` feeds dropout, where the module has it;
        `plans` are those of `execution.intercept` and `execution.expanded`, {} or
        left out without any.
      layers: those that can have a plan, by name in the order of the computation.
      positions: output positions of each layer for one image: the product of the
        spatial dimensions of its output, 1 for dense layers.
      trace: `(params, batch_stats, images, train, perturbations, key) -> (logits,
        outputs)`; the output of every layer, a module with a kernel, by name in the
        order of the computation, after `perturbations` by layer name were added to
        them. {} adds nothing; as zeros they are there to be differentiated by.
    """

    init: Callable
    apply: Callable
    layers: dict[str, Layer]
    positions: dict[str, int]
    trace: Callable

    @property
    def classifier(self) -> str:
        """The layer whose outputs are the logits."""
        return list(self.layers)[-1]


@functools.lru_cache(maxsize=32)
def create(
    name: str, image_shape: tuple[int, int, int], n_classes: int, **options: Any
) -> Model:
    """A model of `MODELS`; `options` go to its module, for instance `lowering`.

    A `kernel_init` may be one of `KERNEL_INITS`, a `dtype` its name. The same arguments
    give the same value, so that what was compiled for it is not compiled again.
    """
    if isinstance(options.get("kernel_init"), str):
        options["kernel_init"] = KERNEL_INITS[options["kernel_init"]]
    return from_module(MODELS[name](n_classes=n_classes, **options), image_shape)


def options(name: str) -> frozenset[str]:
    """The options that `create` takes for a model."""
    made = MODELS[name]
    module = made.func if isinstance(made, functools.partial) else made
    bound = made.keywords if isinstance(made, functools.partial) else {}
    fields = set(inspect.signature(module).parameters)
    return frozenset(fields - bound.keys() - {"n_classes", "name", "parent"})


def from_module(module: nn.Module, image_shape: tuple[int, int, int]) -> Model:
    """Any module that is called as `module(images, train=...)` and returns logits."""
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def init(key):
        return module.init(key, jnp.zeros(example.shape, example.dtype), train=False)

    variables = jax.eval_shape(init, jax.random.key(0))
    shapes = {k: v.shape for k, v in masks_lib.layers(variables["params"]).items()}

    def apply(params, batch_stats, images, train, key=None, plans=None):
        if plans:
            params = execution.expanded(params, plans, shapes)
            with execution.intercept(plans):
                return apply(params, batch_stats, images, train, key)
        variables = {"params": params, "batch_stats": batch_stats}
        if not train:
            return module.apply(variables, images, train=False), batch_stats
        rngs = None if key is None else {"dropout": key}
        logits, updated = module.apply(
            variables, images, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return logits, updated.get("batch_stats", batch_stats)

    positions = _positions(module, example)

    def trace(params, batch_stats, images, train, perturbations, key=None):
        outputs = {}

        def perturb(call, args, kwargs, context):
            output, layer = call(*args, **kwargs), context.module
            owns_kernel = layer.has_variable("params", "kernel")
            if context.method_name != "__call__" or not owns_kernel:
                return output
            name = "/".join(layer.path)
            if name in outputs:
                raise ValueError(
                    f"layer {name} is called twice; only one output counts"
                )
            outputs[name] = output + perturbations.get(name, 0)
            return outputs[name]

        unknown = sorted(perturbations.keys() - positions.keys())
        if unknown:
            raise ValueError(
                f"perturbations: no layer {unknown[0]}; the layers are "
                f"{', '.join(positions)}"
            )
        with nn.intercept_methods(perturb):
            logits, _ = apply(params, batch_stats, images, train, key)
        return logits, outputs

    return Model(init, apply, execution.layers_of(module, example), positions, trace)


def _positions(module: nn.Module, example: jax.ShapeDtypeStruct) -> dict[str, int]:
    """Spatial output size of every module that owns a kernel, from shapes alone."""

    def trace(images):
        variables = module.init(jax.random.key(0), images, train=False)
        _, captured = module.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda m, _: m.has_variable("params", "kernel"),
            mutable=["intermediates"],
        )
        return captured["intermediates"]

    positions = {}
    outputs = jax.eval_shape(trace, example)
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        layer = "/".join(str(p.key) for p in path[:-2])  # without ['__call__'][0]
        size = 1
        for n in leaf.shape[1:-1]:
            size *= n
        positions[layer] = size
    return positions
