"""LeNet-5 of the paper: 6-16-120-84, ReLU, max pooling, no normalisation."""

import flax.linen as nn
from jaxtyping import Array, Float

from lottery_flow.models.layers import Conv, check_widths, max_pool


class LeNet5(nn.Module):
    """conv 5x5, pool, conv 5x5, pool, three dense layers.

    44,190 kernel and 236 bias parameters at the default widths on 28 x 28 x 1.

    Attributes:
      n_classes: number of logits.
      widths: of the two convolutions and the two hidden dense layers; the small
        dense network of the paper has (3, 3, 27, 20).
      lowering: of the convolutions, see `layers.Conv`.
    """

    n_classes: int = 10
    widths: tuple = (6, 16, 120, 84)
    lowering: str = "auto"

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b n_classes"]:
        check_widths(self.widths, 4)
        x = images
        for i, width in enumerate(self.widths[:2], start=1):
            conv = Conv(
                width,
                (5, 5),
                padding="VALID",
                lowering=self.lowering,
                name=f"conv{i}",
            )
            x = max_pool(nn.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths[2:], start=1):
            x = nn.relu(nn.Dense(width, name=f"fc{i}")(x))
        return nn.Dense(self.n_classes, name="fc3")(x)
