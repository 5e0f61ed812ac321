"""The multi-layer perceptron of the paper: 300-100, ReLU."""

import flax.linen as nn
from jaxtyping import Array, Float

from lottery_flow.models.layers import check_widths


class MLP(nn.Module):
    """Dense layers on the flattened image.

    266,200 kernel and 410 bias parameters at the default widths on 28 x 28 x 1.

    Attributes:
      n_classes: number of logits.
      widths: of the hidden layers; the small dense network has (8, 8).
    """

    n_classes: int = 10
    widths: tuple = (300, 100)

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b n_classes"]:
        check_widths(self.widths)
        x = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.widths, start=1):
            x = nn.relu(nn.Dense(width, name=f"fc{i}")(x))
        return nn.Dense(self.n_classes, name=f"fc{len(self.widths) + 1}")(x)
