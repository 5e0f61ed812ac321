"""Wide residual networks for 32 x 32 images (Zagoruyko & Komodakis 2016, 1605.07146).

    z = relu(norm(x))
    y = shortcut + conv(relu(norm(conv(z))))     shortcut: x, or a 1x1 convolution of z

Normalisation comes before the convolutions (He et al. 2016, arXiv 1603.05027). WRN-d-k
has d = 6 n + 4 layers in three stages of n blocks with 16 k, 32 k and 64 k channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lottery_flow.models.layers import block
from lottery_flow.models.resnet import he_fan_out, head, normalize, scaled, unbiased


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU.

    Attributes:
      channels: of the output.
      stride: of the block, 1 or 2.
      conv: makes the convolutions from (features, kernel_size, ...).
    """

    channels: int
    stride: int
    conv: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b p q o"]:
        z = nn.relu(normalize(x, train, "norm1"))
        y = self.conv(self.channels, (3, 3), self.stride, 1, name="conv1")(z)
        y = nn.relu(normalize(y, train, "norm2"))
        y = self.conv(self.channels, (3, 3), 1, 1, name="conv2")(y)
        if x.shape != y.shape:
            x = self.conv(self.channels, (1, 1), self.stride, 0, name="shortcut")(z)
        return x + y


class WideResNet(nn.Module):
    """3x3 convolution, three stages of blocks, normalisation, mean, one dense layer.

    Layers are called `conv1`, `stage1_block1/conv1`, ..., `stage3_block1/shortcut`,
    `fc`.

    Attributes:
      n_classes: number of logits.
      depth: number of layers, 6 n + 4.
      widen: k, the factor of the stages' channels.
      width: multiplies every number of channels, the first layer's too; rounded down.
      dtype: of the convolutions and their outputs; parameters, normalisation and
        logits are float32.
      remat: compute blocks again for their gradients, see `layers.block`.
      kernel_init: of the convolutions.
      lowering: of the convolutions, see `layers.Conv`.
    """

    n_classes: int
    depth: int
    widen: int
    width: float = 1.0
    dtype: Any = jnp.float32
    remat: bool = False
    kernel_init: Callable = he_fan_out
    lowering: str = "auto"

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b n_classes"]:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth={self.depth}: must be 10, 16, 22, ... = 6 n + 4")
        conv = unbiased(self)
        x = conv(scaled(16, self.width), (3, 3), 1, 1, name="conv1")(images)
        for i in range(3):
            for j in range((self.depth - 4) // 6):
                x = block(WideBlock, self.remat)(
                    channels=scaled(16 * 2**i * self.widen, self.width),
                    stride=2 if i > 0 and j == 0 else 1,
                    conv=conv,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x, train)
        x = nn.relu(normalize(x, train, "norm"))
        return head(x, self.n_classes)


wrn16_4 = partial(WideResNet, depth=16, widen=4)
wrn22_2 = partial(WideResNet, depth=22, widen=2)
