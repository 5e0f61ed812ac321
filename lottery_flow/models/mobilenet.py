"""MobileNet, version 1 (Howard et al. 2017, arXiv 1704.04861).

A 3x3 convolution and thirteen pairs of a depthwise 3x3 and a pointwise 1x1
convolution, each followed by batch normalisation and ReLU, then the mean over positions
and one dense layer. Convolutions have no bias. Kernels start as in He et al. 2015
(arXiv 1502.01852), by the fan-out, the last layer from N(0, 0.01).

A depthwise kernel [3 3 1 c] has nine weights for each channel: sparse training usually
leaves them dense, see `DEPTHWISE`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lottery_flow.models.resnet import he_fan_out, head, normalize, scaled, unbiased

# Output channels of the pointwise convolutions, and strides of the depthwise ones.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    *((1024, 2), (1024, 1)),
)

# What the depthwise layers are called.
DEPTHWISE = tuple(f"block{i}_depthwise" for i in range(1, len(BLOCKS) + 1))


class MobileNetV1(nn.Module):
    """Layers are called `conv1`, `block1_depthwise`, `block1_pointwise`, ..., `fc`.

    Attributes:
      n_classes: number of logits.
      width: multiplies every number of channels; rounded down.
      dtype: of the convolutions and their outputs; parameters, normalisation and
        logits are float32.
      kernel_init: of the convolutions.
      lowering: of the convolutions that are not depthwise, see `layers.Conv`.
    """

    n_classes: int
    width: float = 1.0
    dtype: Any = jnp.float32
    kernel_init: Callable = he_fan_out
    lowering: str = "auto"

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b n_classes"]:
        conv = unbiased(self)

        def layer(x, name, norm, *args, **options):
            x = conv(*args, name=name, **options)(x)
            return nn.relu(normalize(x, train, norm))

        x = layer(images, "conv1", "norm1", scaled(32, self.width), (3, 3), 2, 1)
        for i, (channels, stride) in enumerate(BLOCKS, start=1):
            c, depthwise = x.shape[-1], f"block{i}_depthwise"
            options = {"groups": c, "lowering": "auto"}
            x = layer(
                x, depthwise, f"{depthwise}_norm", c, (3, 3), stride, 1, **options
            )
            width, pointwise = scaled(channels, self.width), f"block{i}_pointwise"
            x = layer(x, pointwise, f"{pointwise}_norm", width, (1, 1))
        return head(x, self.n_classes)
