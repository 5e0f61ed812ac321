"""Optimal Brain Surgeon against explicit inverses and constrained minima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import obs, second_order
from lottery_flow.sparsity.active import active_space


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(seed=0):
    """Two sparse kernels and a dense bias: 3 + 7 + 6 parameters; their Hessian."""
    rng = np.random.default_rng(seed)
    masks = {
        "a": {"bias": None, "kernel": _mask(rng, (3, 4), 7)},
        "b": {"kernel": _mask(rng, (4, 2), 6)},
    }
    params = {
        "a": {
            "bias": jnp.asarray(0.01 * rng.normal(size=3)),
            "kernel": jnp.asarray(rng.normal(size=(3, 4))),
        },
        "b": {"kernel": jnp.asarray(rng.normal(size=(4, 2)))},
    }
    root = rng.normal(size=(16, 16))
    return masks_lib.apply(masks, params), masks, root @ root.T / 16 + 0.1 * np.eye(16)


def _mask(rng, shape, n):
    flat = np.arange(np.prod(shape)) < n
    return rng.permutation(flat).reshape(shape)


def vector(masks, tree):
    return np.asarray(active_space(tree, masks).flatten(tree))


def one_by_one(w, hessian, removable, n_remove):
    """Each time the best weight by the explicit inverse of what is left."""
    w, left = w.copy(), np.ones(len(w), bool)
    increase = 0.0
    for _ in range(n_remove):
        at = np.flatnonzero(left)
        inverse = np.linalg.inv(hessian[np.ix_(at, at)])
        cost = np.where(removable[at], w[at] ** 2 / (2 * np.diag(inverse)), np.inf)
        q = int(np.argmin(cost))
        increase += cost[q]
        w[at] -= w[at][q] / inverse[q, q] * inverse[:, q]
        w[at[q]] = 0
        left[at[q]] = False
    return w, left, increase


def constrained_minimum(w, hessian, left):
    """argmin (x - w)^T H (x - w) with x = 0 where not left (KKT), and the value."""
    gone = np.flatnonzero(~left)
    n, k = len(w), len(gone)
    rows = np.eye(n)[gone]
    kkt = np.block([[hessian, rows.T], [rows, np.zeros((k, k))]])
    x = np.linalg.solve(kkt, np.concatenate([hessian @ w, np.zeros(k)]))[:n]
    return x, (x - w) @ hessian @ (x - w) / 2


def removable_of(masks):
    flags = masks_lib.tree_map(
        lambda m, i: np.zeros(3) if m is None else np.asarray(m)[np.asarray(m)] * 1.0,
        masks,
        masks,
    )
    return np.concatenate(jax.tree.leaves(flags)) > 0


def left_of(masks, old, params):
    """Which of the old active parameters are still active."""
    flags = masks_lib.tree_map(
        lambda m, p: jnp.ones(p.shape) if m is None else m.astype(float), masks, params
    )
    return vector(old, flags) > 0


@pytest.mark.parametrize("n_remove", [0, 1, 5, 13])
def test_equals_explicit_removal_and_the_constrained_minimum(n_remove):
    params, masks, hessian = network()
    w, removable = vector(masks, params), removable_of(masks)
    inverse = jnp.asarray(np.linalg.inv(hessian))
    new, new_masks, increase = obs.obs_prune(params, masks, inverse, n_remove)
    expected, left, cost = one_by_one(w, hessian, removable, n_remove)
    np.testing.assert_array_equal(left_of(new_masks, masks, params), left)
    found = vector(masks, new)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert float(increase) == pytest.approx(cost, rel=1e-9)
    # The loss (x - w)^T H (x - w) / 2 grew by just that, and is at its least.
    assert (found - w) @ hessian @ (found - w) / 2 == pytest.approx(cost, rel=1e-9)
    best, value = constrained_minimum(w, hessian, left)
    np.testing.assert_allclose(found, best, atol=1e-10)
    assert value == pytest.approx(cost, rel=1e-9)


def test_inactive_weights_are_exactly_zero_and_dense_leaves_are_corrected():
    params, masks, hessian = network()
    inverse = jnp.asarray(np.linalg.inv(hessian))
    new, new_masks, _ = obs.obs_prune(params, masks, inverse, 6)
    assert sum(int(n) for n in masks_lib.count(new_masks).values()) == 7
    for k in ("a", "b"):
        mask = np.asarray(new_masks[k]["kernel"])
        assert not (mask & ~np.asarray(masks[k]["kernel"])).any()
        assert not np.asarray(new[k]["kernel"])[~mask].view(np.uint64).any()
        assert np.asarray(new[k]["kernel"])[mask].all()
    assert new_masks["a"]["bias"] is None
    assert (np.asarray(new["a"]["bias"]) != np.asarray(params["a"]["bias"])).all()


def test_two_weights_by_hand():
    # H = [[2, 1], [1, 2]], H^-1 = [[2, -1], [-1, 2]] / 3, w = (1, 3):
    # L = (1 / (4/3), 9 / (4/3)), dw = -(1 / (2/3)) (2, -1) / 3 = (-1, 1/2).
    params, masks = {"w": jnp.array([[1.0, 3.0]])}, {"w": jnp.ones((1, 2), bool)}
    inverse = jnp.array([[2.0, -1.0], [-1.0, 2.0]]) / 3
    new, new_masks, increase = obs.obs_prune(params, masks, inverse, 1)
    np.testing.assert_allclose(new["w"], [[0, 3.5]], rtol=1e-12)
    assert new_masks["w"].tolist() == [[False, True]]
    assert float(increase) == pytest.approx(0.75)


def test_what_is_not_positive_goes_last_and_corrects_nothing():
    params = {"w": jnp.array([[0.1, 1.0, 2.0]]), "b": jnp.ones(1)}
    masks = {"w": np.ones((1, 3), bool), "b": None}
    inverse = jnp.diag(jnp.array([1.0, -1.0, 1.0, 1.0])).at[0, 1].set(0.5)
    inverse = inverse.at[1, 0].set(0.5)  # in the order of the tree: b, w
    two = obs.obs_prune(params, masks, inverse, 2)
    assert two.masks["w"].tolist() == [[True, False, False]]
    three = obs.obs_prune(params, masks, inverse, 3)
    assert not three.params["w"].any()
    assert three.params["b"].tolist() == [1.0]


def test_the_recursion_equals_the_explicit_inverse():
    grads = np.random.default_rng(1).normal(size=(9, 6))
    found = obs.inverse_fisher(jnp.asarray(grads), 1e-3)
    expected = np.linalg.inv(1e-3 * np.eye(6) + grads.T @ grads / 9)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    fewer = obs.inverse_fisher(jnp.asarray(grads[:3]), 1e-3)  # of rank 3
    expected = np.linalg.inv(1e-3 * np.eye(6) + grads[:3].T @ grads[:3] / 3)
    np.testing.assert_allclose(fewer, expected, rtol=1e-7)


def test_blocks_of_leaves():
    params, masks, _ = network()
    layers = obs.blocks(masks, params)
    bias, a = [0, 1, 2] + [16] * 4, [3, 4, 5, 6, 7, 8, 9]
    assert layers.tolist() == [bias, a, [10, 11, 12, 13, 14, 15, 16]]
    four = obs.blocks(masks, params, 4)
    assert four.tolist() == [
        [0, 1, 2, 16],
        [3, 4, 5, 6],
        [7, 8, 9, 16],
        [10, 11, 12, 13],
        [14, 15, 16, 16],
    ]


def test_inverses_of_blocks_are_those_of_their_own_gradients():
    params, masks, _ = network()
    grads = np.random.default_rng(2).normal(size=(20, 16))
    layout = obs.blocks(masks, params, 4)
    found = obs.inverse_fisher_blocks(jnp.asarray(grads), layout, 1e-2)
    for row, inverse in zip(layout, found, strict=True):
        at = row[row < 16]
        g = grads[:, at]
        expected = np.linalg.inv(1e-2 * np.eye(len(at)) + g.T @ g / 20)
        np.testing.assert_allclose(inverse[: len(at), : len(at)], expected, rtol=1e-8)


@pytest.mark.parametrize("n_remove", [1, 4, 9, 13])
@pytest.mark.parametrize("size", [None, 4, 1])
def test_blocks_equal_explicit_removal_with_a_block_diagonal_hessian(size, n_remove):
    params, masks, hessian = network(3)
    layout = obs.blocks(masks, params, size)
    same = np.zeros((16, 16), bool)
    inverses = []
    for row in layout:
        at = row[row < 16]
        same[np.ix_(at, at)] = True
        inverse = np.eye(len(row))
        inverse[: len(at), : len(at)] = np.linalg.inv(hessian[np.ix_(at, at)])
        inverses.append(inverse)
    new, new_masks, increase = obs.obs_prune(
        params, masks, jnp.asarray(np.stack(inverses)), n_remove, layout
    )
    w, left, cost = one_by_one(
        vector(masks, params),
        np.where(same, hessian, 0),
        removable_of(masks),
        n_remove,
    )
    np.testing.assert_array_equal(left_of(new_masks, masks, params), left)
    np.testing.assert_allclose(vector(masks, new), w, atol=1e-10)
    assert float(increase) == pytest.approx(cost, rel=1e-9)


@pytest.mark.parametrize(
    ("n_remove", "left_a"), [(2, [True, True]), (3, [True, False]), (4, [False, False])]
)
def test_a_cheap_weight_waits_for_the_dear_one_before_it(n_remove, left_a):
    # H = [[1, .9], [.9, 1]]: without the second weight (cost .086) the first would
    # fall to .145 and cost .011; those of the other block cost .05 and .06.
    params = {
        "a": jnp.array([[1.0, -0.95]]),
        "b": jnp.sqrt(jnp.array([[0.12, 0.1]])),
    }
    masks = {"a": np.ones((1, 2), bool), "b": np.ones((1, 2), bool)}
    first = jnp.linalg.inv(jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    inverse = jnp.stack([first, jnp.eye(2)])
    new = obs.obs_prune(params, masks, inverse, n_remove, obs.blocks(masks, params))
    assert new.masks["a"].tolist() == [left_a]
    assert not new.masks["b"].any()
    costs = [0.05, 0.06, 0.95**2 * 0.19 / 2, 0.145**2 / 2]
    assert float(new.increase) == pytest.approx(sum(costs[:n_remove]), rel=1e-9)


def test_one_block_of_everything_equals_the_whole_inverse():
    params, masks, _ = network()
    grads = jnp.asarray(np.random.default_rng(2).normal(size=(30, 16)))
    everything = np.arange(16, dtype=np.int32)[None]
    whole = obs.inverse_fisher(grads, 1e-3)
    block = obs.inverse_fisher_blocks(grads, everything, 1e-3)
    np.testing.assert_allclose(block[0], whole, rtol=1e-9)
    one = obs.obs_prune(params, masks, whole, 5)
    two = obs.obs_prune(params, masks, block, 5, everything)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), one, two)


def test_a_regression_is_pruned_by_its_own_fisher_matrix():
    """With errors of one size the Fisher matrix is the Hessian, but for a factor."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 8))
    w = rng.normal(size=(8, 1))
    errors = rng.choice([-0.5, 0.5], 60)
    masks, params = {"w": jnp.ones((8, 1), bool)}, {"w": jnp.asarray(w)}

    def loss_of_one(params, example):
        image, target = example
        return ((image @ params["w"])[0] - target) ** 2 / 2

    examples = jnp.asarray(x), jnp.asarray((x @ w)[:, 0] + errors)
    grads = jax.jit(
        lambda p: second_order.example_gradients(loss_of_one, p, masks, examples)
    )(params)
    inverse = obs.inverse_fisher(grads, 1e-9)
    new, new_masks, increase = obs.obs_prune(params, masks, inverse, 4)
    left = np.asarray(new_masks["w"])[:, 0]
    best, residual, *_ = np.linalg.lstsq(x[:, left], x @ w, rcond=None)
    np.testing.assert_allclose(np.asarray(new["w"])[left], best, rtol=1e-5)
    assert float(increase) == pytest.approx(0.25 * residual[0] / 60 / 2, rel=1e-5)


def test_errors():
    params, masks, hessian = network()
    inverse = jnp.asarray(np.linalg.inv(hessian))
    with pytest.raises(ValueError, match="n_remove=14, but 13 active weights have a"):
        obs.obs_prune(params, masks, inverse, 14)
    with pytest.raises(ValueError, match=r"inverse has shape \(1, 15, 15\), the blo"):
        obs.obs_prune(params, masks, inverse[1:, 1:], 1)
    with pytest.raises(ValueError, match="size=0: give 1 or more"):
        obs.blocks(masks, params, 0)
