"""Networks in a plane."""

import itertools

import jax
import numpy as np
import pytest
import scipy.spatial.distance
import sklearn.manifold
from matplotlib.figure import Figure

from lottery_flow.analysis import mds, results


def flat(tree):
    return np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    )


def cloud(n, dimensions, seed=0):
    """Distances between random points, and the points."""
    points = np.random.default_rng(seed).normal(size=(n, dimensions)) * 30
    return scipy.spatial.distance.squareform(
        scipy.spatial.distance.pdist(points)
    ), points


class TestDistanceMatrix:
    @pytest.mark.parametrize("chunk", [7, mds.CHUNK])
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_equals_that_of_the_concatenated_leaves(self, chunk, dtype, monkeypatch):
        monkeypatch.setattr(mds, "CHUNK", chunk)
        rng = np.random.default_rng(0)
        shapes = {"conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "logits": (8, 3)}

        def draw(shape):
            return rng.normal(size=shape).astype(dtype)

        def is_shape(x):
            return isinstance(x, tuple)

        trees = [jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(4)]
        wanted = scipy.spatial.distance.pdist(np.stack([flat(t) for t in trees]))
        found = mds.distance_matrix(trees)
        np.testing.assert_allclose(
            found, scipy.spatial.distance.squareform(wanted), rtol=1e-12
        )
        assert found.dtype == np.float64

    def test_is_precise_between_close_networks(self):
        w = np.full(50, 1e3)
        found = mds.distance_matrix([{"w": w}, {"w": w + 2.0**-30}])
        np.testing.assert_allclose(found[0, 1], 50**0.5 * 2.0**-30, rtol=1e-14)

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match="the networks differ at w"):
            mds.distance_matrix(
                [{"w": np.ones(2)}, {"w": np.ones(2)}, {"w": np.ones(3)}]
            )


class TestEmbed:
    def test_a_plane_is_found_again(self):
        d, _ = cloud(9, 2)
        result = mds.embed(d)
        found = scipy.spatial.distance.pdist(result.positions)
        wanted = scipy.spatial.distance.squareform(d)
        np.testing.assert_allclose(found, wanted, rtol=1e-3)
        assert result.stress_1 < 1e-4

    def test_four_equal_distances_make_a_square(self):
        """The least stress by hand: side (2 + sqrt 2) / 4, stress 3 - 2 sqrt 2."""
        result = mds.embed(1 - np.eye(4))
        np.testing.assert_allclose(result.stress, 3 - 8**0.5, rtol=1e-6)
        np.testing.assert_allclose(result.stress_1, 3 - 8**0.5, rtol=1e-6)
        found = np.sort(scipy.spatial.distance.pdist(result.positions))
        side = (2 + 2**0.5) / 4
        np.testing.assert_allclose(found, [side] * 4 + [side * 2**0.5] * 2, rtol=1e-3)

    def test_the_stress_is_that_of_the_positions_and_as_low_as_scikit_learns(self):
        d, _ = cloud(8, 6)
        result = mds.embed(d)
        raw = squares = 0.0
        for i, j in itertools.combinations(range(8), 2):
            apart = np.linalg.norm(result.positions[i] - result.positions[j])
            raw += (apart - d[i, j]) ** 2
            squares += apart**2
        np.testing.assert_allclose(result.stress, raw, rtol=1e-12)
        np.testing.assert_allclose(result.stress_1, (raw / squares) ** 0.5, rtol=1e-12)
        wanted = sklearn.manifold.smacof(
            d, n_init=30, random_state=1, max_iter=5000, eps=1e-10, n_components=2
        )[1]
        np.testing.assert_allclose(result.stress, wanted, rtol=1e-5)

    def test_starts_differ_and_more_of_them_help(self):
        d, _ = cloud(12, 8, seed=3)
        few, many = (
            np.array([mds.embed(d, n_init=n, random_state=i).stress for i in range(3)])
            for n in (1, 4)
        )
        assert np.all(many <= few)
        assert np.any(many < 0.99 * few)
        assert mds.embed(d, n_init=4, random_state=0).stress == many[0]

    @pytest.mark.parametrize("scale", [1e-6, 1e5])
    def test_scaled_distances_give_a_scaled_picture(self, scale):
        d, _ = cloud(6, 4)
        plain, scaled = mds.embed(d), mds.embed(d * scale)
        np.testing.assert_allclose(scaled.positions, plain.positions * scale, rtol=1e-6)
        np.testing.assert_allclose(scaled.stress, plain.stress * scale**2, rtol=1e-6)
        np.testing.assert_allclose(scaled.stress_1, plain.stress_1, rtol=1e-6)

    def test_is_centred_and_upright_whatever_the_start(self):
        points = cloud(7, 2)[1] * [2, 1]
        d = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(points))
        first, second = (mds.embed(d, random_state=i).positions for i in (0, 1))
        np.testing.assert_allclose(np.mean(first, axis=0), 0, atol=1e-9)
        np.testing.assert_allclose(first[:, 0] @ first[:, 1], 0, atol=1e-6)
        assert np.std(first[:, 0]) > np.std(first[:, 1])
        np.testing.assert_allclose(first, second, atol=5e-3 * np.max(d))
        for axis in first.T:
            assert axis[np.argmax(np.abs(axis))] > 0

    def test_two_points_lie_at_their_distance(self):
        result = mds.embed(np.array([[0.0, 3.0], [3.0, 0.0]]), ["a", "b"])
        np.testing.assert_allclose(result.positions, [[1.5, 0], [-1.5, 0]], atol=1e-9)

    @pytest.mark.parametrize(
        ("d", "message"),
        [
            (np.ones((2, 3)), "square matrix"),
            (np.zeros((1, 1)), "two points or more"),
            (np.array([[0, np.nan], [np.nan, 0]]), "finite"),
            (np.array([[0.0, -1.0], [-1.0, 0.0]]), "nowhere negative"),
            (np.array([[0.0, 1.0], [2.0, 0.0]]), "symmetric"),
            (np.array([[1.0, 1.0], [1.0, 0.0]]), "zeros on its diagonal"),
            (np.zeros((3, 3)), "networks that differ"),
        ],
    )
    def test_what_is_no_matrix_of_distances_is_refused(self, d, message):
        with pytest.raises(ValueError, match=message):
            mds.embed(d)

    def test_as_many_labels_as_points(self):
        with pytest.raises(ValueError, match="labels has 1 entries for 3 points"):
            mds.embed(1 - np.eye(3), ["a"])

    def test_is_drawn_and_saved(self, tmp_path):
        d, _ = cloud(5, 2)
        result = mds.embed(d, ["start", "end", "end", "start", "pruned"])
        fig = mds.plot_embedding(result)
        assert isinstance(fig, Figure)
        lines = {line.get_label(): line for line in fig.axes[0].lines}
        assert list(lines) == ["start", "end", "pruned"]
        np.testing.assert_array_equal(
            lines["end"].get_xydata(), result.positions[[1, 2]]
        )
        back = results.load(results.save(tmp_path / "m.npz", result), mds.Embedding)
        assert back.frame().equals(result.frame())
        assert back.stress_1 == result.stress_1
        assert isinstance(mds.plot_embedding(back), Figure)
        assert list(back.frame().label) == ["start", "end", "end", "start", "pruned"]

    def test_points_have_numbers_without_labels(self):
        assert list(mds.embed(1 - np.eye(3)).labels) == ["0", "1", "2"]
