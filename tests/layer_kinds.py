"""A network with each kind of layer that can be computed by its active weights."""

from typing import Any

import flax.linen as nn
import jax

from lottery_flow import models
from lottery_flow.models import layers
from lottery_flow.sparsity import masks as masks_lib

IMAGE = (9, 8, 3)


class Layers(nn.Module):
    """Each kind of layer: strides, paddings, groups, tokens, without a bias."""

    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        def conv(*args, **own):
            return layers.Conv(*args, dtype=self.dtype, **own)

        def dense(*args, **own):
            return nn.Dense(*args, dtype=self.dtype, **own)

        x = nn.tanh(conv(6, (3, 3), strides=2, name="strided")(images))
        x = nn.tanh(conv(8, (2, 3), padding="VALID", use_bias=False, name="valid")(x))
        x = nn.tanh(conv(8, (3, 3), groups=4, name="groups")(x))
        x = nn.tanh(conv(9, (1, 1), strides=(1, 2), name="point")(x))
        x = layers.block(Block, self.remat)(self.dtype, name="block")(x, train)
        x = x.reshape(len(x), -1, 9)
        x = nn.tanh(dense(7, name="tokens")(x)).reshape(len(x), -1)
        return dense(5, use_bias=False, name="fc")(x)


class Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, axis_name=None, name="norm")
        y = layers.Conv(9, (3, 3), padding=1, dtype=self.dtype, name="conv")(norm(x))
        return x + nn.relu(y)


PLANNED = ["strided", "valid", "point", "block/conv", "tokens", "fc"]


def network(**fields: Any):
    """The model, its sparse variables and its masks, at 75 % in the planned layers."""
    model = models.from_module(Layers(**fields), IMAGE)
    variables = model.init(jax.random.key(0))
    sizes = {k: v.size for k, v in masks_lib.layers(variables["params"]).items()}
    counts = {k: size // 4 for k, size in sizes.items() if k in PLANNED}
    masks = masks_lib.random(jax.random.key(1), variables["params"], counts)
    params = masks_lib.apply(masks, variables["params"])
    return model, variables | {"params": params}, masks
