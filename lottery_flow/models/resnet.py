"""Residual networks, version 1.5, after He et al. 2015 (arXiv 1512.03385).

    y = relu(shortcut(x) + branch(x))     branch: 3x3, 3x3 or 1x1, 3x3, 1x1

Every convolution is followed by batch normalisation and has no bias. A shortcut is the
identity, or a 1x1 convolution where the shape changes. Version 1.5 halves the image in
the 3x3 convolution of a bottleneck, not in the 1x1 before it. The scale of the last
normalisation of a branch starts at zero, so that each block starts as its shortcut
(Goyal et al. 2017, arXiv 1706.02677); normalisation has momentum 0.9 and epsilon 1e-5,
the last layer starts from N(0, 0.01), as in the paper's released code. Kernels start
as in He et al. 2015 (arXiv 1502.01852), by the fan-out. Without normalisation, blocks
are those of `fixup`.

ResNet-18 to -101 are for ImageNet. ResNet-20 is the one of the same paper for 32 x 32
images, but with 1x1 convolutions for shortcuts, as lottery ticket studies have it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lottery_flow.models.fixup import FixupBlock, branch, fixup_head, shifted
from lottery_flow.models.layers import Conv, block

NORMS = ("batch", "fixup")

# N(0, 2 / fan_out).
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def unbiased(network: Any) -> Callable:
    """`Conv` without bias, with the dtype, initialiser and lowering of a network."""
    return partial(
        Conv,
        use_bias=False,
        dtype=network.dtype,
        kernel_init=network.kernel_init,
        lowering=network.lowering,
    )


def normalize(
    x: Float[Array, "b h w c"], train: bool, name: str, **options: Any
) -> Float[Array, "b h w c"]:
    """Batch normalisation: of the batch in training, by running averages otherwise.

    Computed in float32 and returned in the dtype of `x`. Called within a module, of
    which it becomes the child `name`.
    """
    norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        name=name,
        **options,
    )
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def scaled(channels: int, width: float) -> int:
    """A number of channels times a width multiplier, rounded down, but not to zero."""
    if width <= 0:
        raise ValueError(f"width={width}: the multiplier must be positive")
    return max(1, int(channels * width))


class Block(nn.Module):
    """A residual block.

    Attributes:
      channels: of the output.
      inner: channels of the 1x1 and the 3x3 convolution of a bottleneck; None has two
        3x3 convolutions.
      stride: of the block, 1 or 2.
      conv: makes the convolutions from (features, kernel_size, ...).
    """

    channels: int
    inner: int | None
    stride: int
    conv: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b p q o"]:
        layers = branch(self.channels, self.inner, self.stride)
        y = x
        for i, (size, stride, channels) in enumerate(layers, start=1):
            # Zeros on both sides also where the stride is 2: "SAME" would add one.
            y = self.conv(channels, (size, size), stride, size // 2, name=f"conv{i}")(y)
            last = i == len(layers)
            scale = nn.initializers.zeros if last else nn.initializers.ones
            y = normalize(y, train, f"norm{i}", scale_init=scale)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = self.conv(self.channels, (1, 1), self.stride, 0, name="shortcut")(x)
            x = normalize(x, train, "shortcut_norm")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A convolution, stages of blocks, mean, one dense layer.

    Layers are called `conv1`, `stage1_block1/conv1`, ..., `stage4_block2/shortcut`,
    `fc`. Each stage has twice the channels of the one before, on half the image.

    Attributes:
      n_classes: number of logits.
      n_blocks: of each stage.
      bottleneck: whether blocks are bottlenecks, with four times as many channels.
      first: channels of the first stage.
      small_images: begin with a 3x3 convolution, instead of a 7x7 one that halves the
        image and max pooling that halves it again.
      norm: one of `NORMS`; "fixup" has no normalisation (Zhang et al. 2019).
      width: multiplies every number of channels; rounded down.
      dtype: of the convolutions and their outputs; parameters, normalisation and
        logits are float32.
      remat: compute blocks again for their gradients, see `layers.block`.
      kernel_init: of the convolutions.
      lowering: of the convolutions, see `layers.Conv`.
    """

    n_classes: int
    n_blocks: tuple[int, ...]
    bottleneck: bool
    first: int = 64
    small_images: bool = False
    norm: str = "batch"
    width: float = 1.0
    dtype: Any = jnp.float32
    remat: bool = False
    kernel_init: Callable = he_fan_out
    lowering: str = "auto"

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b n_classes"]:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}: choose one of {', '.join(NORMS)}")
        fixup, conv = self.norm == "fixup", unbiased(self)
        size, stride = (3, 1) if self.small_images else (7, 2)
        width = scaled(self.first, self.width)
        x = conv(width, (size, size), stride, size // 2, name="conv1")(images)
        x = shifted(self, x, "bias1") if fixup else normalize(x, train, "norm1")
        x = nn.relu(x)
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        options = {"n_blocks": sum(self.n_blocks)} if fixup else {}
        make = block(FixupBlock if fixup else Block, self.remat)
        for i, n_blocks in enumerate(self.n_blocks):
            inner = scaled(self.first * 2**i, self.width)
            outer = scaled(4 * self.first * 2**i, self.width)
            for j in range(n_blocks):
                x = make(
                    channels=outer if self.bottleneck else inner,
                    inner=inner if self.bottleneck else None,
                    stride=2 if i > 0 and j == 0 else 1,
                    conv=conv,
                    name=f"stage{i + 1}_block{j + 1}",
                    **options,
                )(x, train)
        return fixup_head(self, x) if fixup else head(x, self.n_classes)


def head(x: Float[Array, "b h w c"], n_classes: int) -> Float[Array, "b n_classes"]:
    """The mean over positions and a dense layer `fc`, in float32."""
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return nn.Dense(n_classes, kernel_init=nn.initializers.normal(0.01), name="fc")(x)


resnet20 = partial(
    ResNet, n_blocks=(3, 3, 3), bottleneck=False, first=16, small_images=True
)
resnet18 = partial(ResNet, n_blocks=(2, 2, 2, 2), bottleneck=False)
resnet34 = partial(ResNet, n_blocks=(3, 4, 6, 3), bottleneck=False)
resnet50 = partial(ResNet, n_blocks=(3, 4, 6, 3), bottleneck=True)
resnet101 = partial(ResNet, n_blocks=(3, 4, 23, 3), bottleneck=True)
