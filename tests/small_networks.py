"""Small networks with masks and data, in float64, for the oracles of the analysis."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow import models
from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import objective
from lottery_flow.sparsity import masks as masks_lib

IMAGE = (6, 6, 2)
N_CLASSES = 3


class Small(nn.Module):
    """A convolution and two dense layers, smooth or piecewise linear."""

    activation: Any = nn.tanh
    norm: bool = False

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(3, (3, 3), strides=2, padding="VALID", name="conv", **_TYPE)(images)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm", **_TYPE)(x)
        x = self.activation(x).reshape(len(x), -1)
        x = self.activation(nn.Dense(5, name="hidden", **_TYPE)(x))
        return nn.Dense(N_CLASSES, name="logits", **_TYPE)(x)


_TYPE = {"param_dtype": jnp.float64, "dtype": jnp.float64}


class Network(NamedTuple):
    """A sparse network, half of its kernels masked, and a data set of 11 examples.

    Call `network` inside `jax.enable_x64(True)`, and use it there.
    """

    model: models.Model
    params: Any
    batch_stats: Any
    masks: Any
    data: dict[str, np.ndarray]

    def objective(self, **options) -> objective.Objective:
        def apply(*args):
            with jax.numpy_dtype_promotion("standard"):  # flax mixes types here
                return self.model.apply(*args)

        return objective.classification(apply, self.batch_stats, **options)


@functools.cache
def network(*, norm: bool = False, activation=nn.tanh, seed: int = 0) -> Network:
    """A network with biases and running statistics away from their first values."""
    rng = np.random.default_rng(seed)
    with jax.numpy_dtype_promotion("standard"):  # flax keeps statistics in float32
        model = models.from_module(Small(activation, norm), IMAGE)
        variables = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))

    def moved(tree, draw):
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf + 0.3 * draw(leaf.shape), jnp.float64), tree
        )

    params = moved(variables["params"], rng.standard_normal)
    batch_stats = moved(variables.get("batch_stats", {}), rng.random)
    n_active = {k: v.size // 2 for k, v in masks_lib.layers(params).items()}
    masks = masks_lib.random(jax.random.key(seed + 1), params, n_active)
    data = {
        "image": rng.standard_normal((11, *IMAGE)),
        "label": rng.integers(0, N_CLASSES, 11).astype(np.int32),
    }
    return Network(model, masks_lib.apply(masks, params), batch_stats, masks, data)


def dense_hessian(loss_fn, params, masks, batches):
    """Of the mean over all batches, by jax.hessian on all parameters; then cut."""
    n = batches_lib.total(batches)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    # Compiled for each size of a batch, not for each batch.
    of_batch = jax.jit(jax.hessian(lambda x, batch: loss_fn(unravel(x), batch)))
    full = sum(
        np.asarray(of_batch(flat, b)) * (batches_lib.size(b) / n) for b in batches
    )
    active = jax.tree.map(
        lambda m, p: np.ones(p.shape, bool) if m is None else np.asarray(m),
        masks,
        params,
        is_leaf=lambda x: x is None,
    )
    index = np.flatnonzero(
        np.concatenate([np.ravel(a) for a in jax.tree.leaves(active)])
    )
    return full[np.ix_(index, index)]
