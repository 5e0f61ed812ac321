"""Trace and diagonal by probes: exact where they can be, unbiased elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import dense_hessian, network

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import curvature, hutchinson, results
from lottery_flow.sparsity.active import active_space


def diagonal_operator(values):
    """An operator with these eigenvalues and the unit vectors."""
    space = active_space({"w": jnp.zeros(len(values), jnp.float32)})
    scale = jnp.asarray(values, jnp.float32)[None]
    return curvature.Operator(space, lambda v: v * scale)


def test_trace_and_diagonal_of_a_diagonal_operator_are_exact():
    values = np.array([3.0, -1.0, 0.5, 7.0])
    operator = diagonal_operator(values)
    trace = hutchinson.trace(operator, jax.random.key(0), n_probes=3, block=2)
    assert trace.mean == 9.5
    assert trace.standard_error == 0.0
    assert len(trace.samples) == 3
    found = hutchinson.diagonal(operator, jax.random.key(1), n_probes=3, block=2)
    np.testing.assert_array_equal(found.mean, values)
    np.testing.assert_array_equal(found.standard_error, 0)
    assert set(found.layer) == {"w"}


def test_trace_and_diagonal_are_unbiased_and_know_their_error():
    with jax.enable_x64(True):
        net = network(norm=True)
        loss = net.objective()
        operator = curvature.hessian(loss, net.params, net.masks, [net.data])
        matrix = dense_hessian(loss, net.params, net.masks, [net.data])
        seen = []
        trace = hutchinson.trace(
            operator,
            jax.random.key(0),
            n_probes=400,
            block=50,
            progress=lambda *at: seen.append(at),
        )
        assert seen == [(50 * i, 400) for i in range(1, 9)]
        # Variance of a Rademacher sample: 2 x the sum of squares off the diagonal.
        off = matrix - np.diag(np.diag(matrix))
        error = np.sqrt(2 * np.sum(off**2) / 400)
        assert abs(trace.mean - np.trace(matrix)) < 4 * error
        assert 0.7 * error < trace.standard_error < 1.4 * error
        found = hutchinson.diagonal(operator, jax.random.key(1), n_probes=400, block=50)
        errors = np.sqrt(np.sum(off**2, axis=1) / 400)
        deviations = (found.mean - np.diag(matrix)) / errors
        assert np.abs(deviations).max() < 5
        assert 0.6 < np.std(deviations) < 1.5
        np.testing.assert_allclose(found.standard_error, errors, rtol=0.6)


def test_probes_differ_from_block_to_block():
    off = np.ones((6, 6)) - np.eye(6)
    space = active_space({"w": jnp.zeros(6, jnp.float32)})
    operator = curvature.Operator(space, lambda v: v @ jnp.asarray(off, jnp.float32))
    samples = hutchinson.trace(
        operator, jax.random.key(0), n_probes=60, block=6
    ).samples
    blocks = samples.reshape(10, 6)
    assert len(np.unique(blocks, axis=0)) == 10


def test_the_quadratic_form_is_that_of_the_product():
    with jax.enable_x64(True):
        net = network(norm=True)
        objective = net.objective(norms="batch", weight_decay=0.3)
        batches = batches_lib.split(net.data, 4)  # 4 + 4 + 3
        # Batches of one size compile once; all operators go over them in one way.
        even = batches_lib.split(jax.tree.map(lambda x: x[:8], net.data), 4)
        at = net.params, net.masks
        operators = {
            "hessian": curvature.hessian(objective, *at, batches),
            "gauss_newton": curvature.gauss_newton(objective, *at, even),
            "residual": curvature.residual(objective, *at, even),
        }
        for name, operator in operators.items():
            n = operator.space.n
            v = jnp.asarray(np.random.default_rng(0).standard_normal((5, n)))
            wanted = np.sum(np.asarray(v) * np.asarray(operator.product(v)), axis=1)
            assert np.abs(wanted).min() > 1e-3
            found = operator.quadratic(v)
            np.testing.assert_allclose(found, wanted, rtol=1e-9, err_msg=name)
        hessian = operators["hessian"]
        by_product = hutchinson.trace(
            hessian._replace(quadratic=None), jax.random.key(0), n_probes=6, block=4
        )
        known = hutchinson.trace(hessian, jax.random.key(0), n_probes=6, block=4)
        np.testing.assert_allclose(known.samples, by_product.samples, rtol=1e-9)


def test_no_probes_get_a_sentence():
    with pytest.raises(ValueError, match="n_probes=0"):
        hutchinson.trace(diagonal_operator([1.0]), jax.random.key(0), n_probes=0)


def test_results_are_saved_and_shown(tmp_path):
    operator = diagonal_operator([3.0, -1.0, 0.5])
    trace = hutchinson.trace(operator, jax.random.key(0), n_probes=4)
    diagonal = hutchinson.diagonal(operator, jax.random.key(0), n_probes=4)
    for result in (trace, diagonal):
        path = results.save(tmp_path / "a.npz", result)
        again = results.load(path, type(result))
        assert again.frame().equals(result.frame())
        table = results.save(tmp_path / "a.csv", result)
        assert len(results.load(table)) == len(result.frame())
    with pytest.raises(ValueError, match="holds the fields mean"):
        results.load(path, hutchinson.Trace)
    assert isinstance(hutchinson.plot_trace(trace), Figure)
    lines = hutchinson.plot_diagonal(diagonal).axes[0].lines
    np.testing.assert_array_equal(lines[0].get_ydata(), [-1.0, 0.5, 3.0])
