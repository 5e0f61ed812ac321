"""The vision transformer ViT-S/16 (Dosovitskiy et al. 2020, arXiv 2010.11929).

    x = [class token, patches W] + positions
    x = x + attention(norm(x));  x = x + mlp(norm(x))      `depth` times
    logits = fc(norm(x)[class token])

(S: Touvron et al. 2020, arXiv 2012.12877.) Queries, keys, values and the output of all
heads together are dense layers with kernels [in, out], so that a mask has the layout
that it has everywhere. Kernels start from Glorot's uniform distribution, positions from
N(0, 0.02), the last layer from N(0, 0.01). No dropout.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lottery_flow.models.layers import Conv, block

_NORMAL = nn.initializers.normal


class Attention(nn.Module):
    """Self-attention of several heads: layers `query`, `key`, `value`, `out`."""

    n_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        def project(name):
            return _dense(d, self.dtype, name)(x).reshape(b, n, self.n_heads, -1)

        b, n, d = x.shape
        q, k, v = (project(name) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        shares = nn.softmax(scores.astype(jnp.float32)).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", shares, v)
        return _dense(d, self.dtype, "out")(y.reshape(b, n, d))


class EncoderBlock(nn.Module):
    """Attention, then an MLP of layers `fc1` and `fc2`, each on what is normalised."""

    n_heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], train: bool = False
    ) -> Float[Array, "b n d"]:
        del train  # the same in evaluation
        d = x.shape[-1]
        y = _normalize(x, "norm1")
        x = x + Attention(self.n_heads, self.dtype, name="attention")(y)
        y = _dense(4 * d, self.dtype, "fc1")(_normalize(x, "norm2"))
        return x + _dense(d, self.dtype, "fc2")(nn.gelu(y, approximate=False))


class ViT(nn.Module):
    """Layers are called `patches`, `block1/attention/query`, ..., `block12/fc2`, `fc`.

    Attributes:
      n_classes: number of logits.
      patch: side of a patch, in pixels, which divides that of the image.
      n_heads: of the attention.
      depth: number of blocks.
      width: multiplies the 64 dimensions of a head; rounded down.
      dtype: of the dense layers and their outputs; parameters, normalisation and logits
        are float32.
      remat: compute blocks again for their gradients, see `layers.block`.
      lowering: of the convolution that makes the patches, see `layers.Conv`.
    """

    n_classes: int
    patch: int = 16
    n_heads: int = 6
    depth: int = 12
    width: float = 1.0
    dtype: Any = jnp.float32
    remat: bool = False
    lowering: str = "auto"

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b n_classes"]:
        b, height, width, _ = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"patch={self.patch} does not divide images of {height} x {width}"
            )
        d, side = self.n_heads * int(64 * self.width), (self.patch, self.patch)
        if d < 1:
            raise ValueError(f"width={self.width}: no dimension is left; give more")
        patches = Conv(
            *(d, side, side, "VALID"),
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            lowering=self.lowering,
            name="patches",
        )(images)
        token = self.param("class_token", nn.initializers.zeros, (d,), jnp.float32)
        token = jnp.broadcast_to(token.astype(patches.dtype), (b, 1, d))
        x = jnp.concatenate([token, patches.reshape(b, -1, d)], axis=1)
        shape = x.shape[1:]
        positions = self.param("position_embedding", _NORMAL(0.02), shape, jnp.float32)
        x = x + positions.astype(x.dtype)[None]
        for i in range(1, self.depth + 1):
            make = block(EncoderBlock, self.remat)
            x = make(self.n_heads, self.dtype, name=f"block{i}")(x, train)
        x = _normalize(x, "norm")[:, 0].astype(jnp.float32)
        return nn.Dense(self.n_classes, kernel_init=_NORMAL(0.01), name="fc")(x)


def _dense(features, dtype, name):
    init = nn.initializers.xavier_uniform()
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def _normalize(x, name):
    """Layer normalisation, computed in float32 and returned in the dtype of `x`."""
    norm = nn.LayerNorm(epsilon=1e-6, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)
