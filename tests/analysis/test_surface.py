"""The loss on planes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import results, surface
from lottery_flow.sparsity import masks as masks_lib


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        return network(norm=True)


def others(params, masks, n=2):
    """Networks of the same masks, elsewhere."""
    rng = np.random.default_rng(1)

    def moved(tree):
        return jax.tree.map(lambda w: w + 0.5 * rng.standard_normal(w.shape), tree)

    return [masks_lib.apply(masks, moved(params)) for _ in range(n)]


def add(origin, *terms):
    """origin + sum of coefficient times tree."""
    for coefficient, tree in terms:
        origin = jax.tree.map(lambda w, d, c=coefficient: w + c * d, origin, tree)
    return origin


def inner(a, b):
    return sum(
        np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def vector(*values, dtype=np.float64):
    return {"w": jnp.array(values, dtype)}


def quadratic(params, batch):
    """A loss whose surface is known: the mean of (w - x)^2 over examples."""
    apart = params["w"][None] - batch
    return jnp.mean(jnp.sum(apart * apart, axis=1))


class TestBasis:
    def test_by_hand(self):
        w = [vector(1.0, 1.0, 0.0), vector(1.0, 3.0, 0.0), vector(1.0, 0.0, 5.0)]
        origin, u, v, points = surface.basis(w)
        assert origin is w[0]
        np.testing.assert_allclose(u["w"], [0, 1, 0], atol=1e-15)
        np.testing.assert_allclose(v["w"], [0, 0, 1], atol=1e-15)
        np.testing.assert_allclose(points, [[0, 0], [2, 0], [-1, 5]], atol=1e-15)

    def test_is_orthonormal_and_leads_to_the_three_networks(self, small):
        solutions = [small.params, *others(small.params, small.masks)]
        origin, u, v, points = surface.basis(solutions)
        np.testing.assert_allclose(inner(u, u), 1, rtol=1e-12)
        np.testing.assert_allclose(inner(v, v), 1, rtol=1e-12)
        np.testing.assert_allclose(inner(u, v), 0, atol=1e-12)
        for solution, (x, y) in zip(solutions, points, strict=True):
            there = add(origin, (x, u), (y, v))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
                there,
                solution,
            )

    def test_keeps_the_dtype(self):
        w = [vector(*row, dtype=np.float32) for row in np.eye(3)]
        _, u, v, _ = surface.basis(w)
        assert u["w"].dtype == v["w"].dtype == np.float32

    @pytest.mark.parametrize(
        "third", [(2.0, 4.0), (1.0, 2.0), (0.0, 0.0), (-1.0, -2.0)]
    )
    def test_refuses_networks_on_a_line(self, third):
        for order in ([0, 1, 2], [2, 0, 1]):
            w = [vector(0.0, 0.0), vector(1.0, 2.0), vector(*third)]
            with pytest.raises(ValueError, match="lie on a line"):
                surface.basis([w[i] for i in order])

    def test_refuses_float32_networks_on_a_line_up_to_rounding(self):
        a = np.random.default_rng(0).normal(size=100).astype(np.float32)
        w = [{"w": a}, {"w": a * np.float32(1.3)}, {"w": a * np.float32(0.7)}]
        with pytest.raises(ValueError, match="lie on a line"):
            surface.basis(w)

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match="the networks differ at w"):
            surface.basis([vector(1.0), vector(2.0), vector(1.0, 2.0)])


class TestThroughSolutions:
    @pytest.mark.parametrize("norms", ["frozen", "batch"])
    # Statistics of a batch are promoted to float32 at least, by flax.
    @jax.numpy_dtype_promotion("standard")
    def test_the_loss_is_that_of_the_network_there(self, small, norms):
        solutions = [small.params, *others(small.params, small.masks)]
        loss = small.objective(norms=norms, weight_decay=0.01)
        batches = batches_lib.split(small.data, 6)  # of 6 and 5 examples
        result = surface.through_solutions(
            loss, solutions, batches, n_points=4, block=3
        )
        origin, u, v, points = surface.basis(solutions)
        np.testing.assert_array_equal(result.points, points)
        at = jax.jit(
            lambda x, y: [loss(add(origin, (x, u), (y, v)), b) for b in batches]
        )
        for i, y in enumerate(result.y):
            for j, x in enumerate(result.x):
                first, second = at(x, y)
                np.testing.assert_allclose(
                    result.loss[i, j], (6 * first + 5 * second) / 11, rtol=1e-10
                )

    def test_the_solutions_have_their_own_loss(self):
        """Corners of the grid: without a margin two of them lie there."""
        w = [vector(1.0, 1.0, 0.0), vector(4.0, 1.0, 0.0), vector(2.0, 3.0, 0.0)]
        batch = jnp.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.0]])
        result = surface.through_solutions(
            quadratic, w, [batch], n_points=4, margin=0.0
        )
        np.testing.assert_allclose(result.loss[0, 0], quadratic(w[0], batch))
        np.testing.assert_allclose(result.loss[0, -1], quadratic(w[1], batch))
        np.testing.assert_allclose(result.loss[-1, 1], quadratic(w[2], batch))

    def test_the_grid_reaches_beyond_the_three_by_the_margin(self):
        w = [vector(0.0, 0.0), vector(2.0, 0.0), vector(-1.0, 4.0)]
        result = surface.through_solutions(
            quadratic, w, [jnp.zeros((1, 2))], n_points=3, margin=0.5
        )
        np.testing.assert_allclose(result.x, [-2.5, 0.5, 3.5])
        np.testing.assert_allclose(result.y, [-2, 2, 6])

    def test_wants_three(self):
        w = [vector(0.0, 0.0), vector(2.0, 0.0)]
        with pytest.raises(ValueError, match="found 2 of them and 3 labels"):
            surface.through_solutions(quadratic, w, [jnp.zeros((1, 2))])
        with pytest.raises(ValueError, match="found 3 of them and 1 labels"):
            surface.through_solutions(quadratic, [*w, w[0]], [], labels=["a"])


class TestOnGrid:
    @pytest.mark.parametrize("block", [1, 4, 6, 50])
    def test_does_not_depend_on_the_block(self, block):
        x, y = np.linspace(-1, 2, 3), np.linspace(0, 5, 2)
        u, v = vector(1.0, 0.0, 2.0), vector(0.0, 3.0, 1.0)
        batches = [jnp.ones((2, 3)), jnp.zeros((1, 3))]
        found = surface.on_grid(
            quadratic, vector(1.0, 2.0, 3.0), (u, v), x, y, batches, block=block
        )
        assert found.shape == (2, 3)
        for i, j in np.ndindex(2, 3):
            w = np.array([1 + x[j], 2 + 3 * y[i], 3 + 2 * x[j] + y[i]])
            wanted = (2 * np.sum((w - 1) ** 2) + np.sum(w**2)) / 3
            np.testing.assert_allclose(found[i, j], wanted, rtol=1e-12)

    def test_compiles_once(self):
        traced = []

        def loss(params, batch):
            traced.append(1)
            return quadratic(params, batch)

        directions = vector(1.0, 0.0), vector(0.0, 1.0)
        for start in (0.0, 1.0):
            x = np.linspace(start, 1, 5)
            surface.on_grid(
                loss,
                vector(start, 0.0),
                directions,
                x,
                x,
                [jnp.ones((2, 2))] * 2,
                block=4,
            )
        assert len(traced) == 1

    def test_stays_in_float32_with_float32_parameters(self):
        seen = []

        def loss(params, batch):
            seen.append(params["w"].dtype)
            return quadratic(params, batch)

        w = vector(0.0, 1.0, dtype=np.float32)
        surface.on_grid(
            loss, w, (w, w), np.ones(2), np.ones(2), [jnp.ones((1, 2), np.float32)]
        )
        assert seen == [np.float32]

    def test_needs_a_block_and_a_batch(self):
        w, x = vector(0.0), np.ones(1)
        with pytest.raises(ValueError, match="block=0 must be at least 1"):
            surface.on_grid(quadratic, w, (w, w), x, x, [jnp.ones((1, 1))], block=0)
        with pytest.raises(ValueError, match="batches is empty"):
            surface.on_grid(quadratic, w, (w, w), x, x, [])


def filters(leaf):
    """A row for each filter of a kernel, for each entry of a vector."""
    return np.reshape(leaf, (-1, leaf.shape[-1])).T


class TestFilterNormalised:
    @pytest.mark.parametrize("move_vectors", [False, True])
    def test_filters_are_as_long_as_the_networks_and_masked(self, small, move_vectors):
        direction = surface.filter_normalised(
            jax.random.key(0), small.params, small.masks, move_vectors=move_vectors
        )
        masks, weights = (
            masks_lib.named_leaves(t) for t in (small.masks, small.params)
        )
        for name, d in masks_lib.named_leaves(direction).items():
            if d.ndim < 2 and not move_vectors:
                assert not np.any(d)
                continue
            np.testing.assert_allclose(
                np.linalg.norm(filters(d), axis=1),
                np.linalg.norm(filters(weights[name]), axis=1),
                rtol=1e-12,
            )
            if masks[name] is not None:
                np.testing.assert_array_equal(np.asarray(d) != 0, masks[name])

    def test_dead_filters_stay(self):
        params = {"kernel": jnp.array([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])}
        masks = {"kernel": jnp.array([[True, False, True], [True, False, True]])}
        direction = surface.filter_normalised(jax.random.key(0), params, masks)
        np.testing.assert_array_equal(direction["kernel"][:, 1:], 0)
        assert np.all(direction["kernel"][:, 0] != 0)

    def test_is_a_random_direction(self):
        """Uniform on the sphere of the filter: mean 0, covariance |w|^2 / n."""
        params = {"kernel": jnp.array([[3.0], [4.0], [0.0]])}
        draw = jax.jit(
            jax.vmap(lambda key: surface.filter_normalised(key, params, None)["kernel"])
        )
        d = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))[:, :, 0]
        np.testing.assert_allclose(
            np.mean(d, axis=0), 0, atol=5 * 5 / (3 * 4000) ** 0.5
        )
        np.testing.assert_allclose(np.cov(d.T), np.eye(3) * 25 / 3, atol=0.6)

    def test_keeps_the_dtype_and_knows_leaves_apart(self):
        params = {"a": jnp.ones((2, 2), np.float32), "b": jnp.ones((2, 2), np.float32)}
        d = surface.filter_normalised(jax.random.key(0), params, None)
        assert d["a"].dtype == np.float32
        assert np.all(d["a"] != d["b"])

    def test_masks_of_other_networks_are_refused(self, small):
        with pytest.raises(ValueError, match="masks do not fit the parameters"):
            surface.filter_normalised(jax.random.key(0), small.params, {"conv": None})


class TestAroundSolution:
    def test_the_loss_is_that_of_the_network_there(self, small):
        loss = small.objective()
        key = jax.random.key(3)
        result = surface.around_solution(
            key, loss, small.params, small.masks, [small.data], n_points=3, reach=0.5
        )
        np.testing.assert_allclose(result.x, [-0.5, 0, 0.5])
        np.testing.assert_array_equal(result.x, result.y)
        u, v = (
            surface.filter_normalised(
                jax.random.fold_in(key, i), small.params, small.masks
            )
            for i in range(2)
        )
        assert abs(inner(u, v)) < 0.9 * inner(u, u)
        at = jax.jit(lambda x, y: loss(add(small.params, (x, u), (y, v)), small.data))
        for i, j in np.ndindex(3, 3):
            wanted = at(result.x[j], result.y[i])
            np.testing.assert_allclose(result.loss[i, j], wanted, rtol=1e-10)
        np.testing.assert_array_equal(result.points, [[0, 0]])

    def test_vectors_move_if_told(self, small):
        args = (small.objective(), small.params, small.masks, [small.data])
        still, moved = (
            surface.around_solution(
                jax.random.key(0), *args, n_points=3, move_vectors=flag
            ).loss
            for flag in (False, True)
        )
        np.testing.assert_allclose(still[1, 1], moved[1, 1])
        assert abs(still[0, 0] - moved[0, 0]) > 1e-6

    def test_does_not_depend_on_the_scale_of_filters(self):
        small = network(activation=nn.relu)
        scaled = jax.tree.map(lambda w: w, small.params)
        scaled["conv"] = jax.tree.map(lambda w: 8 * w, scaled["conv"])
        scaled["hidden"]["kernel"] = scaled["hidden"]["kernel"] / 8
        first, second = (
            surface.around_solution(
                jax.random.key(0),
                small.objective(),
                params,
                small.masks,
                [small.data],
                n_points=3,
            ).loss
            for params in (small.params, scaled)
        )
        np.testing.assert_allclose(first, second, rtol=1e-10)
        assert np.ptp(first) > 0.1


class TestResult:
    def result(self, loss):
        points = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
        labels = np.array(["pruned", "ticket", "scratch"])
        return surface.Surface(np.arange(3.0), np.arange(2.0), loss, labels, points)

    def test_a_row_for_each_point(self):
        frame = self.result(np.arange(6.0).reshape(2, 3)).frame()
        assert list(frame.x) == [0, 1, 2, 0, 1, 2]
        assert list(frame.y) == [0, 0, 0, 1, 1, 1]
        assert list(frame.loss) == [0, 1, 2, 3, 4, 5]

    def test_is_saved(self, tmp_path):
        result = self.result(np.arange(6.0).reshape(2, 3))
        back = results.load(results.save(tmp_path / "s.npz", result), surface.Surface)
        for a, b in zip(back, result, strict=True):
            np.testing.assert_array_equal(a, b)
        assert isinstance(surface.plot_surface(back), Figure)

    @pytest.mark.parametrize(
        "loss", [[[1.0, 2, 3], [4, 5, 600]], [[-1.0, 0, 1], [2, 3, np.inf]]]
    )
    def test_is_drawn(self, loss, tmp_path):
        result = self.result(np.array(loss))
        fig = surface.plot_surface(result)
        (mesh,) = fig.axes[0].collections
        shown = np.ma.filled(mesh.get_array(), np.inf)
        np.testing.assert_array_equal(shown.reshape(2, 3), result.loss)
        np.testing.assert_array_equal(fig.axes[0].lines[0].get_xydata(), result.points)
        texts = [t.get_text() for t in fig.axes[0].texts]
        assert texts == ["pruned", "ticket", "scratch"]
        results.save(tmp_path / "s.png", fig)
