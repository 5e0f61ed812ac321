"""Training on the active weights alone against the masked training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow.sparsity import compact, rules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.execution import linear
from lottery_flow.sparsity.execution_structure import structure_on_host
from lottery_flow.sparsity.transform import sparsify

OPTIMIZERS = {
    "momentum": optax.chain(
        optax.add_decayed_weights(0.1, mask=masks_lib.in_layers),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "adamw": optax.adamw(0.01, mask=masks_lib.in_layers),
    "clipped": optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.01)),
}


@pytest.fixture(autouse=True)
def _promotion():
    """Adam mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network():
    """Two masked kernels, of which one has no active weight, and a dense one."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 2, 2, 5), "empty": (4, 3), "fc": (6, 2)}
    params = {
        k: {
            "kernel": jnp.asarray(rng.normal(size=s), "float32"),
            "bias": jnp.ones(s[-1]),
        }
        for k, s in shapes.items()
    }
    named = {"conv": jnp.asarray(rng.random((3, 2, 2, 5)) < 0.3)}
    named["empty"] = jnp.zeros((4, 3), bool)
    masks = masks_lib.from_named(named, params)
    return masks_lib.apply(masks, params), masks


def shapes_of(params):
    return {k: v.shape for k, v in masks_lib.named_leaves(params).items()}


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_packed_and_unpacked_again_nothing_changed():
    params, masks = network()
    where = compact.positions_of(masks)
    values = compact.pack(params, where)
    n = int(masks["conv"]["kernel"].sum())
    assert values["conv"]["kernel"].shape == (n, 1)
    assert values["empty"]["kernel"].shape == (0, 1)
    assert values["fc"] is not params["fc"]
    shapes = shapes_of(params)
    jax.tree.map(same_bits, compact.unpack(values, where, shapes), params)
    for name, own in where.items():
        mask = compact.mask_of(own, shapes[name])
        np.testing.assert_array_equal(mask, masks[name]["kernel"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_do_to_values_what_they_do_to_masked_kernels(name):
    inner, (params, masks) = OPTIMIZERS[name], network()
    where, shapes = compact.positions_of(masks), shapes_of(params)
    tx = sparsify(inner, masks, rules.static(), key=jax.random.key(0))

    def loss(params):
        return sum(jnp.sum(jnp.sin(3 * leaf + 1)) for leaf in jax.tree.leaves(params))

    state = tx.init(params)
    for _ in range(2):  # so that there is something in the slots
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    values = compact.pack(params, where)
    slots = compact.pack_slots(inner, state.inner_state, where, params)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        grads = jax.grad(lambda v: loss(compact.unpack(v, where, shapes)))(values)
        assert grads["conv"]["kernel"].shape == values["conv"]["kernel"].shape
        own, slots = inner.update(grads, slots, values)
        values = optax.apply_updates(values, own)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)

    jax.tree.map(close, compact.unpack(values, where, shapes), params)
    slots = compact.unpack_slots(inner, slots, where, values, shapes)
    jax.tree.map(close, slots, state.inner_state)


def test_factored_slots_are_refused():
    params, masks = network()
    inner = optax.adafactor(0.1, min_dim_size_to_factor=2)
    where = compact.positions_of(masks)
    with pytest.raises(ValueError, match="cannot be had for the active weights alone"):
        compact.pack_slots(inner, inner.init(params), where, params)


def test_products_take_columns_of_active_weights():
    rng = np.random.default_rng(1)
    for shape, share in (((7, 5), 0.4), ((6, 1), 1.0), ((4, 3), 0.0)):
        mask = rng.random(shape) < share
        kernel = jnp.asarray(np.where(mask, rng.normal(size=shape), 0), "float32")
        x = jnp.asarray(rng.normal(size=(3, shape[0])), "float32")
        plan = structure_on_host(mask)

        def gradient(kernel, x=x, plan=plan):
            def loss(kernel, x):
                return jnp.sum(jnp.sin(linear(x, kernel, plan, grad="active")))

            return jax.value_and_grad(loss, (0, 1))(kernel, x)

        value, (d_kernel, dx) = gradient(kernel)
        alone = gradient(compact.gather(kernel, plan.positions))
        np.testing.assert_allclose(alone[0], value, rtol=1e-6)
        np.testing.assert_allclose(alone[1][1], dx, rtol=1e-6)
        assert alone[1][0].shape == (mask.sum(), 1)
        np.testing.assert_allclose(alone[1][0][:, 0], d_kernel[mask], rtol=1e-6)
    plan = structure_on_host(np.eye(4, 3, dtype=bool))
    with pytest.raises(ValueError, match="have no dense gradient"):
        linear(jnp.ones((2, 4)), jnp.ones((3, 1)), plan)
