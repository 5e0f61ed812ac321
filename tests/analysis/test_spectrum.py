"""The exact Hessian against jax.hessian, split or not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import dense_hessian, network

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import results, spectrum
from lottery_flow.sparsity.active import active_space


@pytest.mark.parametrize(
    ("norm", "activation", "options"),
    [
        (False, nn.tanh, {}),
        (True, nn.relu, {"norms": "batch", "weight_decay": 0.3}),
        (True, nn.relu, {"weight_decay": 0.3}),
    ],
    ids=["smooth", "batch", "decay"],
)
def test_it_equals_the_dense_hessian(norm, activation, options):
    with jax.enable_x64(True):
        net = network(norm=norm, activation=activation)
        objective = net.objective(**options)
        batches = batches_lib.split(net.data, 4)
        args = net.params, net.masks, batches
        found = spectrum.hessian_matrix(objective, *args, block=7)
        # All at once, where that has the same loss.
        whole = batches if options.get("norms") == "batch" else [net.data]
        wanted = dense_hessian(objective, net.params, net.masks, whole)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("n_products", [1, 10_000])
def test_products_are_the_same_by_the_matrix_and_without(n_products):
    with jax.enable_x64(True):
        net = network()
        objective, batches = net.objective(), batches_lib.split(net.data, 4)
        args = objective, net.params, net.masks, batches
        operator = spectrum.hessian_operator(*args, n_products=n_products)
        wanted = dense_hessian(objective, net.params, net.masks, [net.data])
        vectors = np.random.default_rng(0).standard_normal((3, len(wanted)))
        rows = jnp.asarray(vectors)
        np.testing.assert_allclose(operator.product(rows), vectors @ wanted, atol=1e-12)
        np.testing.assert_allclose(
            operator.quadratic(rows),
            np.einsum("si,ij,sj->s", vectors, wanted, vectors),
            atol=1e-12,
        )


@jax.enable_x64(True)
def test_the_matrix_is_made_only_where_it_pays(monkeypatch):
    net = network()
    n = active_space(net.params, net.masks).n
    args = net.objective(), net.params, net.masks, [net.data]
    monkeypatch.setattr(spectrum, "hessian_matrix", pytest.fail)
    spectrum.hessian_operator(*args, n_products=(n - 1) // 10)
    made = []
    monkeypatch.setattr(
        spectrum, "hessian_matrix", lambda *a, **k: made.append(1) or np.eye(n)
    )
    spectrum.hessian_operator(*args, n_products=n)
    assert made
    monkeypatch.setattr(spectrum, "_MATRIX", n - 1)
    made.clear()
    spectrum.hessian_operator(*args, n_products=n)
    assert not made


def test_blocks_within_a_layer_are_left_out_only_where_they_are_zero():
    """Of a ReLU network's residual; a smooth one has them."""
    with jax.enable_x64(True):
        for activation, own in ((nn.relu, False), (nn.tanh, True)):
            net = network(activation=activation)
            objective = net.objective()

            def rest(p, at, batch, objective=objective):
                return spectrum.with_fixed_slopes(objective, at, batch)(p)

            space = active_space(net.params, net.masks)
            groups = spectrum._groups(space)
            assert groups == [[0, 1], [2, 3], [4, 5]]  # bias and kernel of each
            reached = [
                spectrum._reached(rest, space, g, net.params, net.data) for g in groups
            ]
            wanted = [
                # The logits are linear in the last layer in any case.
                [own, own, own, True, False, True],
                [True, True, own, own, False, True],
                [True, True, True, True, False, False],
            ]
            assert reached == wanted


def test_what_depends_does_so_in_any_batch():
    """The first batch leaves the unit off, the second turns it on."""
    with jax.enable_x64(True):

        def loss(p, batch):
            z = jax.nn.relu(p["a"]["w"] @ batch["x"].T)
            return jnp.mean(p["b"]["w"] * z)

        params = {"a": {"w": jnp.ones(1)}, "b": {"w": jnp.ones(1)}}
        batches = [{"x": -np.ones((1, 1))}, {"x": np.ones((1, 1))}]
        found = spectrum.hessian_matrix(loss, params, None, batches)
        np.testing.assert_allclose(found, [[0, 0.5], [0.5, 0]])


def test_eigenvalues_by_hand():
    matrix = np.zeros((5, 5))
    matrix[:2, :2] = [[0, 2], [2, 0]]  # -2 and 2
    matrix[2, 2] = 1e-9
    matrix[4, 4] = -0.5
    found = spectrum.spectrum(matrix)
    np.testing.assert_allclose(found.eigenvalues, [-2, -0.5, 1e-9, 2], atol=1e-15)
    assert found.n_dead == 1
    assert found.counts() == {"negative": 2, "zero": 1, "positive": 1, "dead": 1}
    assert found.counts(1e-12)["positive"] == 2
    assert found.counts(0.5)["negative"] == 1
    np.testing.assert_allclose(found.negative_mass(), 2.5 / 4.5)
    frame = found.frame()
    assert frame["dead"].tolist() == [False] * 4 + [True]
    assert len(frame) == 5


def test_dead_units_are_counted_apart():
    with jax.enable_x64(True):
        net = network(activation=nn.relu)
        params = net.params
        bias = jnp.full_like(params["hidden"]["bias"], -1e3)  # no unit is ever on
        params = params | {"hidden": params["hidden"] | {"bias": bias}}
        args = params, net.masks, [net.data]
        found = spectrum.exact_spectrum(net.objective(), *args)
        # Only the biases of the logits are left.
        assert found.n_dead == 75 - 3
        assert found.counts()["dead"] == 72
        assert found.counts()["positive"] == 2  # of a softmax over three


def test_before_and_after_a_rewire():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((12, 6))
        masks = {"w": jnp.arange(6) < 3}
        other = {"w": jnp.arange(6) >= 2}
        params = jnp.linspace(-1, 1, 6)

        def loss(p, x):
            return jnp.mean(jnp.log(jnp.cosh(x @ p["w"])))

        def network_of(masks):
            return {"w": jnp.where(masks["w"], params, 0)}, masks

        seen = []
        pair = spectrum.rewire_spectra(
            loss,
            network_of(masks),
            network_of(other),
            batches_lib.split(x, 6),
            progress=lambda *at: seen.append(at),
        )
        assert seen == [(1, 2), (2, 2)] * 2
        for found, of in zip(pair, (masks, other), strict=True):
            wanted = dense_hessian(loss, *network_of(of), [x])
            np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(wanted))


def test_what_is_too_large_or_not_finite_gets_a_sentence():
    params = {"w": jnp.ones(30)}
    with pytest.raises(ValueError, match="30 active parameters make a matrix"):
        spectrum.hessian_matrix(lambda p, b: 0.0, params, None, [np.ones(1)], max_n=29)
    with pytest.raises(ValueError, match="not finite"):
        spectrum.spectrum(np.full((2, 2), np.nan))


def test_results_are_saved_and_shown(tmp_path):
    found = spectrum.spectrum(np.diag([-1.0, 0.0, 2.0, 3.0]))
    path = results.save(tmp_path / "a.npz", found)
    again = results.load(path, spectrum.Spectrum)
    assert again.counts() == found.counts()
    assert again.frame().equals(found.frame())
    figure = spectrum.plot_spectrum(found, found, labels=("before", "after"))
    assert isinstance(figure, Figure)
    heights = figure.axes[0].patches[0].get_path().vertices[:, 1]
    assert heights.max() >= 1
