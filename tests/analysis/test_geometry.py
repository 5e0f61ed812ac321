"""Distances between networks and the overlap of masks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow.analysis import geometry, results
from lottery_flow.sparsity import masks as masks_lib


@pytest.fixture(scope="module")
def networks():
    """Two networks of one model, with masks of their own."""
    with jax.enable_x64(True):
        first = network(norm=True)
    rng = np.random.default_rng(0)

    def shuffled(mask):
        return rng.permuted(np.ravel(mask)).reshape(mask.shape)

    masks = jax.tree.map(shuffled, first.masks)
    dense = jax.tree.map(lambda w: w + rng.normal(size=w.shape), numpy(first.params))
    sparse = masks_lib.tree_map(
        lambda m, w: w if m is None else np.where(m, w, 0), masks, dense
    )
    return first, first._replace(params=sparse, masks=masks)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def flat(tree):
    """All parameters, one after the other, in float64."""
    return np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    )


def cosine(a, b):
    return 1 - a @ b / np.sqrt((a @ a) * (b @ b))


def by_layer(frame):
    return frame.set_index("layer")


def one_layer(*values):
    return {"layer": {"kernel": np.array(values)}}


class TestDistances:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
    def test_equal_those_of_the_concatenated_leaves(self, networks, dtype):
        a, b = (
            jax.tree.map(lambda x: np.asarray(x, dtype), n.params) for n in networks
        )
        found = by_layer(geometry.distances(a, b))
        names = masks_lib.named_leaves(a)
        assert list(found.index) == [*names, "all"]
        pairs = {
            k: (flat(v), flat(masks_lib.named_leaves(b)[k])) for k, v in names.items()
        }
        pairs["all"] = flat(a), flat(b)
        for name, (x, y) in pairs.items():
            np.testing.assert_allclose(
                found.l2[name], np.linalg.norm(x - y), rtol=1e-13
            )
            np.testing.assert_allclose(found.cosine[name], cosine(x, y), rtol=1e-11)

    @pytest.mark.parametrize(
        ("a", "b", "l2", "cosine"),
        [
            ((3.0, 4.0), (0.0, 8.0), 5.0, 0.2),
            ((1.0, 0.0), (0.0, 2.0), 5**0.5, 1.0),
            ((1.0, 2.0), (-1.0, -2.0), 20**0.5, 2.0),
            ((1.0, 2.0), (2.0, 4.0), 5**0.5, 0.0),
        ],
    )
    def test_worked_by_hand(self, a, b, l2, cosine):
        found = by_layer(geometry.distances(one_layer(*a), one_layer(*b)))
        for name in ("layer", "all"):
            np.testing.assert_allclose(found.l2[name], l2, rtol=1e-15)
            np.testing.assert_allclose(found.cosine[name], cosine, atol=1e-15)
            assert found.cosine[name] >= 0

    @pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-10])
    def test_the_cosine_distance_is_precise_between_close_networks(self, angle):
        a = one_layer(1.0, 0.0)
        b = one_layer(math.cos(angle), math.sin(angle))
        found = geometry.distances(a, b).cosine[0]
        np.testing.assert_allclose(found, 2 * math.sin(angle / 2) ** 2, rtol=1e-6)

    def test_to_itself_is_exactly_zero(self, networks):
        found = geometry.distances(networks[0].params, networks[0].params)
        assert (found.l2 == 0).all()
        assert (found.cosine == 0).all()

    def test_a_zero_layer_has_no_angle(self):
        a = {"b": {"bias": np.zeros(2)}, "w": np.array([1.0, 0.0])}
        b = {"b": {"bias": np.ones(2)}, "w": np.array([0.0, 1.0])}
        found = by_layer(geometry.distances(a, b))
        assert np.isnan(found.cosine["b/bias"])
        assert found.l2["b/bias"] == 2**0.5
        np.testing.assert_allclose(found.cosine["all"], 1.0)
        # Also where rounding makes the squares of the other differ by a little.
        b = {"b": {"bias": np.array([0.1, 0.7])}, "w": np.array([0.0, 1.0])}
        assert np.isnan(by_layer(geometry.distances(a, b)).cosine["b/bias"])

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"differ at layer: shape \(2,\) against"):
            geometry.distances(one_layer(1.0, 2.0), one_layer(1.0))
        with pytest.raises(ValueError, match="differ at other: shape None against"):
            geometry.distances(
                {"w": np.ones(2)}, {"w": np.ones(2), "other": np.ones(1)}
            )
        with pytest.raises(ValueError, match="compare networks of one model"):
            geometry.distances(
                {"w": np.ones(2), "other": np.ones(1)}, {"w": np.ones(2)}
            )


class TestTrajectory:
    def test_has_the_distances_of_each_step(self):
        rng = np.random.default_rng(0)
        points = [
            (s, {"w": rng.normal(size=3), "v": rng.normal(size=2)}) for s in (0, 7, 9)
        ]
        solution = {"w": rng.normal(size=3), "v": rng.normal(size=2)}
        frame = geometry.trajectory(iter(points), solution)
        assert list(frame) == ["step", "reference", "layer", "l2", "cosine"]
        assert len(frame) == 3 * 2 * 3
        for step, params in points:
            for name, reference in [("start", points[0][1]), ("solution", solution)]:
                rows = frame[(frame.step == step) & (frame.reference == name)]
                wanted = geometry.distances(params, reference)
                assert rows[list(wanted)].reset_index(drop=True).equals(wanted)
        first = frame[(frame.step == 0) & (frame.reference == "start")]
        assert (first.l2 == 0).all()

    def test_needs_no_solution(self):
        frame = geometry.trajectory([(5, one_layer(1.0)), (6, one_layer(3.0))])
        assert set(frame.reference) == {"start"}
        assert list(frame[frame.layer == "all"].l2) == [0, 2]

    def test_needs_a_point(self):
        with pytest.raises(ValueError, match="points is empty"):
            geometry.trajectory([])

    def test_is_drawn_and_saved(self, tmp_path):
        points = [(s, {"w": np.array([1.0, s]), "v": np.ones(1)}) for s in range(3)]
        frame = geometry.trajectory(
            points, {"w": np.array([0.0, 4.0]), "v": np.ones(1)}
        )
        fig = geometry.plot_trajectory(frame, "w")
        assert isinstance(fig, Figure)
        start, solution = fig.axes[0].lines
        np.testing.assert_allclose(start.get_ydata(), [0, 1, 2])
        np.testing.assert_allclose(solution.get_ydata(), np.sqrt([17, 10, 5]))
        np.testing.assert_array_equal(start.get_xdata(), [0, 1, 2])
        back = results.load(results.save(tmp_path / "t.csv", frame))
        np.testing.assert_allclose(back.l2, frame.l2)
        assert list(back.layer) == list(frame.layer)


def test_distances_are_drawn():
    frame = geometry.distances(
        {"a": np.ones(2), "b": np.ones(1)}, {"a": np.zeros(2), "b": -np.ones(1)}
    )
    fig = geometry.plot_distances(frame)
    assert isinstance(fig, Figure)
    for ax, column in zip(fig.axes, ["l2", "cosine"], strict=True):
        widths = [bar.get_width() for bar in ax.patches]
        np.testing.assert_allclose(widths, frame[column])


def mask(size, active):
    """A mask of one layer with the given weights active."""
    return {"kernel": np.isin(np.arange(size), active), "bias": None}


def sets(size, n):
    return itertools.combinations(range(size), n)


class TestMaskOverlap:
    def test_counts_by_hand(self):
        a = {"one": mask(6, [0, 1, 2]), "two": mask(4, [0]), "three": mask(2, [0, 1])}
        b = {"one": mask(6, [2, 3]), "two": mask(4, [0]), "three": mask(2, [])}
        found = by_layer(geometry.mask_overlap(a, b))
        assert list(found.index) == ["one", "three", "two", "all"]
        columns = ["size", "active_a", "active_b", "intersection", "hamming"]
        assert list(found.loc["one", columns]) == [6, 3, 2, 1, 3]
        assert list(found.loc["two", columns]) == [4, 1, 1, 1, 0]
        assert list(found.loc["three", columns]) == [2, 2, 0, 0, 2]
        assert list(found.loc["all", columns]) == [12, 6, 3, 2, 5]
        np.testing.assert_allclose(found.iou, [1 / 4, 0, 1, 2 / 7])
        np.testing.assert_allclose(found.hamming_fraction, [3 / 6, 1, 0, 5 / 12])

    def test_of_networks_equals_brute_force(self, networks):
        a, b = (n.masks for n in networks)
        found = by_layer(geometry.mask_overlap(a, b))
        named = masks_lib.named_leaves(b)
        for name, x in masks_lib.named_leaves(a).items():
            if x is None:
                assert name not in found.index
                continue
            x, y = np.asarray(x), np.asarray(named[name])
            assert found.intersection[name] == np.count_nonzero(x & y)
            assert found.hamming[name] == np.count_nonzero(x != y)
            np.testing.assert_allclose(found.iou[name], np.mean(y[x | y] & x[x | y]))
        library = masks_lib.overlap(a, b)
        np.testing.assert_allclose(found.iou[list(library)], list(library.values()))

    def test_dense_leaves_are_left_out(self):
        a = {"one": mask(3, [0]), "two": mask(3, [0]), "three": {"kernel": None}}
        b = {"one": mask(3, [1]), "two": {"kernel": None}, "three": mask(3, [0])}
        assert list(geometry.mask_overlap(a, b).layer) == ["one", "all"]

    @pytest.mark.parametrize(
        ("size", "n_a", "n_b"),
        [(6, 3, 2), (5, 4, 3), (4, 0, 2), (4, 0, 0), (3, 3, 3), (1, 1, 0)],
    )
    def test_expectations_equal_those_over_all_masks(self, size, n_a, n_b):
        both, iou = [], []
        for x, y in itertools.product(sets(size, n_a), sets(size, n_b)):
            both.append(len(set(x) & set(y)))
            union = len(set(x) | set(y))
            iou.append(both[-1] / union if union else 1.0)
        found = geometry.mask_overlap(mask(size, range(n_a)), mask(size, range(n_b)))
        for _, row in found.iterrows():
            np.testing.assert_allclose(
                row.random_intersection, np.mean(both), atol=1e-15
            )
            np.testing.assert_allclose(
                row.random_intersection_std, np.std(both), atol=1e-15
            )
            np.testing.assert_allclose(
                row.random_iou, np.mean(iou), rtol=1e-12, atol=1e-15
            )
            np.testing.assert_allclose(
                row.random_hamming, n_a + n_b - 2 * np.mean(both), atol=1e-15
            )

    def test_the_whole_network_draws_each_layer_for_itself(self):
        layers = [(5, 2, 3), (4, 1, 2), (3, 2, 2)]
        draws = [
            [len(set(range(n_a)) & set(y)) for y in sets(size, n_b)]
            for size, n_a, n_b in layers
        ]
        total = np.array([sum(draw) for draw in itertools.product(*draws)])
        a = {str(i): mask(size, range(n_a)) for i, (size, n_a, _) in enumerate(layers)}
        b = {str(i): mask(size, range(n_b)) for i, (size, _, n_b) in enumerate(layers)}
        row = by_layer(geometry.mask_overlap(a, b)).loc["all"]
        np.testing.assert_allclose(row.random_intersection, np.mean(total))
        np.testing.assert_allclose(row.random_intersection_std, np.std(total))
        np.testing.assert_allclose(
            row.random_iou, np.mean(total / (12 - total)), rtol=1e-12
        )
        np.testing.assert_allclose(row.random_hamming, 12 - 2 * np.mean(total))

    def test_random_masks_agree_as_expected_and_related_ones_more(self):
        params = {
            "a": {"kernel": jnp.zeros((40, 50))},
            "b": {"kernel": jnp.zeros((30, 20))},
        }
        counts = {"a": 300, "b": 200}
        x, y = (masks_lib.random(jax.random.key(i), params, counts) for i in range(2))
        related = jax.tree.map(lambda p, q: p.at[:10].set(q[:10]), x, y)

        def deviation(a, b):
            found = geometry.mask_overlap(a, b)
            excess = found.intersection - found.random_intersection
            return excess / found.random_intersection_std

        assert (deviation(x, y).abs() < 4).all()
        assert (deviation(y, related) > 6).all()
        assert (deviation(x, jax.tree.map(jnp.logical_not, x)) < -6).all()

    def test_masks_of_other_networks_are_refused(self):
        with pytest.raises(ValueError, match="no layer is masked in both"):
            geometry.mask_overlap(mask(3, [0]), {"kernel": None, "bias": None})
        with pytest.raises(ValueError, match=r"differ at kernel: shape \(3,\) against"):
            geometry.mask_overlap(mask(3, [0]), mask(4, [0]))

    def test_is_drawn_and_saved(self, networks, tmp_path):
        frame = geometry.mask_overlap(*(n.masks for n in networks))
        fig = geometry.plot_mask_overlap(frame)
        assert isinstance(fig, Figure)
        (ax,) = fig.axes
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], frame.iou)
        np.testing.assert_allclose(ax.lines[0].get_xdata(), frame.random_iou)
        back = results.load(results.save(tmp_path / "m.csv", frame))
        np.testing.assert_allclose(back.random_iou, frame.random_iou)


class TestHypergeometric:
    @given(data=st.data(), size=st.integers(1, 400))
    def test_equals_scipy(self, data, size):
        n_a, n_b = (data.draw(st.integers(0, size)) for _ in range(2))
        low, p = geometry.hypergeometric(size, n_a, n_b)
        wanted = scipy.stats.hypergeom(size, n_a, n_b)
        i = low + np.arange(len(p))
        np.testing.assert_allclose(p, wanted.pmf(i), rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(np.sum(p), 1)
        assert wanted.cdf(low - 1) == 0
        assert wanted.sf(i[-1]) < 1e-15

    @pytest.mark.parametrize(
        ("size", "n_a", "n_b"), [(2_000_000, 400_000, 300_000), (2_000_000, 100, 150)]
    )
    def test_is_short_and_right_for_huge_layers(self, size, n_a, n_b):
        low, p = geometry.hypergeometric(size, n_a, n_b)
        assert len(p) < 20_000
        i = low + np.arange(len(p))
        mean, variance = scipy.stats.hypergeom(size, n_a, n_b).stats()
        np.testing.assert_allclose(p @ i, mean, rtol=1e-9)
        np.testing.assert_allclose(p @ (i - mean) ** 2, variance, rtol=1e-9)

    def test_a_whole_huge_network_takes_its_expectation_near_the_mean(self):
        """For many weights the distribution is narrow, and Taylor's formula holds."""
        layers = [[2_000_000, 400_000, 300_000], [500_000, 100_000, 50_000]] * 10
        n_a, n_b = 5_000_000, 3_500_000
        moments = [scipy.stats.hypergeom(*layer).stats() for layer in layers]
        mean, variance = np.sum(moments, axis=0)
        union = n_a + n_b - mean
        wanted = mean / union + variance * (n_a + n_b) / union**3
        found = geometry._random_iou(n_a, n_b, layers)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
