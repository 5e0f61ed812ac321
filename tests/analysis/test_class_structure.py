"""The class decomposition adds up to the Gauss-Newton matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import N_CLASSES, network

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import class_structure as lib
from lottery_flow.analysis import curvature, results


def brute_force(net, objective):
    """The definitions, one example and one class at a time."""
    space = curvature.active_space(net.params, net.masks)
    labels, n = net.data["label"], len(net.data["label"])
    g, p = np.zeros((n, N_CLASSES, space.n)), np.zeros((n, N_CLASSES))
    predict = jax.jit(lambda one: jax.nn.softmax(objective.logits(net.params, one)[0]))
    grad = jax.jit(lambda one: space.flatten(jax.grad(objective)(net.params, one)))
    for i in range(n):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], net.data)
        p[i] = predict(one)
        for c in range(N_CLASSES):
            other = one | {"label": np.array([c], np.int32)}
            g[i, c] = grad(other)
    parts = {k: np.zeros((space.n,) * 2) for k in ("class", "cross", "within", "same")}
    for c in range(N_CLASSES):
        mine = np.flatnonzero(labels == c)
        means, weights = {}, {}
        for d in range(N_CLASSES):
            if d == c:
                for i in mine:
                    parts["same"] += p[i, d] * np.outer(g[i, d], g[i, d]) / n
                continue
            weights[d] = p[mine, d].sum() / n
            means[d] = np.average(g[mine, d], axis=0, weights=p[mine, d])
            for i in mine:
                off = g[i, d] - means[d]
                parts["within"] += p[i, d] * np.outer(off, off) / n
        total = sum(weights.values())
        mean = sum(weights[d] * means[d] for d in means) / total
        parts["class"] += total * np.outer(mean, mean)
        for d in means:
            off = means[d] - mean
            parts["cross"] += weights[d] * np.outer(off, off)
    return parts


@pytest.mark.parametrize("norm", [False, True])
def test_it_is_what_the_definitions_say(norm):
    with jax.enable_x64(True):
        net = network(norm=norm)
        objective = net.objective()
        batches = batches_lib.split(net.data, 4)
        args = net.params, net.masks, batches
        found = lib.class_structure(objective, *args, n_classes=N_CLASSES)
        wanted = brute_force(net, objective)
        factor = found.class_factor()
        np.testing.assert_allclose(factor.T @ factor, wanted["class"], atol=1e-13)
        factor = found.cross_factor().reshape(-1, factor.shape[-1])
        np.testing.assert_allclose(factor.T @ factor, wanted["cross"], atol=1e-13)
        for part, value in found.traces().items():
            np.testing.assert_allclose(value, np.trace(wanted[part]), atol=1e-13)
        operator = curvature.gauss_newton(objective, *args)
        whole = np.asarray(operator.product(jnp.eye(operator.space.n)))
        np.testing.assert_allclose(sum(wanted.values()), whole, atol=1e-12)
        for part in ("class", "cross"):
            eigenvalues = np.linalg.eigvalsh(wanted[part])[::-1][:N_CLASSES]
            np.testing.assert_allclose(
                found.eigenvalues(part)[:N_CLASSES], eigenvalues, atol=1e-13
            )
        np.testing.assert_allclose(found.weights.sum(), 1)


def test_a_class_without_examples():
    with jax.enable_x64(True):
        net = network()
        data = net.data | {"label": np.minimum(net.data["label"], 1)}
        found = lib.class_structure(
            net.objective(), net.params, net.masks, [data], n_classes=N_CLASSES
        )
        assert np.all(np.isfinite(found.means))
        np.testing.assert_array_equal(found.means[2], 0)
        operator = curvature.gauss_newton(
            net.objective(), net.params, net.masks, [data]
        )
        whole = np.asarray(operator.product(jnp.eye(operator.space.n)))
        np.testing.assert_allclose(sum(found.traces().values()), np.trace(whole))


def test_wrong_inputs_get_a_sentence():
    with jax.enable_x64(True):
        net = network(norm=True)
    with pytest.raises(ValueError, match="give an objective with norms='frozen'"):
        lib.class_structure(
            net.objective(norms="batch"), net.params, net.masks, [], n_classes=3
        )


def test_results_are_saved_and_shown(tmp_path):
    rng = np.random.default_rng(0)
    found = lib.ClassStructure(
        rng.standard_normal((3, 3, 5)), np.full((3, 3), 1 / 9), np.full((3, 3), 2.0)
    )
    path = results.save(tmp_path / "a.npz", found)
    assert results.load(path, lib.ClassStructure).frame().equals(found.frame())
    with pytest.raises(ValueError, match="part='within' is unknown"):
        found.eigenvalues("within")
    figure = lib.plot_class_structure(found)
    assert isinstance(figure, Figure)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, list(found.traces().values()))
