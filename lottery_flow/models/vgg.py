"""VGG-16 of the paper (its section on ImageNet), after Simonyan & Zisserman 2014.

Thirteen 3x3 convolutions in five stages, max pooling after the first four, the mean
over positions and one dense layer: none of the original's three large dense layers, no
dropout. The paper's has no normalisation; with it, every convolution is followed by
batch normalisation. Convolutions have no bias. Kernels start as in He et al. 2015
(arXiv 1502.01852), by the fan-out, the last layer from N(0, 0.01).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lottery_flow.models.layers import max_pool
from lottery_flow.models.resnet import he_fan_out, head, normalize, scaled, unbiased

# Number of convolutions and their channels, stage by stage.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class VGG(nn.Module):
    """Layers are called `stage1_conv1`, ..., `stage5_conv3`, `fc`.

    Attributes:
      n_classes: number of logits.
      normalized: whether batch normalisation follows each convolution.
      width: multiplies every number of channels; rounded down.
      dtype: of the convolutions and their outputs; parameters, normalisation and
        logits are float32.
      kernel_init: of the convolutions.
      lowering: of the convolutions, see `layers.Conv`.
    """

    n_classes: int
    normalized: bool
    width: float = 1.0
    dtype: Any = jnp.float32
    kernel_init: Callable = he_fan_out
    lowering: str = "auto"

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b n_classes"]:
        conv, x = unbiased(self), images
        for i, (n_convolutions, channels) in enumerate(STAGES, start=1):
            for j in range(1, n_convolutions + 1):
                name, width = f"stage{i}_conv{j}", scaled(channels, self.width)
                x = conv(width, (3, 3), 1, 1, name=name)(x)
                if self.normalized:
                    x = normalize(x, train, f"stage{i}_norm{j}")
                x = nn.relu(x)
            if i < len(STAGES):
                x = max_pool(x, (2, 2), strides=(2, 2))
        return head(x, self.n_classes)


vgg16 = partial(VGG, normalized=False)
vgg16_bn = partial(VGG, normalized=True)
