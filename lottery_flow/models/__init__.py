"""Networks, behind one value: nothing outside this package sees flax.

A `Model` holds pure functions of plain parameter trees. Models know nothing of
sparsity: a sparse network is the same module with zeros in its kernels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lottery_flow.models.layers import LOWERINGS
from lottery_flow.models.lenet import LeNet5
from lottery_flow.models.mlp import MLP
from lottery_flow.models.resnet import resnet18, resnet34, resnet50, resnet101
from lottery_flow.models.wide_resnet import wrn16_4, wrn22_2

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "mlp": MLP,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "wrn16_4": wrn16_4,
    "wrn22_2": wrn22_2,
}


__all__ = ["LOWERINGS", "MODELS", "Model", "create", "from_module"]


class Model(NamedTuple):
    """A network for images of one shape.

    Attributes:
      init: `(key) -> variables`, a dict with `params` and, with norms, `batch_stats`.
      apply: `(params, batch_stats, images, train, key) -> (logits, batch_stats)` for
        float images [b h w c]; `key` feeds dropout, where the module has it.
      positions: output positions of each layer for one image: the product of the
        spatial dimensions of its output, 1 for dense layers.
      trace: `(params, batch_stats, images, train, perturbations, key) -> (logits,
        outputs)`; the output of every layer, a module with a kernel, by name in the
        order of the computation, after `perturbations` by layer name were added to
        them. {} adds nothing; as zeros they are there to be differentiated by.
    """

    init: Callable
    apply: Callable
    positions: dict[str, int]
    trace: Callable


@functools.lru_cache(maxsize=32)
def create(
    name: str, image_shape: tuple[int, int, int], n_classes: int, **options: Any
) -> Model:
    """A model of `MODELS`; `options` go to its module, for instance `lowering`.

    The same arguments give the same value, so that what was compiled for it is not
    compiled again.
    """
    return from_module(MODELS[name](n_classes=n_classes, **options), image_shape)


def from_module(module: nn.Module, image_shape: tuple[int, int, int]) -> Model:
    """Any module that is called as `module(images, train=...)` and returns logits."""
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def init(key):
        return module.init(key, jnp.zeros(example.shape, example.dtype), train=False)

    def apply(params, batch_stats, images, train, key=None):
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

    return Model(init, apply, positions, trace)


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
