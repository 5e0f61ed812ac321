"""Augmentation of images in memory, on the device that trains on them.

`crop_flip` is what CIFAR-10 is trained with since He et al. 2015 (arXiv 1512.03385,
section 4.2): four rows and columns of zeros on each side, a random crop of the first
size, and a flip from left to right half of the time. What is drawn depends on the seed
of the stream and on the step alone, and comes from the host with the indices of the
examples: runs on the same batches see them augmented in the same way.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, UInt8

from lottery_flow.data import arrays

AUGMENTATIONS = ("", "crop_flip")
PAD = 4  # pixels


def draws(
    augment: str, seed: int, step: int, n_examples: int, batch_size: int
) -> Int32[np.ndarray, "b"] | Int32[np.ndarray, "4 b"]:
    """The training examples of one step and, with `crop_flip`, what becomes of them.

    Returns:
      The indices of `arrays.batch_indices`; with augmentation rows of them, of the
      first row and the first column of the crop, and of whether to flip.
    """
    indices = arrays.batch_indices(seed, step, n_examples, batch_size)
    if not augment:
        return indices
    bits = np.random.Philox(np.random.SeedSequence([seed, step, 2]))
    rng = np.random.Generator(bits)
    corners = rng.integers(0, 2 * PAD, (2, batch_size), np.int32, endpoint=True)
    flips = rng.integers(0, 2, (1, batch_size), np.int32)
    return np.concatenate([indices[None], corners, flips])


def take(
    data: dict[str, Any], draw: Int[Array, " b"] | Int[Array, "4 b"] | None
) -> dict[str, Any]:
    """The batch of some examples, augmented if the draw says so; None: all of them."""
    if draw is None:
        return data
    indices = draw if draw.ndim == 1 else draw[0]
    batch = {k: jnp.take(v, indices, axis=0, mode="clip") for k, v in data.items()}
    if draw.ndim == 1:
        return batch
    return batch | {"image": jax.vmap(_crop_flip)(batch["image"], draw[1:].T)}


def _crop_flip(image: UInt8[Array, "h w c"], draw: Int[Array, "3"]):
    padded = jnp.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)))
    corner = draw[0], draw[1], jnp.zeros((), draw.dtype)
    cropped = jax.lax.dynamic_slice(padded, corner, image.shape)
    return jnp.where(draw[2] == 1, cropped[:, ::-1], cropped)
