"""Second derivatives against explicit matrices, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import second_order
from lottery_flow.sparsity.active import active_space


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network():
    """A sparse network of 3-4-2 units with a dense bias, and seven examples."""
    rng = np.random.default_rng(1)
    params = {
        "one": {"bias": rng.normal(size=4), "kernel": rng.normal(size=(3, 4))},
        "two": {"kernel": rng.normal(size=(4, 2))},
    }
    params = jax.tree.map(jnp.asarray, params)
    masks = {
        "one": {"bias": None, "kernel": jnp.asarray(rng.random((3, 4)) < 0.6)},
        "two": {"kernel": jnp.asarray(rng.random((4, 2)) < 0.6)},
    }
    examples = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.integers(0, 2, 7))
    return masks_lib.apply(masks, params), masks, examples


def outputs(params, example):
    hidden = jnp.tanh(example[0] @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"]


def criterion(z, example):
    return jax.nn.logsumexp(z) - z[example[1]]


def loss_of_one(params, example):
    return criterion(outputs(params, example), example)


def mean_loss(examples):
    return lambda p: jnp.mean(jax.vmap(loss_of_one, (None, 0))(p, examples))


def whole_matrix(fn, params, masks):
    """A matrix of all parameters, reduced to the active ones by index."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    flags = masks_lib.tree_map(
        lambda m, p: np.ones(p.shape, bool) if m is None else np.asarray(m),
        masks,
        params,
    )
    active = np.concatenate([f.ravel() for f in jax.tree.leaves(flags)])
    matrix = np.asarray(fn(lambda v: unravel(v))(flat))
    return matrix[..., active], active


def there_and_back(masks, tree):
    @jax.jit
    def fn(tree):
        vector = active_space(tree, masks).flatten(tree)
        return vector, active_space(tree, masks).unflatten(vector)

    return fn(tree)


def test_vectors_of_active_entries():
    params, masks, _ = network()
    spoilt = jax.tree.map(lambda x: np.where(x == 0, np.nan, x), params)
    vector, back = there_and_back(masks, spoilt)
    one, two = (np.asarray(params[k]["kernel"]) for k in ("one", "two"))
    of_one, of_two = (np.asarray(masks[k]["kernel"]) for k in ("one", "two"))
    expected = np.concatenate([params["one"]["bias"], one[of_one], two[of_two]])
    np.testing.assert_array_equal(vector, expected)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_vectors_are_float32_unless_a_leaf_is_wider():
    tree = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    masks = {"a": np.eye(2, dtype=bool), "b": None}
    vector, back = there_and_back(masks, tree)
    assert vector.dtype == jnp.float32
    assert back["a"].dtype == jnp.bfloat16
    assert back["a"].tolist() == [[1, 0], [0, 1]]


def test_hessian_and_its_diagonal_equal_the_explicit_ones():
    params, masks, examples = network()
    loss = mean_loss(examples)
    matrix, active = whole_matrix(
        lambda unravel: jax.jit(jax.hessian(lambda v: loss(unravel(v)))), params, masks
    )
    matrix = matrix[active]
    found = jax.jit(lambda p: second_order.hessian(loss, p, masks))(params)
    np.testing.assert_allclose(found, matrix, atol=1e-12)
    diagonal = jax.jit(
        lambda p: second_order.hessian_diagonal(loss, p, masks, block=4)
    )(params)
    vector = active_space(diagonal, masks).flatten(diagonal)
    np.testing.assert_allclose(vector, np.diag(matrix), atol=1e-12)
    assert not np.asarray(diagonal["one"]["kernel"])[~masks["one"]["kernel"]].any()


def test_gauss_newton_diagonal_equals_the_explicit_product():
    params, masks, examples = network()

    def jacobian(unravel):
        def all_outputs(v):
            return jax.vmap(outputs, (None, 0))(unravel(v), examples)

        return jax.jit(jax.jacrev(all_outputs))

    j, _ = whole_matrix(jacobian, params, masks)  # [7, 2, n]
    z = np.asarray(jax.vmap(outputs, (None, 0))(params, examples))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    curvature = np.einsum("bi,ij->bij", p, np.eye(2)) - np.einsum("bi,bj->bij", p, p)
    expected = np.einsum("bcn,bcd,bdn->n", j, curvature, j) / 7
    found = jax.jit(
        lambda p: second_order.gauss_newton_diagonal(outputs, criterion, p, examples)
    )(params)
    vector = active_space(found, masks).flatten(found)
    np.testing.assert_allclose(vector, expected, atol=1e-12)
    assert (expected > 0).any()


def test_gradients_of_examples_average_to_the_gradient():
    params, masks, examples = network()

    @jax.jit
    def all_gradients(params):
        first = jax.tree.map(lambda x: x[0], examples)
        return (
            second_order.example_gradients(loss_of_one, params, masks, examples),
            jax.grad(mean_loss(examples))(params),
            jax.grad(loss_of_one)(params, first),
        )

    grads, mean, first = all_gradients(params)
    mean, first = (active_space(x, masks).flatten(x) for x in (mean, first))
    np.testing.assert_allclose(np.mean(grads, axis=0), mean, atol=1e-12)
    np.testing.assert_allclose(grads[0], first, atol=1e-12)


def test_saliency_is_the_increase_of_a_separable_quadratic():
    h = jnp.array([[1.0, 4.0], [0.5, -2.0]])
    w = jnp.array([[3.0, -1.0], [2.0, 1.0]])

    def loss(params):  # its minimum (or saddle) is w
        return jnp.sum(h * (params["w"] - w) ** 2) / 2

    masks = {"w": jnp.ones((2, 2), bool)}
    diagonal = jax.jit(lambda p: second_order.hessian_diagonal(loss, p, masks))(
        {"w": w}
    )
    saliency = second_order.obd_saliency(diagonal, {"w": w})["w"]
    for i, j in np.ndindex(2, 2):
        increase = loss({"w": w.at[i, j].set(0)}) - loss({"w": w})
        assert float(saliency[i, j]) == pytest.approx(float(increase), rel=1e-12)
    assert saliency.tolist() == [[4.5, 2.0], [1.0, -1.0]]
