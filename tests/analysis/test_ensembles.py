"""Networks together, against loops, and relations that their table must satisfy."""

import math

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import calibration, ensembles, results


def models(m=4, n=60, c=3, seed=0, right=1.0):
    """Logits of models that know the labels a little, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    return rng.normal(size=(m, n, c)) + right * np.eye(c)[labels], labels


def chosen(choices, c=3):
    """Logits of models that choose these classes."""
    return 5.0 * np.eye(c)[np.array(choices)]


class TestLogitsOf:
    def test_are_those_of_the_network_in_the_order_of_the_batches(self):
        with jax.enable_x64(True):
            small = network(norm=True)
            objective = small.objective()
            batches = batches_lib.split(small.data, 4)
            found = ensembles.logits_of(objective, small.params, batches)
            wanted = objective.logits(small.params, small.data)
        assert isinstance(found, np.ndarray)
        assert found.shape == (11, 3)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)

    def test_compile_once(self):
        traced = []

        def logits(params, batch):
            traced.append(1)
            return batch * params["w"]

        objective = ensembles.Objective(logits, lambda z, b: z[:, 0])
        for scale in (1.0, 2.0):
            found = ensembles.logits_of(
                objective,
                {"w": np.full(3, scale, np.float32)[None]},
                [np.ones((2, 3), np.float32)] * 2,
            )
            np.testing.assert_array_equal(found, np.full((4, 3), scale))
        assert len(traced) == 1

    def test_need_a_batch(self):
        objective = ensembles.Objective(lambda p, b: b, lambda z, b: z[:, 0])
        with pytest.raises(ValueError, match="batches is empty"):
            ensembles.logits_of(objective, {}, [])


class TestCompare:
    def test_disagreement_by_hand(self):
        logits = chosen([[0, 1, 2, 0], [0, 1, 2, 1], [1, 0, 0, 0]])
        found = ensembles.compare(logits, np.array([0, 1, 2, 0]))
        np.testing.assert_allclose(
            found.disagreement, [[0, 0.25, 0.75], [0.25, 0, 1], [0.75, 1, 0]]
        )
        # errors 0, 1/4 and 3/4 of the models, in rows
        np.testing.assert_allclose(found.normalised[1], [1, 0, 4])
        np.testing.assert_allclose(found.normalised[2], [1, 4 / 3, 0])
        assert np.isnan(found.normalised[0, 0])
        assert np.isinf(found.normalised[0, 1:]).all()

    def test_with_references_by_hand(self):
        logits = chosen([[0, 1, 2, 0], [0, 1, 1, 1]])
        pruned = chosen([0, 1, 2, 2])
        found = ensembles.compare(logits, np.array([0, 1, 2, 0]), pruned[None])
        np.testing.assert_allclose(found.disagreement, [[0.25], [0.5]])
        np.testing.assert_allclose(found.normalised, [[np.inf], [1]])

    def test_divergences_equal_scipy(self):
        logits, labels = models()
        references = models(m=2, seed=1)[0]
        found = ensembles.compare(logits, labels, references)
        p, q = (scipy.special.softmax(z, axis=2) for z in (logits, references))
        for i, j in np.ndindex(4, 2):
            kl = [scipy.stats.entropy(a, b) for a, b in zip(p[i], q[j], strict=True)]
            np.testing.assert_allclose(found.kl[i, j], np.mean(kl), rtol=1e-10)
            middle = (p[i] + q[j]) / 2
            js = (
                scipy.stats.entropy(p[i], middle, axis=1)
                + scipy.stats.entropy(q[j], middle, axis=1)
            ) / 2
            np.testing.assert_allclose(found.js[i, j], np.mean(js), rtol=1e-10)

    def test_kl_by_hand(self):
        half, quarter = np.log([[[0.5, 0.5]]]), np.log([[[0.25, 0.75]]])
        found = ensembles.compare(half, np.array([0]), quarter).kl[0, 0]
        np.testing.assert_allclose(found, 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
        found = ensembles.compare(quarter, np.array([0]), half).kl[0, 0]
        np.testing.assert_allclose(found, 0.25 * math.log(0.5) + 0.75 * math.log(1.5))

    def test_huge_logits_are_no_trouble(self):
        a, b = np.array([[[1e4, 0.0]]]), np.array([[[0.0, 1e4]]])
        found = ensembles.compare(a, np.array([0]), b)
        np.testing.assert_allclose(found.kl, [[1e4]])
        np.testing.assert_allclose(found.js, [[math.log(2)]])

    def test_close_predictions_keep_their_divergence(self):
        """KL of softmax(z) from softmax(z + e d) is e^2 / 2 var_p(d) for small e."""
        z, d, e = np.array([0.3, -0.2, 1.0]), np.array([1.0, -2.0, 0.5]), 1e-5
        found = ensembles.compare(z[None, None], np.array([0]), (z + e * d)[None, None])
        p = scipy.special.softmax(z)
        variance = p @ d**2 - (p @ d) ** 2
        np.testing.assert_allclose(found.kl[0, 0], e**2 / 2 * variance, rtol=1e-4)

    @given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 4.0]), st.integers(2, 4))
    def test_relations(self, seed, right, c):
        logits, labels = models(n=20, c=c, seed=seed, right=right)
        found = ensembles.compare(logits, labels)
        d = found.disagreement
        error = np.array([1 - calibration.accuracy(z, labels) for z in logits])
        slack = 1e-12
        assert np.all(d <= error[:, None] + error[None] + slack)
        assert np.all(d >= np.abs(error[:, None] - error[None]) - slack)
        assert np.all(d[:, None] <= d[:, :, None] + d[None] + slack)  # triangle
        np.testing.assert_array_equal(d, d.T)
        np.testing.assert_array_equal(np.diag(d), 0)
        np.testing.assert_allclose(found.js, found.js.T, atol=slack)
        assert np.all(found.kl >= 0)
        assert np.all(found.js >= 0)
        assert np.all(found.js <= math.log(2) + slack)
        assert np.all(found.js <= (found.kl + found.kl.T) / 4 + slack)
        np.testing.assert_array_equal(np.diag(found.kl), 0)
        np.testing.assert_allclose(np.diag(found.js), 0, atol=slack)

    def test_a_row_for_each_pair(self, tmp_path):
        logits, labels = models(m=3)
        result = ensembles.compare(logits, labels, models(m=2, seed=1)[0])
        frame = result.frame()
        assert list(frame.model) == [0, 0, 1, 1, 2, 2]
        assert list(frame.reference) == [0, 1, 0, 1, 0, 1]
        row = frame[(frame.model == 2) & (frame.reference == 1)].iloc[0]
        assert row.kl == result.kl[2, 1]
        path = results.save(tmp_path / "c.npz", result)
        back = results.load(path, ensembles.Comparison)
        assert back.frame().equals(frame)
        fig = ensembles.plot_comparison(back)
        assert isinstance(fig, Figure)
        shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
        for matrix, field in zip(shown, result, strict=True):
            np.testing.assert_array_equal(matrix, field)

    def test_other_examples_and_diverged_models_are_refused(self):
        logits, labels = models()
        with pytest.raises(ValueError, match="logits are of 60 examples, labels of 59"):
            ensembles.compare(logits, labels[:-1])
        with pytest.raises(ValueError, match=r"references have shape \(59, 3\)"):
            ensembles.compare(logits, labels, logits[:, :-1])
        with pytest.raises(ValueError, match="give the same examples and classes"):
            ensembles.compare(logits, labels, logits[:, :, :-1])
        with pytest.raises(ValueError, match="references are not finite"):
            ensembles.compare(logits, labels, np.full_like(logits, np.nan))
        logits[2, 5, 1] = np.inf
        with pytest.raises(ValueError, match="leave out a network that diverged"):
            ensembles.compare(logits, labels)


def test_over_pairs_has_each_pair_once():
    matrix = np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0.0]])
    np.testing.assert_array_equal(ensembles.over_pairs(matrix), [1, 2, 3])


class TestCombine:
    def test_mean_of_probabilities(self):
        logits, _ = models()
        p = np.exp(ensembles.combine(logits))
        wanted = np.mean(scipy.special.softmax(logits, axis=2), axis=0)
        np.testing.assert_allclose(p, wanted, rtol=1e-12)

    def test_mean_of_logits(self):
        logits, _ = models()
        wanted = scipy.special.log_softmax(np.mean(logits, axis=0), axis=1)
        found = ensembles.combine(logits, by="logit")
        np.testing.assert_allclose(found, wanted, rtol=1e-12)

    def test_the_two_differ(self):
        """One is fairly sure of class 0, the others lean to class 1 a little."""
        logits = np.array([[[3.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
        assert np.argmax(ensembles.combine(logits, by="logit")) == 0
        assert np.argmax(ensembles.combine(logits, by="probability")) == 1

    @pytest.mark.parametrize("by", ["probability", "logit"])
    def test_the_loss_is_at_most_the_mean_loss(self, by):
        for seed in range(10):
            logits, labels = models(seed=seed)
            together = calibration.nll(ensembles.combine(logits, by=by), labels)
            alone = np.mean([calibration.nll(z, labels) for z in logits])
            assert together < alone

    @pytest.mark.parametrize("by", ["probability", "logit"])
    def test_members_that_are_alike_change_nothing(self, by):
        logits, _ = models(m=1)
        found = ensembles.combine(np.repeat(logits, 3, axis=0), by=by)
        np.testing.assert_allclose(found, calibration.log_softmax(logits[0]), rtol=1e-9)

    def test_unknown_rule(self):
        with pytest.raises(
            ValueError, match="by='vote' is unknown; write 'probability'"
        ):
            ensembles.combine(models()[0], by="vote")


class TestSummary:
    def test_equals_its_parts(self):
        logits, labels = models(m=3)
        reference = models(m=1, seed=1)[0][0]
        found = ensembles.summary(logits, labels, reference)
        pairs = ensembles.compare(logits, labels).disagreement
        np.testing.assert_allclose(found.disagreement, ensembles.over_pairs(pairs))
        with_reference = ensembles.compare(logits, labels, reference[None]).disagreement
        np.testing.assert_allclose(found.reference_disagreement, with_reference[:, 0])
        for i, z in enumerate(logits):
            assert found.accuracy[i] == calibration.accuracy(z, labels)
            assert found.loss[i] == calibration.nll(z, labels)
        assert found.reference_accuracy == calibration.accuracy(reference, labels)
        for by in ("probability", "logit"):
            found = ensembles.summary(logits, labels, by=by)
            together = ensembles.combine(logits, by=by)
            assert found.ensemble_loss == calibration.nll(together, labels)
            assert found.ensemble_accuracy == calibration.accuracy(together, labels)

    def test_the_row_by_hand(self):
        """Three members that err on different examples are right together."""
        logits = chosen([[0, 1, 2, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
        labels = np.array([0, 1, 2, 0])
        reference = chosen([0, 1, 2, 0])
        row = ensembles.summary(logits, labels, reference).frame().iloc[0]
        np.testing.assert_allclose(row.accuracy_mean, np.mean([0.75, 0.75, 0.5]))
        np.testing.assert_allclose(row.accuracy_std, np.std([3, 3, 2], ddof=1) / 4)
        np.testing.assert_allclose(row.disagreement_mean, np.mean([0.5, 0.75, 0.5]))
        np.testing.assert_allclose(row.disagreement_std, np.std([2, 3, 2], ddof=1) / 4)
        np.testing.assert_allclose(
            row.reference_disagreement_mean, np.mean([1, 1, 2]) / 4
        )
        assert row.reference_accuracy == 1
        np.testing.assert_allclose(row.gain, row.ensemble_accuracy - row.accuracy_mean)
        assert row.ensemble_accuracy >= 0.75  # the third example is a tie

    def test_members_that_are_alike_have_no_gain(self):
        logits, labels = models(m=1)
        same = np.repeat(logits, 5, axis=0)
        found = ensembles.summary(same, labels, logits[0])
        row = found.frame().iloc[0]
        np.testing.assert_allclose(row.gain, 0, atol=1e-12)
        np.testing.assert_allclose(found.ensemble_loss, found.loss[0])
        assert row.disagreement_mean == row.reference_disagreement_mean == 0
        assert row.accuracy_std == 0

    def test_one_function_learnt_again_against_different_ones(self):
        """Members near the reference gain and disagree less than independent ones."""
        n, c = 4000, 5
        rng = np.random.default_rng(0)
        labels = rng.integers(0, c, n)

        def independent(m):
            return 2 * np.eye(c)[labels] + rng.normal(size=(m, n, c))

        pruned = independent(1)[0]
        tickets = pruned + 0.2 * rng.normal(size=(5, n, c))
        rows = ensembles.table(
            {
                "tickets": ensembles.summary(tickets, labels, pruned),
                "pruned": ensembles.summary(independent(5), labels, pruned),
            }
        ).set_index("method")
        np.testing.assert_allclose(*rows.accuracy_mean, atol=0.02)
        assert rows.gain["tickets"] < 0.01 < 0.1 < rows.gain["pruned"]
        for name in ("disagreement_mean", "reference_disagreement_mean"):
            assert rows[name]["tickets"] < rows[name]["pruned"] / 2
        error = 1 - rows.accuracy_mean
        assert np.all(rows.disagreement_mean <= 2 * error)
        bound = error + 1 - rows.reference_accuracy
        assert np.all(rows.reference_disagreement_mean <= bound)

    def test_one_member_and_no_reference(self):
        logits, labels = models(m=1)
        found = ensembles.summary(logits, labels)
        row = found.frame().iloc[0]
        assert row.gain == 0
        for name in ("accuracy_std", "disagreement_mean", "disagreement_std"):
            assert np.isnan(row[name])
        assert np.isnan(row.reference_accuracy)
        assert np.isnan(row.reference_disagreement_mean)

    def test_a_reference_of_other_examples_is_refused(self):
        logits, labels = models()
        with pytest.raises(ValueError, match=r"references have shape \(50, 3\)"):
            ensembles.summary(logits, labels, logits[0, :50])

    def test_is_saved_and_drawn(self, tmp_path):
        logits, labels = models()
        found = ensembles.summary(logits, labels, models(m=1, seed=1)[0][0])
        path = results.save(tmp_path / "s.npz", found)
        back = results.load(path, ensembles.Summary)
        assert back.frame().equals(found.frame())
        rows = ensembles.table({"one": back, "two": ensembles.summary(logits, labels)})
        assert list(rows.method) == ["one", "two"]
        assert list(rows.columns)[1:] == list(found.frame().columns)
        np.testing.assert_array_equal(rows.index, [0, 1])
        fig = ensembles.plot_table(rows)
        assert isinstance(fig, Figure)
        left, right = fig.axes
        lines = {line.get_label(): line for line in left.lines}
        np.testing.assert_array_equal(
            lines["ensemble"].get_xdata(), rows.ensemble_accuracy
        )
        for ax, name, label in [
            (left, "accuracy_mean", "members"),
            (right, "disagreement_mean", "pairs of members"),
            (right, "reference_disagreement_mean", "with the reference"),
        ]:
            (drawn,) = (c for c in ax.containers if c.get_label() == label)
            x = np.asarray(drawn.lines[0].get_xdata(), float)
            np.testing.assert_array_equal(x, rows[name])
        results.save(tmp_path / "t.csv", rows)
        results.save(tmp_path / "t.png", fig)


def test_the_published_table_satisfies_the_relations():
    """Accuracy, of ensembles, disagreement, and that with the pruning solution."""
    pruned = 0.7560
    rows = {  # ResNet-50 on ImageNet, Evci et al. 2022
        "ticket": (0.7573, 0.7627, 0.0894, 0.0941),
        "scratch": (0.7116, 0.7405, 0.2039, 0.2033),
        "different pruned": (0.7565, 0.7780, 0.1620, 0.1623),
    }
    for accuracy, together, among, with_pruned in rows.values():
        assert together > accuracy
        assert 0 < among <= 2 * (1 - accuracy)
        assert abs(accuracy - pruned) <= with_pruned <= 2 - accuracy - pruned
    gains = {k: row[1] - row[0] for k, row in rows.items()}
    assert gains["ticket"] == min(gains.values())
