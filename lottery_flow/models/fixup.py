"""Residual blocks without normalisation: Fixup (Zhang, Dauphin & Ma 2019, 1901.09321).

    y = relu(shortcut(x + a) + c branch(x + a) + b)

The branch has a scalar bias before each convolution and each ReLU, and one scale at its
end. Its last convolution starts at zero, its m - 1 others L^(-1/(2 m - 2)) times as
large as in He et al. 2015, for L blocks in the network; the last layer of the network
starts at zero too. An update then changes the output by an amount that does not depend
on the depth.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


def branch(channels: int, inner: int | None, stride: int) -> list[tuple[int, int, int]]:
    """Kernel size, stride and output channels of a branch's convolutions."""
    if inner is None:
        return [(3, stride, channels), (3, 1, channels)]
    return [(1, 1, inner), (3, stride, inner), (1, 1, channels)]


def shifted(module: nn.Module, x: Float[Array, "..."], name: str) -> Array:
    """`x` plus one trained number, a parameter `name` of the module, zero at first."""
    bias = module.param(name, nn.initializers.zeros, (), jnp.float32)
    return x + bias.astype(x.dtype)


class FixupBlock(nn.Module):
    """A residual block without normalisation.

    Attributes:
      channels, inner, stride, conv: see `resnet.Block`.
      n_blocks: of the network.
    """

    channels: int
    inner: int | None
    stride: int
    conv: Callable
    n_blocks: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b p q o"]:
        del train  # the same in evaluation
        layers = branch(self.channels, self.inner, self.stride)
        power = -1 / (2 * len(layers) - 2)
        he = nn.initializers.variance_scaling(
            2.0 * self.n_blocks ** (2 * power), "fan_out", "normal"
        )
        y = start = shifted(self, x, "bias1a")
        for i, (size, stride, channels) in enumerate(layers, start=1):
            last = i == len(layers)
            y = y if i == 1 else shifted(self, y, f"bias{i}a")
            y = self.conv(
                *(channels, (size, size), stride, size // 2),
                kernel_init=nn.initializers.zeros if last else he,
                name=f"conv{i}",
            )(y)
            if last:
                scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
                y = y * scale.astype(y.dtype)
            y = shifted(self, y, f"bias{i}b")
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = self.conv(self.channels, (1, 1), self.stride, 0, name="shortcut")(start)
        return nn.relu(x + y)


def fixup_head(network: Any, x: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
    """The mean over positions, a bias and a dense layer `fc`, zero at first."""
    x = shifted(network, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), "bias2")
    zeros = nn.initializers.zeros
    return nn.Dense(network.n_classes, kernel_init=zeros, name="fc")(x)
