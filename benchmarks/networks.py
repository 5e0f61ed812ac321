"""The networks that are timed, and a plain dense step as the reference."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lottery_flow import models
from lottery_flow.models import Model
from lottery_flow.sparsity import distributions, rules, schedules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.transform import sparsify
from lottery_flow.state import TrainState, create
from lottery_flow.steps import Steps, make_steps, normalize

RATE, MOMENTUM, SPARSITY = 0.01, 0.9, 0.9


class Setting(NamedTuple):
    """A network and the batches that it sees."""

    name: str
    image_shape: tuple[int, int, int]
    n_classes: int
    batch_size: int


SETTINGS = {
    "mlp": Setting("mlp", (28, 28, 1), 10, 128),
    "lenet5": Setting("lenet5", (28, 28, 1), 10, 128),
    "wrn22_2": Setting("wrn22_2", (32, 32, 3), 10, 32),
    "resnet50": Setting("resnet50", (64, 64, 3), 1000, 8),
}


class PlainLeNet5(nn.Module):
    """LeNet-5 as Flax writes it: XLA's convolution and pooling."""

    n_classes: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        x = images
        for i, width in enumerate((6, 16), start=1):
            x = nn.Conv(width, (5, 5), padding="VALID", name=f"conv{i}")(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84), start=1):
            x = nn.relu(nn.Dense(width, name=f"fc{i}")(x))
        return nn.Dense(self.n_classes, name="fc3")(x)


def create_model(setting: Setting) -> Model:
    if setting.name == "plain_lenet5":
        return models.from_module(PlainLeNet5(), setting.image_shape)
    return models.create(setting.name, setting.image_shape, setting.n_classes)


def data(setting: Setting, n: int = 1024) -> dict[str, Any]:
    """Random images: what is timed does not depend on what they show."""
    rng = np.random.default_rng(0)
    shape = (n, *setting.image_shape)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, setting.n_classes, n, dtype=np.int32)
    return jax.tree.map(jnp.asarray, {"image": images, "label": labels})


def statistics_of(setting: Setting):
    """Mean and standard deviation of the channels, which are as good as any."""
    channels = setting.image_shape[-1]
    return (0.5,) * channels, (0.25,) * channels


def dense_step(setting: Setting, model: Model):
    """State and step of a plain dense training loop with optax alone."""
    inner = optax.sgd(RATE, momentum=MOMENTUM)
    variables = jax.jit(model.init)(jax.random.key(0))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    mean, std = statistics_of(setting)

    def loss_fn(params, batch_stats, images, labels):
        logits, batch_stats = model.apply(params, batch_stats, images, True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return loss, (batch_stats, accuracy)

    def step(state, data, indices):
        params, batch_stats, opt_state = state
        images = normalize(data["image"][indices], mean, std)
        (loss, (batch_stats, accuracy)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(params, batch_stats, images, data["label"][indices])
        updates, opt_state = inner.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, batch_stats, opt_state), (loss, accuracy)

    return (params, batch_stats, inner.init(params)), step


def sparse_steps(
    setting: Setting, model: Model, seed: int = 0, sparsity: float = SPARSITY
) -> tuple[TrainState, Steps]:
    """State and steps under RigL, Erdos-Renyi-kernel."""
    inner = optax.sgd(RATE, momentum=MOMENTUM)
    rule = rules.rigl(schedules.every(100), schedules.constant(0.3))

    @jax.jit
    def start(key):
        variables = model.init(key)
        params = variables["params"]
        shapes = {k: v.shape for k, v in masks_lib.layers(params).items()}
        n_active = distributions.erdos_renyi_kernel(shapes, sparsity)
        masks = masks_lib.random(key, params, n_active)
        tx = sparsify(inner, masks, rule, key=key)
        return create(tx, params, variables.get("batch_stats", {}), key)

    method = inner, rule
    steps = make_steps(model.apply, lambda knobs: method, *statistics_of(setting))
    return start(jax.random.key(seed)), steps
