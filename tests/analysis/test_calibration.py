"""Scores of probabilities, against loops and known recoveries."""

import math

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lottery_flow.analysis import calibration, results


def predictions(n=300, c=4, seed=0, scale=2.0):
    """Logits, and labels drawn from their softmax: a calibrated classifier."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, c))
    p = np.cumsum(scipy.special.softmax(logits, axis=1), axis=1)
    return logits, np.sum(rng.random((n, 1)) > p, axis=1)


def with_confidences(confidences, right):
    """Logits of two classes with these confidences, and labels."""
    q = np.array(confidences)
    return np.stack([np.log(q), np.log1p(-q)], axis=1), np.where(right, 0, 1)


class TestLogSoftmax:
    @given(st.lists(st.floats(-30, 30), min_size=2, max_size=5))
    def test_equals_scipy(self, z):
        wanted = scipy.special.log_softmax(np.array(z))
        np.testing.assert_allclose(
            calibration.log_softmax(np.array(z)), wanted, rtol=1e-12, atol=1e-12
        )

    def test_takes_huge_logits_and_float32(self):
        z = np.array([[1e30, 0.0], [-1e5, -1e5 - 1]], np.float32)
        found = calibration.log_softmax(z)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found[0], [0, -1e30], rtol=1e-7)
        np.testing.assert_allclose(found[1, 1] - found[1, 0], -1)


class TestScores:
    def test_by_hand(self):
        logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))
        labels = np.array([0, 1])
        assert calibration.accuracy(logits, labels) == 0.5
        np.testing.assert_allclose(
            calibration.nll(logits, labels), -(math.log(0.7) + math.log(0.3)) / 2
        )
        first, second = 0.09 + 0.04 + 0.01, 0.01 + 0.49 + 0.36
        np.testing.assert_allclose(
            calibration.brier(logits, labels), (first + second) / 2
        )

    def test_equal_scikit_learn(self):
        logits, labels = predictions()
        p = scipy.special.softmax(logits, axis=1)
        np.testing.assert_allclose(
            calibration.nll(logits, labels), sklearn.metrics.log_loss(labels, p)
        )
        assert calibration.accuracy(logits, labels) == np.mean(
            np.argmax(p, axis=1) == labels
        )
        two, ones = predictions(c=2)
        wanted = sklearn.metrics.brier_score_loss(
            ones, scipy.special.softmax(two, 1)[:, 1]
        )
        np.testing.assert_allclose(calibration.brier(two, ones), 2 * wanted)

    def test_extremes(self):
        certain = np.array([[1000.0, 0.0], [0.0, 1000.0]])
        assert calibration.brier(certain, np.array([0, 1])) == 0
        assert calibration.brier(certain, np.array([1, 0])) == 2
        assert calibration.nll(certain, np.array([1, 0])) == 1000
        assert calibration.accuracy(certain, np.array([1, 0])) == 0

    def test_are_collected(self, tmp_path):
        logits, labels = predictions()
        found = calibration.scores(logits, labels, n_bins=5)
        width = calibration.reliability(logits, labels, n_bins=5)
        mass = calibration.reliability(logits, labels, n_bins=5, bins="mass")
        assert found.ece == width.ece != mass.ece == found.ece_mass
        assert found.mce == width.mce
        assert found.accuracy == calibration.accuracy(logits, labels)
        assert found.nll == calibration.nll(logits, labels)
        assert found.brier == calibration.brier(logits, labels)
        back = results.load(results.save(tmp_path / "s.npz", found), calibration.Scores)
        assert back.frame().equals(found.frame())
        assert dict(found.frame().itertuples(index=False)) == found._asdict()
        fig = calibration.plot_scores(back)
        assert isinstance(fig, Figure)
        heights = [bar.get_height() for bar in fig.axes[0].patches]
        np.testing.assert_array_equal(heights, found)


def reliability_by_loops(logits, labels, n_bins):
    """Count, mean confidence and accuracy of each bin, and both errors."""
    bins = [[] for _ in range(n_bins)]
    for z, y in zip(logits, labels, strict=True):
        p = [math.exp(v) / sum(math.exp(u) for u in z) for v in z]
        for b in range(n_bins):
            if b / n_bins < max(p) <= (b + 1) / n_bins:
                bins[b].append((max(p), p.index(max(p)) == y))
    rows, ece, gaps = [], 0.0, []
    for members in bins:
        if not members:
            rows.append((0, np.nan, np.nan))
            continue
        confidence, right = np.mean(members, axis=0)
        rows.append((len(members), confidence, right))
        gaps.append(abs(confidence - right))
        ece += len(members) / len(labels) * gaps[-1]
    return np.array(rows), ece, max(gaps)


class TestReliability:
    @pytest.mark.parametrize("n_bins", [1, 7, 15])
    def test_equals_loops(self, n_bins):
        logits, labels = predictions(c=3)
        found = calibration.reliability(logits, labels, n_bins=n_bins)
        rows, ece, mce = reliability_by_loops(logits, labels, n_bins)
        np.testing.assert_array_equal(found.count, rows[:, 0])
        np.testing.assert_allclose(found.confidence, rows[:, 1], rtol=1e-12)
        np.testing.assert_allclose(found.accuracy, rows[:, 2], rtol=1e-12)
        np.testing.assert_allclose([found.ece, found.mce], [ece, mce], rtol=1e-12)
        np.testing.assert_allclose(found.lower, np.arange(n_bins) / n_bins)
        np.testing.assert_allclose(found.upper, np.arange(1, n_bins + 1) / n_bins)
        assert np.sum(found.count) == len(labels)

    def test_by_hand(self):
        """Bins of width 1/4: .6 and .7, half of them right; .8, .9, .9, all right."""
        logits, labels = with_confidences(
            [0.6, 0.7, 0.8, 0.9, 0.9], [True, False, True, True, True]
        )
        found = calibration.reliability(logits, labels, n_bins=4)
        np.testing.assert_array_equal(found.count, [0, 0, 2, 3])
        np.testing.assert_allclose(found.confidence[2:], [0.65, 2.6 / 3])
        np.testing.assert_allclose(found.accuracy[2:], [0.5, 1])
        np.testing.assert_allclose(found.ece, 2 / 5 * 0.15 + 3 / 5 * 0.4 / 3)
        np.testing.assert_allclose(found.mce, 0.15)

    def test_an_edge_belongs_to_the_bin_below(self):
        half = np.zeros((1, 2))  # confidence exactly 1/2
        certain = np.array([[1000.0, 0.0]])  # exactly 1
        found = calibration.reliability(
            np.concatenate([half, certain]), np.array([0, 0]), n_bins=4
        )
        np.testing.assert_array_equal(found.count, [0, 1, 0, 1])

    def test_bins_of_equal_mass(self):
        confidences = [0.9, 0.6, 0.8, 0.7, 0.55, 0.95, 0.65]
        right = [True, False, True, True, False, True, True]
        logits, labels = with_confidences(confidences, right)
        found = calibration.reliability(logits, labels, n_bins=3, bins="mass")
        np.testing.assert_array_equal(found.count, [3, 2, 2])
        np.testing.assert_allclose(found.lower, [0.55, 0.7, 0.9])
        np.testing.assert_allclose(found.upper, [0.65, 0.8, 0.95])
        np.testing.assert_allclose(found.confidence, [0.6, 0.75, 0.925])
        np.testing.assert_allclose(found.accuracy, [1 / 3, 1, 1])
        gaps = np.array([0.6 - 1 / 3, 0.25, 0.075])
        np.testing.assert_allclose(found.ece, [3 / 7, 2 / 7, 2 / 7] @ gaps)
        np.testing.assert_allclose(found.mce, gaps[0])

    def test_more_bins_of_equal_mass_than_examples(self):
        logits, labels = with_confidences([0.6, 0.8], [True, False])
        found = calibration.reliability(logits, labels, n_bins=3, bins="mass")
        np.testing.assert_array_equal(found.count, [1, 1, 0])
        np.testing.assert_allclose(found.ece, (0.4 + 0.8) / 2)
        assert np.isnan(found.lower[2])

    def test_does_not_depend_on_the_order(self):
        logits, labels = predictions()
        order = np.random.default_rng(0).permutation(len(labels))
        first = calibration.reliability(logits, labels)
        second = calibration.reliability(logits[order], labels[order])
        np.testing.assert_allclose(first.ece, second.ece, rtol=1e-12)

    @pytest.mark.parametrize("bins", ["width", "mass"])
    def test_small_for_calibrated_logits_and_large_for_others(self, bins):
        logits, labels = predictions(20_000)
        good = calibration.reliability(logits, labels, bins=bins).ece
        sharp = calibration.reliability(3 * logits, labels, bins=bins).ece
        flat = calibration.reliability(logits / 3, labels, bins=bins).ece
        assert good < 0.015
        assert min(sharp, flat) > 0.1

    @pytest.mark.parametrize("bins", ["width", "mass"])
    def test_is_drawn_and_saved(self, bins, tmp_path):
        logits, labels = predictions()
        result = calibration.reliability(logits, labels, bins=bins)
        back = results.load(
            results.save(tmp_path / "r.npz", result), calibration.Reliability
        )
        assert back.frame().equals(result.frame())
        assert list(result.frame()) == [
            "lower", "upper", "count", "confidence", "accuracy"
        ]  # fmt: skip
        assert back.ece == result.ece
        fig = calibration.plot_reliability(back)
        assert isinstance(fig, Figure)
        some = result.count > 0
        line = fig.axes[0].lines[1]
        np.testing.assert_array_equal(line.get_xdata(), result.confidence[some])
        np.testing.assert_array_equal(line.get_ydata(), result.accuracy[some])
        heights = [bar.get_height() for bar in fig.axes[1].patches]
        np.testing.assert_array_equal(heights, result.count[some])


class TestTemperature:
    @pytest.mark.parametrize("factor", [3.0, 1.0, 0.4])
    def test_is_recovered(self, factor):
        """Labels come from the softmax of the logits before they were scaled."""
        logits, labels = predictions(20_000)
        found = calibration.fit_temperature(factor * logits, labels)
        np.testing.assert_allclose(found.temperature, factor, rtol=0.05)
        assert found.ece_after < 0.015
        np.testing.assert_allclose(
            [found.nll_before, found.nll_after],
            [
                calibration.nll(factor * logits, labels),
                calibration.nll(factor * logits / found.temperature, labels),
            ],
        )
        before = calibration.reliability(factor * logits, labels)
        np.testing.assert_allclose(found.ece_before, before.ece)
        assert (found.ece_before > 0.1) == (factor != 1)

    def test_is_the_minimum(self):
        logits, labels = predictions(50)
        found = calibration.fit_temperature(logits, labels)
        for t in found.temperature * np.array([0.5, 0.999, 1.001, 2]):
            assert calibration.nll(logits / t, labels) > found.nll_after

    @given(st.integers(0, 10_000), st.floats(0.1, 10))
    def test_never_worse_and_scales(self, seed, factor):
        logits, labels = predictions(40, seed=seed)
        found = calibration.fit_temperature(logits, labels)
        assert found.nll_after <= found.nll_before + 1e-12
        if 0.11 < found.temperature < 9:
            scaled = calibration.fit_temperature(factor * logits, labels)
            np.testing.assert_allclose(
                scaled.temperature, factor * found.temperature, rtol=1e-6
            )

    def test_by_hand(self):
        """Two classes, three of four right with margin 1: 1 / T = log 3."""
        logits = np.array([[1.0, 0.0]] * 4)
        found = calibration.fit_temperature(logits, np.array([0, 0, 0, 1]))
        np.testing.assert_allclose(found.temperature, 1 / math.log(3), rtol=1e-9)
        entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        np.testing.assert_allclose(found.nll_after, entropy)
        np.testing.assert_allclose(found.ece_after, 0, atol=1e-9)

    def test_ends_of_the_range(self):
        logits, _ = predictions()
        always = calibration.fit_temperature(logits, np.argmax(logits, axis=1))
        never = calibration.fit_temperature(logits, np.argmin(logits, axis=1))
        assert always.temperature == 0.01
        assert never.temperature == 100

    def test_is_drawn_and_saved(self, tmp_path):
        result = calibration.fit_temperature(*predictions())
        path = results.save(tmp_path / "t.npz", result)
        back = results.load(path, calibration.Temperature)
        assert back.frame().equals(result.frame())
        assert list(result.frame().temperature) == [1, result.temperature]
        fig = calibration.plot_temperature(back)
        assert isinstance(fig, Figure)
        for ax, name in zip(fig.axes, ["nll", "ece"], strict=True):
            heights = [bar.get_height() for bar in ax.patches]
            np.testing.assert_array_equal(heights, result.frame()[name])


class TestErrors:
    @pytest.mark.parametrize(
        ("n_labels", "label", "logit", "message"),
        [
            (3, 0, 1.0, "logits are of 2 examples, labels of 3"),
            (2, 4, 1.0, "labels go from 4 to 4; logits have 3 classes"),
            (2, -1, 1.0, "labels go from -1 to -1"),
            (2, 0, np.nan, "logits are not finite"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, n_labels, label, logit, message):
        logits, labels = np.full((2, 3), logit), np.full(n_labels, label)
        for fn in (
            calibration.accuracy,
            calibration.nll,
            calibration.brier,
            calibration.reliability,
            calibration.fit_temperature,
            calibration.scores,
        ):
            with pytest.raises(ValueError, match=message):
                fn(logits, labels)

    def test_no_examples(self):
        with pytest.raises(ValueError, match="at least one"):
            calibration.nll(np.zeros((0, 3)), np.zeros(0, int))

    def test_unknown_bins(self):
        logits, labels = predictions()
        with pytest.raises(ValueError, match="bins='equal' is unknown; write 'width'"):
            calibration.reliability(logits, labels, bins="equal")
        with pytest.raises(ValueError, match="n_bins=0 must be at least 1"):
            calibration.reliability(logits, labels, n_bins=0)
