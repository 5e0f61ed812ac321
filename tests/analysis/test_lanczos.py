"""Lanczos against the eigendecomposition of known matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import dense_hessian, network

from lottery_flow.analysis import curvature, lanczos, results
from lottery_flow.sparsity.active import active_space


def operator_of(matrix, kind=np.float64):
    matrix = np.asarray(matrix, kind)
    space = active_space({"w": jnp.zeros(len(matrix), kind)})
    product = jax.jit(lambda v: v @ jnp.asarray(matrix))
    return curvature.Operator(space, product)


def symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    return q @ np.diag(eigenvalues) @ q.T


def test_the_basis_is_orthonormal_and_makes_the_matrix_tridiagonal():
    with jax.enable_x64(True):
        matrix = symmetric(np.r_[100.0, np.linspace(-1, 1, 39)])
        starts = jax.random.normal(jax.random.key(0), (3, 40), jnp.float64)
        state = lanczos.lanczos(operator_of(matrix), starts, 30, jax.random.key(1))
        for i in range(3):
            q = np.asarray(state.basis[i, :30])
            np.testing.assert_allclose(q @ q.T, np.eye(30), atol=1e-13)
            np.testing.assert_allclose(q[0], starts[i] / jnp.linalg.norm(starts[i]))
            inner = state.beside[:-1, i]
            wanted = (
                np.diag(state.diagonal[:, i]) + np.diag(inner, 1) + np.diag(inner, -1)
            )
            np.testing.assert_allclose(q @ matrix @ q.T, wanted, atol=1e-11)


def test_no_copies_of_a_converged_eigenvalue_in_float32():
    eigenvalues = np.r_[1000.0, np.linspace(-1, 1, 199)]
    operator = operator_of(symmetric(eigenvalues), np.float32)
    starts = jax.random.normal(jax.random.key(0), (1, 200), jnp.float32)
    state = lanczos.lanczos(operator, starts, 80, jax.random.key(1))
    q = np.asarray(state.basis[0, :80], np.float64)
    assert np.abs(q @ q.T - np.eye(80)).max() < 1e-5
    values, _ = state.decompose(0)
    assert np.sum(values > 500) == 1


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_top_eigenpairs(which):
    with jax.enable_x64(True):
        eigenvalues = np.r_[9.0, 5.0, -7.0, -3.0, np.linspace(-1, 1, 60)]
        matrix = symmetric(eigenvalues)
        found = lanczos.top_eigenpairs(
            operator_of(matrix), 3, jax.random.key(0), which=which, tolerance=1e-8
        )
        wanted = {
            "largest": [9.0, 5.0, 1.0],
            "smallest": [-7.0, -3.0, -1.0],
            "magnitude": [9.0, -7.0, 5.0],
        }[which]
        np.testing.assert_allclose(found.values, wanted, atol=1e-9)
        vectors = found.vectors
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-12)
        error = matrix @ vectors.T - vectors.T * found.values
        np.testing.assert_allclose(
            np.linalg.norm(error, axis=0), found.residuals, atol=1e-9
        )
        assert found.n_products < 64


def test_it_stops_when_it_is_good_enough_and_not_before():
    with jax.enable_x64(True):
        operator = operator_of(symmetric(np.r_[9.0, np.linspace(-1, 1, 60)]))
        key = jax.random.key(0)
        loose = lanczos.top_eigenpairs(operator, 1, key, tolerance=1e-2)
        tight = lanczos.top_eigenpairs(operator, 1, key, tolerance=1e-10)
        assert loose.n_products < tight.n_products < 61
        assert tight.residuals[0] <= 9e-10 < loose.residuals[0] <= 9e-2
        cut = lanczos.top_eigenpairs(operator, 1, key, tolerance=1e-12, max_steps=3)
        assert cut.n_products == 3
        assert cut.residuals[0] > 1e-3


def test_a_long_chain_grows_its_basis():
    with jax.enable_x64(True):
        matrix = symmetric(np.linspace(0, 1, 80) ** 2)
        found = lanczos.top_eigenpairs(
            operator_of(matrix), 4, jax.random.key(0), tolerance=1e-12
        )
        assert found.n_products > 32
        wanted = np.linspace(0, 1, 80)[:-5:-1] ** 2
        np.testing.assert_allclose(found.values, wanted, atol=1e-10)


def test_more_eigenpairs_than_dimensions():
    with jax.enable_x64(True):
        matrix = symmetric([3.0, 2.0, 1.0])
        found = lanczos.top_eigenpairs(operator_of(matrix), 5, jax.random.key(0))
        np.testing.assert_allclose(found.values, [3.0, 2.0, 1.0])


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_quadrature_is_exact_for_the_first_moments(scale):
    """sum of w f(theta) = v^T f(A) v for polynomials below degree 2 k."""
    with jax.enable_x64(True):
        matrix = scale * symmetric(np.linspace(-2, 3, 50))
        found = lanczos.spectral_density(
            operator_of(matrix), jax.random.key(0), n_steps=6, n_probes=4
        )
        starts = np.asarray(jax.random.normal(jax.random.key(0), (4, 50), jnp.float64))
        unit = starts / np.linalg.norm(starts, axis=1, keepdims=True)
        for m in range(12):
            power = np.linalg.matrix_power(matrix / scale, m)
            wanted = np.einsum("si,ij,sj->s", unit, power, unit)
            moments = np.sum(found.weights * (found.nodes / scale) ** m, axis=1)
            np.testing.assert_allclose(moments, wanted, rtol=1e-8, atol=1e-9)
        power = np.linalg.matrix_power(matrix / scale, 12)
        wanted = np.einsum("si,ij,sj->s", unit, power, unit)
        off = np.sum(found.weights * (found.nodes / scale) ** 12, axis=1) - wanted
        assert np.abs(off).max() > 1e-3


def test_density_of_a_sparse_network_is_that_of_its_exact_spectrum():
    with jax.enable_x64(True):
        net = network()
        loss = net.objective()
        args = net.params, net.masks, [net.data]
        operator = curvature.hessian(loss, *args)
        exact = np.linalg.eigvalsh(dense_hessian(loss, *args))
        found = lanczos.spectral_density(
            operator, jax.random.key(0), n_steps=60, n_probes=100
        )
        assert found.n == len(exact) == 75
        for fn in (lambda x: x, np.square, np.tanh, lambda x: np.exp(-x)):
            samples = np.sum(found.weights * fn(found.nodes), axis=1)
            error = np.std(samples, ddof=1) / 10
            assert abs(found.mean_of(fn) - np.mean(fn(exact))) < 4 * error
        share = np.mean(exact < -1e-6 * np.abs(exact).max())
        assert abs(found.negative() - share) < 0.05
        grid, density = found.on_grid(width=0.02)
        np.testing.assert_allclose(np.trapezoid(density, grid), 1, atol=0.01)
        wanted = np.mean(
            np.exp(-0.5 * ((grid[:, None] - exact) / 0.02) ** 2), axis=1
        ) / (0.02 * np.sqrt(2 * np.pi))
        distance = np.trapezoid(np.abs(density - wanted), grid)
        assert distance < 0.3  # of at most 2


def test_an_exhausted_chain_goes_on_without_harm():
    with jax.enable_x64(True):
        matrix = np.diag(np.r_[np.full(10, 2.0), np.full(10, -1.0)])  # two eigenvalues
        found = lanczos.spectral_density(
            operator_of(matrix), jax.random.key(0), n_steps=8, n_probes=3
        )
        assert np.all(np.isfinite(found.nodes))
        weight = np.where(np.abs(found.nodes - 2) < 1e-9, found.weights, 0).sum(axis=1)
        rest = np.where(np.abs(found.nodes + 1) < 1e-9, found.weights, 0).sum(axis=1)
        np.testing.assert_allclose(weight + rest, 1, atol=1e-12)
        assert np.all((weight > 0.05) & (weight < 0.95))
        pairs = lanczos.top_eigenpairs(
            operator_of(matrix), 2, jax.random.key(0), tolerance=1e-9
        )
        np.testing.assert_allclose(pairs.values[0], 2.0)


def test_zero_is_an_operator_too():
    with jax.enable_x64(True):
        found = lanczos.spectral_density(
            operator_of(np.zeros((5, 5))), jax.random.key(0), n_steps=3, n_probes=2
        )
        np.testing.assert_allclose(found.nodes, 0, atol=1e-15)


def test_stopped_and_resumed_gives_the_same_bits(tmp_path):
    matrix = symmetric(np.linspace(-2, 3, 30))
    starts = jax.random.normal(jax.random.key(0), (2, 30), jnp.float32)
    operator, key = operator_of(matrix, np.float32), jax.random.key(1)
    wanted = lanczos.lanczos(operator, starts, 20, key)
    path = tmp_path / "state.npz"

    class Stop(Exception):
        pass

    def stop(done, n):
        assert n == 20
        if done == 13:
            raise Stop

    with pytest.raises(Stop):
        lanczos.lanczos(
            operator, starts, 20, key, state_file=path, save_every=5, progress=stop
        )
    assert path.exists()
    steps = []
    found = lanczos.lanczos(
        operator,
        starts,
        20,
        key,
        state_file=path,
        progress=lambda done, n: steps.append(done),
    )
    assert steps[0] == 11  # ten were there
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not path.exists()


def test_a_state_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    starts = jax.random.normal(jax.random.key(0), (2, 30), jnp.float32)
    key = jax.random.key(1)

    def stop(done, n):
        raise KeyboardInterrupt

    def begin(matrix, starts, **options):
        operator = operator_of(matrix, np.float32)
        return lanczos.lanczos(operator, starts, 20, key, state_file=path, **options)

    one, other = symmetric(np.linspace(-2, 3, 30)), symmetric(np.linspace(0, 3, 30))
    with pytest.raises(KeyboardInterrupt):
        begin(one, starts, save_every=1, progress=stop)
    with pytest.raises(ValueError, match="another network, loss or data; move it away"):
        begin(other, starts)
    with pytest.raises(ValueError, match="another start vector"):
        begin(one, starts + 1)
    with pytest.raises(ValueError, match="another network, loss or data"):
        begin(one, starts, tag="with penalty")
    kept = path.read_bytes()
    path.write_bytes(kept[:100])
    with pytest.raises(ValueError, match="is damaged; move it away"):
        begin(one, starts)
    path.write_bytes(kept)
    assert path.exists()
    begin(one, starts)


def test_wrong_inputs_get_a_sentence():
    operator = operator_of(np.eye(3), np.float32)
    with pytest.raises(ValueError, match="which='top' is unknown"):
        lanczos.top_eigenpairs(operator, 1, jax.random.key(0), which="top")
    with pytest.raises(ValueError, match="max_steps=1 must be at least k=2"):
        lanczos.top_eigenpairs(operator, 2, jax.random.key(0), max_steps=1)
    nothing = operator_of(np.full((3, 3), np.nan), np.float32)
    with pytest.raises(ValueError, match="is not finite"):
        lanczos.top_eigenpairs(nothing, 1, jax.random.key(0))
    with pytest.raises(ValueError, match="k=0"):
        lanczos.top_eigenpairs(operator, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="n_probes=0"):
        lanczos.spectral_density(operator, jax.random.key(0), n_probes=0)
    with pytest.raises(ValueError, match="n_steps=0"):
        lanczos.spectral_density(operator, jax.random.key(0), n_steps=0)


def test_results_are_saved_and_shown(tmp_path):
    operator = operator_of(symmetric(np.linspace(-2, 3, 30)), np.float32)
    pairs = lanczos.top_eigenpairs(operator, 2, jax.random.key(0))
    density = lanczos.spectral_density(operator, jax.random.key(0), n_steps=5)
    for result in (pairs, density):
        again = results.load(results.save(tmp_path / "a.npz", result), type(result))
        assert again.frame().equals(result.frame())
    assert isinstance(lanczos.plot_top_eigenpairs(pairs), Figure)
    line = lanczos.plot_spectral_density(density).axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), density.on_grid()[0])
