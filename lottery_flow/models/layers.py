"""Convolution and max pooling that are also fast on a CPU.

    y[b, p, q, o] = bias[o] + sum_{i, j, c} kernel[i, j, c, o] x[b, s p + i, s q + j, c]

has two lowerings. *convolution* is XLA's own operation. *patches* copies the kh kw
shifted images below each other and multiplies once by the kernel as a matrix
[kh kw c, o] (im2col: Chellapilla et al. 2006, "High performance convolutional neural
networks for document processing"). Both have the same parameters and the same
derivatives, up to the order of sums.

The patches have the batch as their innermost dimension, [kh kw c, h w b]: the shifts
are then copies of whole rows, whatever the number of channels, and pooling needs no
shuffling within a vector. The layers take and give images [b h w c] all the same; XLA
turns the transpositions between two of them into a choice of layout.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float, Key

Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = str | int | Sequence[int | Pair]

LOWERINGS = ("auto", "convolution", "patches")

# Input and output channels up to which patches win on a CPU.
_FEW_IN, _FEW_OUT = 7, 16


def check_widths(widths: Sequence[Any], n: int | None = None) -> None:
    """Raises ValueError unless widths are n positive whole numbers; None: any n."""
    whole = all(isinstance(w, int) and w > 0 for w in widths)
    if not whole or n not in (None, len(widths)):
        raise ValueError(
            f"widths={tuple(widths)}: give {n or 'some'} positive whole numbers, or () "
            "for the network's own"
        )


def block(module: type[nn.Module], remat: bool) -> Callable[..., nn.Module]:
    """A module that is called as `(x, train)`, computed again for its gradient.

    Only its input is kept then, not what is inside (Chen et al. 2016, arXiv
    1604.06174). Without `remat` the module as it is.
    """
    return nn.remat(module, static_argnums=(2,)) if remat else module


class Conv(nn.Module):
    """A convolution of images: `nn.Conv`, with a choice of how it is computed.

    Parameters (`kernel` [kh kw c/groups features], `bias` [features]), their initial
    values and the meaning of the attributes are those of `nn.Conv` for two spatial
    dimensions.

    Attributes:
      features: number of output channels.
      kernel_size: (kh, kw).
      strides: of the output, one number or one for each dimension.
      padding: "SAME", "VALID", or zeros to add: a number, or for each dimension a
        number or (low, high).
      groups: of channels, each connected with its share of the features alone; as
        many as channels make a depthwise convolution. Always XLA's own operation.
      use_bias: whether there is a bias.
      dtype: to compute in; the parameters stay in float32. None takes the usual
        promotion of inputs and parameters.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      lowering: one of `LOWERINGS`; "auto" takes the faster for the backend and shape.

    Raises:
      ValueError: an unknown lowering or padding; groups that do not divide the
        channels and the features, or that patches were asked for.
    """

    features: int
    kernel_size: Pair
    strides: int | Pair = 1
    padding: Padding = "SAME"
    groups: int = 1
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.linear.default_kernel_init
    bias_init: Callable = nn.initializers.zeros_init()
    lowering: str = "auto"

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b p q o"]:
        channels = images.shape[-1]
        if self.groups < 1 or channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the {channels} channels and the "
                f"{self.features} features"
            )
        shape = (*self.kernel_size, channels // self.groups, self.features)
        strides, padding, lowering = geometry(self, images.shape)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[-1:], jnp.float32)
        x, kernel, bias = promote_dtype(images, kernel, bias, dtype=self.dtype)
        if lowering == "patches":
            product = partial(kernel_product, kernel.reshape(-1, shape[-1]))
            return patches(x, self.kernel_size, product, bias, strides, padding)
        return convolution(x, kernel, bias, strides, padding, self.groups)


def geometry(conv: Conv, shape: Sequence[int]) -> tuple[Pair, tuple[Pair, Pair], str]:
    """Strides, zeros (low, high) and lowering of a convolution of images [b h w c]."""
    strides, channels = pair(conv.strides), shape[-1] // conv.groups
    padding = _pads(conv.padding, shape[1:3], conv.kernel_size, strides)
    kernel = *conv.kernel_size, channels, conv.features
    return strides, padding, choose_lowering(conv.lowering, kernel, conv.groups)


def choose_lowering(lowering: str, kernel_shape: Sequence[int], groups: int = 1) -> str:
    """Either "convolution" or "patches": what "auto" means for a kernel [kh kw c o].

    On a CPU patches win where channels are few (the first layers of small networks,
    LeNet-5's both): XLA's convolution works on vectors of channels. From 8 or so it is
    the faster, and keeps no copies for the gradient; on other backends always.

    Raises:
      ValueError: `lowering` is none of `LOWERINGS`, or patches in groups.
    """
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering={lowering!r}: choose one of {', '.join(LOWERINGS)}")
    if groups > 1 and lowering == "patches":
        raise ValueError(
            f"lowering='patches' has no groups (here {groups}); choose auto"
        )
    if groups > 1:
        return "convolution"
    if lowering != "auto":
        return lowering
    kh, kw, channels, features = kernel_shape
    narrow = kh * kw > 1 and channels <= _FEW_IN and features <= _FEW_OUT
    return "patches" if narrow and jax.default_backend() == "cpu" else "convolution"


def delta_orthogonal(
    key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """A random orthogonal matrix at the centre of the kernel, and zeros around it.

    Keeps the length of what comes in where there are at least as many features as
    channels (Xiao et al. 2018, arXiv 1806.05393); with fewer it is a projection.
    """
    *spatial, _, _ = shape
    matrix = nn.initializers.orthogonal()(key, tuple(shape[-2:]), dtype)
    centre = tuple((size - 1) // 2 for size in spatial)
    return jnp.zeros(shape, dtype).at[centre].set(matrix)


def max_pool(
    images: Float[Array, "b h w c"], window: Pair, strides: Pair
) -> Float[Array, "b p q c"]:
    """The maximum of each window, without padding; the same as `nn.max_pool`.

    The gradient goes to the first of equal maxima, a nan to the output, as there. On a
    CPU, windows that do not overlap are compared as whole arrays: the gradient of
    XLA's own pooling, which searches every window anew, is several times slower.
    """
    if tuple(window) != tuple(strides) or jax.default_backend() != "cpu":
        return nn.max_pool(images, window, strides=strides)
    (m, n), (height, width) = window, images.shape[1:3]
    p, q = height // m, width // n
    x = images[:, : p * m, : q * n].transpose(3, 1, 2, 0)
    x = x.reshape(x.shape[0], p, m, q, n, x.shape[-1])
    # Split, not indexed: on the way back the corners are then joined, not each padded
    # to the whole image and added.
    rows = lax.split(x, [1] * m, axis=2)
    corners = (c for row in rows for c in lax.split(row, [1] * n, axis=4))
    return functools.reduce(_first, corners)[:, :, 0, :, 0].transpose(3, 1, 2, 0)


def _first(a: Array, b: Array) -> Array:
    """The greater, the first of equals, or nan. jnp.maximum shares ties."""
    return jnp.where((a >= b) | (a != a), a, b)


def convolution(x, kernel, bias, strides, padding, groups: int = 1):
    """XLA's convolution of x [b h w c] with a kernel [kh kw c/groups o]."""
    y = lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y if bias is None else y + bias.reshape(1, 1, 1, -1)


def patches(x, size: Pair, product: Callable, bias, strides, padding):
    """The same by one product of the kernel with shifted copies of the images.

    Args:
      x: images [b h w c].
      size: (kh, kw) of the kernel.
      product: `(copies [n m]) -> [o m]`, the kernel as a matrix [o n] times them, with
        n = kh kw c and m = p q b.
      bias: [o] or None.
      strides: of the output.
      padding: (low, high) zeros for height and width.
    """
    x = lax.pad(
        x.transpose(3, 1, 2, 0),
        jnp.zeros((), x.dtype),
        [(0, 0, 0), *((*pad, 0) for pad in padding), (0, 0, 0)],
    )
    # First along the width, then along the height: kh + kw slices, not kh kw. Joined
    # at the channels, so that under vmap the members stay outermost.
    x = _shifts(_shifts(x, 2, size[1], strides[1]), 1, size[0], strides[0])
    n, p, q, batch = x.shape
    y = product(x.reshape(n, p * q * batch))
    if bias is not None:
        y = y + bias.reshape(-1, 1)
    # What follows reads y several times. Without the barrier XLA repeats the bias in
    # each reader, and sums the gradient of the bias in the order of the images.
    y = lax.optimization_barrier(y)
    return y.reshape(-1, p, q, batch).transpose(3, 1, 2, 0)


@jax.custom_jvp
def kernel_product(kernel, copies):
    """The product of `patches`, [o m]: a kernel [n o], transposed, times copies [n m].

    The barrier has XLA write the transposed kernel down: a product with a transposed
    left factor is not one of its fast ones. The derivative does without, so that on
    the way back the kernel and the copies are multiplied as they lie.
    """
    return lax.optimization_barrier(kernel.T) @ copies


@kernel_product.defjvp
def _kernel_product_jvp(factors, tangents):
    (kernel, copies), (d_kernel, d_copies) = factors, tangents
    y = kernel_product(kernel, copies)
    return y, d_kernel.T @ copies + kernel.T @ d_copies


def _shifts(x, axis, size, stride):
    """The `size` shifts of x [c h w b] along an axis, joined at the channels."""
    span = x.shape[axis] - size + 1
    return jnp.concatenate(
        [lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(size)]
    )


def pair(value: int | Sequence[int]) -> Pair:
    """One number for both dimensions, or one for each."""
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _pads(padding: Padding, size, window, strides) -> tuple[Pair, Pair]:
    """(low, high) zeros for height and width."""
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding={padding!r}: choose SAME, VALID or numbers")
        height, width = lax.padtype_to_pads(size, window, strides, padding)
    else:
        both = (padding, padding) if isinstance(padding, int) else padding
        height, width = both
    return pair(height), pair(width)
