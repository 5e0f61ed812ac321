"""Hessian products against the dense Hessian, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import dense_hessian, network

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import curvature
from lottery_flow.analysis.objective import Objective
from lottery_flow.sparsity.active import active_space


def all_columns(operator):
    return np.asarray(operator.product(jnp.eye(operator.space.n)))


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (False, {}),
        (True, {"weight_decay": 0.3}),
        (True, {"norms": "batch"}),
    ],
    ids=["plain", "frozen", "batch"],
)
def test_hessian_equals_the_dense_one(norm, options):
    with jax.enable_x64(True):
        net = network(norm=norm)
        objective = net.objective(**options)
        batches = batches_lib.split(net.data, 4)  # 4 + 4 + 3
        operator = curvature.hessian(objective, net.params, net.masks, batches)
        # All at once, where that has the same loss.
        whole = batches if options.get("norms") == "batch" else [net.data]
        wanted = dense_hessian(objective, net.params, net.masks, whole)
        np.testing.assert_allclose(all_columns(operator), wanted, rtol=0, atol=1e-12)
        assert np.abs(wanted).max() > 0.1


def test_the_cut_into_batches_does_not_matter():
    with jax.enable_x64(True):
        net = network(norm=True)
        loss = net.objective()
        v = jnp.asarray(np.random.default_rng(0).standard_normal(81))

        def product(loss, size):
            cut = batches_lib.split(net.data, size)
            return curvature.hessian(loss, net.params, net.masks, cut)(v)

        np.testing.assert_allclose(product(loss, 3), product(loss, 11), atol=1e-13)
        trained = net.objective(norms="batch")
        difference = product(trained, 3) - product(trained, 11)
        assert jnp.abs(difference).max() > 1e-3


def test_hvp_of_trees_masks_before_and_after():
    with jax.enable_x64(True):
        net = network()
        loss = net.objective()
        batches = [net.data]
        wanted = dense_hessian(loss, net.params, net.masks, batches)
        tangent = jax.tree.map(jnp.ones_like, net.params)  # inactive entries too
        found = curvature.hvp(loss, net.params, net.masks, batches, tangent)
        space = active_space(net.params, net.masks)
        np.testing.assert_allclose(space.flatten(found), wanted.sum(axis=1), atol=1e-12)
        masked = jax.tree.map(
            lambda m, x: 0.0 if m is None else jnp.abs(jnp.where(m, 0, x)).max(),
            net.masks,
            found,
            is_leaf=lambda x: x is None,
        )
        assert max(float(x) for x in jax.tree.leaves(masked)) == 0.0


def test_gauss_newton_and_residual_make_the_hessian():
    with jax.enable_x64(True):
        net = network(norm=True)
        objective = net.objective(norms="batch")
        batches = batches_lib.split(net.data, 6)
        args = net.params, net.masks, batches
        space = active_space(net.params, net.masks)

        @jax.jit
        def jacobian(batch):
            jac = jax.jacobian(lambda p: objective.logits(p, batch))(net.params)
            p = jax.nn.softmax(objective.logits(net.params, batch))
            return jax.vmap(jax.vmap(space.flatten))(jac), p  # [b c n], [b c]

        wanted = 0.0
        for batch in batches:
            flat, p = map(np.asarray, jacobian(batch))
            middle = np.stack([np.diag(q) - np.outer(q, q) for q in p])
            wanted = wanted + np.einsum("bci,bcd,bdj->ij", flat, middle, flat) / 11
        gauss_newton = all_columns(curvature.gauss_newton(objective, *args))
        np.testing.assert_allclose(gauss_newton, wanted, atol=1e-12)
        rest = all_columns(curvature.residual(objective, *args))
        whole = all_columns(curvature.hessian(objective, *args))
        np.testing.assert_allclose(gauss_newton + rest, whole, atol=1e-12)
        assert np.linalg.eigvalsh(gauss_newton).min() > -1e-12
        assert np.linalg.eigvalsh(rest).min() < -1e-3


def test_the_hessian_is_the_derivative_of_the_gradient():
    with jax.enable_x64(True):
        net = network(activation=nn.relu)
        loss = net.objective()
        operator = curvature.hessian(loss, net.params, net.masks, [net.data])
        v = jnp.asarray(np.random.default_rng(1).standard_normal(operator.space.n))
        step = 1e-6

        def gradient_at(sign):
            moved = jax.tree.map(
                lambda p, d: p + sign * step * d,
                net.params,
                operator.space.unflatten(v),
            )
            return curvature.gradient(loss, moved, net.masks, [net.data])

        slope = (gradient_at(1) - gradient_at(-1)) / (2 * step)
        np.testing.assert_allclose(operator(v), slope, atol=1e-7)


def test_no_masks_means_everything():
    with jax.enable_x64(True):
        net = network()
        operator = curvature.hessian(net.objective(), net.params, None, [net.data])
        assert operator.space.n == sum(x.size for x in jax.tree.leaves(net.params))


def test_data_spread_over_devices_give_the_same_product():
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((4, 6)).astype(np.float32),
        "b": rng.standard_normal((6, 1)).astype(np.float32),
    }
    x = rng.standard_normal((16, 4)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",))

    def loss(p, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ p["a"]) @ p["b"]))

    def product(params, x):
        operator = curvature.hessian(loss, params, None, [x])
        return np.asarray(operator(jnp.ones(operator.space.n, jnp.float32)))

    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    copied = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    alone, together = product(params, x), product(copied, spread)
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())
    assert len(spread.sharding.device_set) == 8


def test_gradient_overlap():
    gradient = np.array([3.0, 0.0, 4.0])
    table = curvature.gradient_overlap(gradient, np.eye(3)[[2, 1, 0]])
    np.testing.assert_allclose(table["overlap"], [16 / 25, 16 / 25, 1.0])
    assert table["n_vectors"].tolist() == [1, 2, 3]
    figure = curvature.plot_gradient_overlap(table)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), table["overlap"])


def test_wrong_inputs_get_a_sentence():
    with jax.enable_x64(True):
        net = network()
    with pytest.raises(ValueError, match="batches is empty"):
        curvature.hessian(net.objective(), net.params, net.masks, [])
    with pytest.raises(ValueError, match="norms='train' is unknown; write 'frozen'"):
        net.objective(norms="train")


def test_a_matrix_of_another_space_is_refused():
    net = network()
    space = active_space(net.params, net.masks)
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 2\), but there are"):
        curvature.explicit(np.eye(2), space)


def test_a_criterion_of_ones_own():
    """Mean squared error of a linear model: H = G = X^T X / n, R = 0."""
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((7, 3))
        objective = Objective(
            logits=lambda p, b: b["x"] @ p["w"],
            criterion=lambda z, b: 0.5 * jnp.sum((z - b["y"]) ** 2, axis=1),
        )
        params = {"w": jnp.ones((3, 1))}
        batch = {"x": x, "y": np.zeros((7, 1))}
        args = objective, params, None, [batch]
        gauss_newton = all_columns(curvature.gauss_newton(*args))
        np.testing.assert_allclose(gauss_newton, x.T @ x / 7, atol=1e-13)
        np.testing.assert_array_equal(all_columns(curvature.residual(*args)), 0)
