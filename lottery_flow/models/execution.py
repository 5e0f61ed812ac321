"""Layers of a network computed by their active weights, in whatever module they are.

    y = b + W x            dense layers: compressed rows, see `sparsity.execution`
    y = b + W copies(x)    convolutions: the same with shifted copies of the images

Modules know nothing of it: their calls are intercepted. That concerns `nn.Dense` and
`layers.Conv` without groups; all others compute as ever.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from lottery_flow.models import layers
from lottery_flow.sparsity import compact
from lottery_flow.sparsity.execution import Compressed, linear
from lottery_flow.sparsity.execution_choice import GRAD_OF, Layer


class Convolution(NamedTuple):
    """The product of a convolution.

    Attributes:
      size: (kh, kw) of the kernel.
      strides: of the output.
      padding: zeros (low, high) for height and width.
      lowering: of the dense product, one of `layers.LOWERINGS` but "auto".
    """

    size: layers.Pair
    strides: layers.Pair
    padding: tuple[layers.Pair, layers.Pair]
    lowering: str

    def __call__(self, x, kernel, plan=None, *, grad: str = "dense", bias=None):
        """As `execution.linear`, for x [b h w c] and a kernel [kh kw c o]."""
        own = bias, self.strides, self.padding
        if isinstance(kernel, Compressed):
            return self._by(x, lambda m: linear(m.T, kernel, None).T, *own)
        matrix = kernel.reshape(-1, kernel.shape[-1])
        if plan is not None:
            return self._by(x, lambda m: linear(m.T, matrix, plan, grad=grad).T, *own)
        if self.lowering == "convolution":
            return layers.convolution(x, kernel, *own)
        return self._by(x, partial(layers.kernel_product, matrix), *own)

    def _by(self, x, product, *own):
        return layers.patches(x, self.size, product, *own)


def intercept(plans: Mapping[str, Mapping[str, Any]]) -> AbstractContextManager:
    """Within it, layers with a plan are computed by their active weights.

    Args:
      plans: by path (of `execution_choice.PATHS` but dense) and name of the layer its
        `Structure`; or as "compressed" its `Compressed` kernel, and then the network
        needs none among its parameters.
    """
    named = {
        k: (path, plan)
        for path, own in plans.items()
        for k, plan in own.items()
        if path != "positions"
    }

    def call(proceed, args, kwargs, context):
        found = named.get("/".join(context.module.path))
        if found is None or context.method_name != "__call__":
            return proceed(*args, **kwargs)
        return _planned(context.module, args[0], *found)

    return nn.intercept_methods(call)


def expanded(params: Any, plans: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
    """The parameters as modules want them: kernels whole, where `positions` are given.

    Args:
      params: kernels may be columns of their active weights, see `sparsity.compact`.
      plans: as "positions" those of such kernels, by layer; others have a plan that
        takes them as they are.
      shapes: of all kernels, by layer.
    """
    return compact.unpack(params, plans.get("positions", {}), shapes)


def layers_of(module: nn.Module, example: jax.ShapeDtypeStruct) -> dict[str, Layer]:
    """The layers that can have a plan, by name in the order of the computation.

    Args:
      module: called as `module(images, train=...)`.
      example: of images [b h w c].
    """
    found = {}

    def note(proceed, args, kwargs, context):
        layer, name = context.module, "/".join(context.module.path)
        if context.method_name == "__call__" and _is_plannable(layer):
            found[name] = _layer(layer, args[0].shape)
        return proceed(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(
            lambda images: module.init(jax.random.key(0), images, train=False), example
        )
    return found


def _is_plannable(module: nn.Module) -> bool:
    if isinstance(module, layers.Conv):
        return module.groups == 1
    return type(module) is nn.Dense


def _layer(module: Any, shape: tuple[int, ...]) -> Layer:
    """What a module computes, for inputs of a shape."""
    own, dtype = tuple(shape[1:]), jnp.dtype(module.dtype or jnp.float32).name
    if isinstance(module, nn.Dense):
        return Layer(linear, (own[-1], module.features), own, dtype=dtype)
    product = _convolution(module, shape)
    kernel = *module.kernel_size, own[-1], module.features
    return Layer(product, kernel, own, product.lowering == "patches", dtype)


def _convolution(module: layers.Conv, shape: tuple[int, ...]) -> Convolution:
    return Convolution(module.kernel_size, *layers.geometry(module, shape))


def _planned(module: Any, x, path: str, plan):
    """The output of a module by its plan."""
    bias = module.get_variable("params", "bias") if module.use_bias else None
    if path == "compressed":
        x, values, bias = promote_dtype(x, plan.values, bias, dtype=module.dtype)
        kernel, plan, grad = plan._replace(values=values), None, "dense"
    else:
        kernel = module.get_variable("params", "kernel")
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=module.dtype)
        grad = GRAD_OF[path]
    if isinstance(module, layers.Conv):
        product = _convolution(module, x.shape)
        return product(x, kernel, plan, grad=grad, bias=bias)
    y = linear(x, kernel, plan, grad=grad)
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))
