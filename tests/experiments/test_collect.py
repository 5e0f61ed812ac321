"""Tables from rows of metrics that were written by hand."""

import functools
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from experiments import (
    accuracy_table,
    calibration,
    ensembles,
    fashion,
    gradient_flow_training,
    hessian_spectrum,
    launch,
    paper,
    records,
    rewire_gain,
    tables,
    trainings,
)
from experiments.trainings import Setup, Training
from lottery_flow.runs import RunPaths


def write(training: Training, setup: Setup, row) -> None:
    """Metrics of every seed; `row` makes those of a step."""
    for seed in training.seeds(setup):
        paths = RunPaths(training.run(setup, seed))
        paths.root.mkdir(parents=True, exist_ok=True)
        rows = [row(training, seed, step) for step in (0, 100, 200)]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        paths.metrics.write_text(text)


@pytest.fixture
def setup(tmp_path):
    return Setup(workdir=str(tmp_path))


def test_accuracy_is_that_of_the_last_step_and_seeds_at_chance_are_counted(setup):
    def row(training, seed, step):
        learned = training.method != "scratch" or seed > 1
        accuracy = (0.9 + 0.01 * seed if learned else 0.1135) if step else 0.05
        own = {"test_loss": 1.0, "gradient_norm": 2.0, "density": 0.05}
        return {"step": step, "test_accuracy": accuracy, **own}

    for training in accuracy_table.runs(setup):
        write(training, setup, row)
    found = accuracy_table.collect(setup)
    assert len(found[""]) == 5 * len(accuracy_table.runs(setup))
    assert set(found[""]["step"]) == {200}
    summary = found["summary"].set_index(accuracy_table.BY)
    rigl = summary.loc["mnist", "lenet5", "rigl", "pruned", "per_neuron"]
    assert rigl["mean"] == pytest.approx(92.0)
    assert rigl["std"] == pytest.approx(
        100 * np.std([0, 0.01, 0.02, 0.03, 0.04], ddof=1)
    )
    assert (rigl["count"], rigl["at_chance"]) == (5, 0)
    scratch = summary.loc["mnist", "mlp", "scratch", "random", "masked_dense"]
    assert (scratch["count"], scratch["at_chance"]) == (5, 2)
    table = accuracy_table.beside(found)
    assert set(table.loc[table["method"] == "lottery", "paper"]) == {"98.52 ± 0.02", ""}
    assert "at chance" in table
    assert accuracy_table.plot(found)


def test_gain_is_the_norm_after_less_that_before(setup):
    def row(training, seed, step):
        up = {"rigl": 0.5, "set": 0.1, "rigl_inverted": 0.0}[training.method]
        rewire = {"gradient_norm_before": 1.0, "gradient_norm_after": 1.0 + up}
        return {"step": step, **(rewire if step else {})}

    for training in rewire_gain.runs(setup):
        write(training, setup, row)
    found = rewire_gain.collect(setup)
    assert set(found[""]["step"]) == {100, 200}
    windows = found["windows"].set_index(["method", "init", "up_to_step"])
    assert windows.loc["rigl", "per_neuron", 500]["mean"] == pytest.approx(0.5)
    assert windows.loc["rigl_inverted", "per_neuron", 500]["share_positive"] == 0
    assert windows["count"].sum() == len(found[""])
    assert rewire_gain.plot(found)
    assert len(rewire_gain.beside(found)) == len(windows)


def test_curves_of_the_gradient_norm_are_named_as_in_the_paper(setup):
    def row(training, seed, step):
        return {"step": step, "gradient_norm": 1.0 + seed + step / 100}

    for training in gradient_flow_training.runs(setup):
        write(training, setup, row)
    found = gradient_flow_training.collect(setup)
    curves = set(gradient_flow_training.named(found[""])["curve"])
    assert curves > set(paper.GRADIENT_NORM)
    assert curves - set(paper.GRADIENT_NORM) == {
        "dense",
        "prune",
        "set",
        "set+",
        "rigl",
    }
    table = gradient_flow_training.beside(found)
    at_100 = table[(table["step"] == 100) & (table["curve"] == "lottery")]
    assert at_100[["ours", "paper"]].to_numpy().tolist() == [["4.000", "0.031"]]
    assert gradient_flow_training.plot(found)


def test_the_distance_of_a_candidate_is_that_of_its_logarithms(setup):
    def row(training, seed, step):
        factor = 1.0 if training.init == "per_neuron" else 100.0
        mean = paper.GRADIENT_NORM["scratch+"].get(step, 1.0)
        return {"step": step, "gradient_norm": factor * mean}

    for training in calibration.runs(setup):
        write(training, setup, row)
    found = calibration.collect(setup)
    table = calibration.beside(found).set_index(["curve", "candidate"]).sort_index()
    plus = table.loc["scratch+"]["distance"].astype(float)
    assert plus.to_numpy() == pytest.approx(0.0, abs=1e-3)
    theirs = paper.GRADIENT_NORM
    ours = 100 * np.array([theirs["scratch+"][s] for s in (100, 200)])
    ratio = np.log10(ours / [theirs["scratch"][s] for s in (100, 200)])
    one = float(table.loc["scratch", "learning rate 0.05"]["distance"])
    assert one == pytest.approx(np.sqrt(np.mean(ratio**2)), abs=1e-3)
    assert calibration.plot(found)


def test_fashion_is_the_same_on_other_data(setup):
    own, mnist = fashion.runs(setup), accuracy_table.runs(setup)
    assert [t._replace(data="mnist") for t in own] == mnist
    assert {t.config(setup).data.name for t in own} == {"fashion_mnist"}
    flow = gradient_flow_training.runs(setup, fashion.DATA)
    assert set(flow) <= set(own)


def test_calibration_follows_the_schedule_of_the_whole_run(setup):
    for training in calibration.runs(setup):
        config = training.config(setup)
        assert config.train.total_steps == 2000
        assert config.optim.schedule_steps == calibration.FULL_STEPS
    whole = Training("lenet5", "scratch", "per_neuron", "pruned").config(setup)
    assert whole.train.total_steps == calibration.FULL_STEPS


def test_tickets_come_from_one_pruning_run(setup):
    for name, own in trainings.tickets(setup).items():
        members = trainings.members(own, setup)
        assert len(members) == 5
        configs = [t.config(setup) for t, _ in members]
        if name == "other pruning solutions":
            continue
        sources = {c.sparsity.masks_from for c in configs}
        (source,) = sources
        assert source.endswith(f"/seed_{trainings.TICKET_SEED}")
        orders = {
            seed if c.data.order_seed < 0 else c.data.order_seed
            for c, (_, seed) in zip(configs, members, strict=True)
        }
        assert len(orders) == 5


def _row(training, seed, step, value=0.1):
    return {"step": step, "seed": seed, "x": value}


def test_kept_rows_stand_for_runs_that_are_gone(tmp_path):
    setup = Setup(str(tmp_path / "runs"), records=str(tmp_path / "results/runs"))
    training = Training("mlp", "dense")
    write(training, setup, _row)
    for seed in (0, 3):
        RunPaths(training.run(setup, seed)).done.write_text("")
    records.keep([training], setup)
    before = tables.curves([training], setup, ["x"])
    shutil.rmtree(training.run(setup, 0).parent)
    assert records.seeds(training, setup) == {0, 3}
    after = tables.curves([training], setup, ["x"])
    assert set(before["seed"]) == {0, 1, 2, 3, 4}
    whole = before[before["seed"].isin([0, 3])].reset_index(drop=True)
    pd.testing.assert_frame_equal(after, whole)
    wanted = launch.missing([training], setup, [training])
    assert [seed for _, seed in wanted] == [1, 2, 4]
    assert len(launch.missing([training], setup)) == 5  # their weights are gone


def test_kept_rows_are_found_from_another_workdir(tmp_path):
    """Also those of runs whose masks come from others, of which it is a field."""
    setup = Setup(str(tmp_path / "a"), records=str(tmp_path / "results/runs"))
    other = setup._replace(workdir=str(tmp_path / "b"))
    training = Training("mlp", "scratch", masks="pruned")
    assert training.directory(setup).name != training.directory(other).name
    write(training, setup, _row)
    for seed in setup.seeds:
        RunPaths(training.run(setup, seed)).done.write_text("")
    records.keep([training], setup)
    there = tables.curves([training], setup, ["x"])
    pd.testing.assert_frame_equal(tables.curves([training], other, ["x"]), there)
    assert launch.missing([training], other, [training]) == []


def test_kept_rows_are_kept_beside_later_ones(tmp_path):
    setup = Setup(str(tmp_path / "runs"), records=str(tmp_path / "results/runs"))
    training = Training("mlp", "dense")
    for value, done in ((1.0, (0, 1)), (2.0, (1, 4))):
        row = functools.partial(_row, value=value)
        write(training, setup, row)
        for seed in done:
            RunPaths(training.run(setup, seed)).done.write_text("")
        records.keep([training], setup)
        shutil.rmtree(training.run(setup, 0).parent)
    found = tables.ends([training], setup, ["x"]).set_index("seed")["x"]
    assert found.to_dict() == {0: 1.0, 1: 2.0, 4: 2.0}


def test_an_ensemble_has_a_second_row_without_those_that_never_learned(
    setup, monkeypatch
):
    labels = np.array([0, 1, 1, 1, 1, 1, 1, 1])
    right = np.eye(2, dtype=np.float32)[labels]
    # Always class 0: right on one image of eight.
    stuck = np.eye(2, dtype=np.float32)[np.zeros(8, int)]

    def logits(training, seed, setup):
        fails = training.method == "scratch" and training.only_seed is None
        fails &= training.init == "masked_dense" and seed in (1, 3)
        return (stuck if fails else right), labels

    monkeypatch.setattr(ensembles, "_logits", logits)
    found = ensembles.collect(setup)
    table = found["summary"].set_index("kind")
    kind = "scratch, other inits"
    (second,) = (k for k in table.index if k.endswith(ensembles.LEARNED))
    assert second == kind + ensembles.LEARNED
    assert table.loc[kind, "networks"] == 5
    assert table.loc[kind, "accuracy_mean"] == pytest.approx((3 + 2 / 8) / 5)
    assert table.loc[second, "networks"] == 3
    assert table.loc[second, "accuracy_mean"] == 1
    assert table.loc[second, "reference_disagreement_mean"] == 0
    (ax, _) = ensembles.plot(found)[""].axes
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert second in shown
    assert kind not in shown


def test_changes_of_spectra_are_means_and_extremes_over_the_seeds():
    rows = []
    for seed, (before, after) in enumerate([(10, 14), (20, 22)]):
        for when, value in (("before", before), ("after", after)):
            quantities = dict.fromkeys(hessian_spectrum.QUANTITIES, 0.0)
            about = {"method": "rigl", "checkpoint": 500, "seed": seed, "when": when}
            rows.append(about | quantities | {"below_-0.1": value})
    found = hessian_spectrum._change(pd.DataFrame(rows))
    own = found.set_index("quantity").loc["below_-0.1"]
    names = ["before", "after", "change", "min", "max"]
    assert own[names].tolist() == [15, 18, 3, 2, 4]
    (line,) = hessian_spectrum.beside({"change": found}).to_dict("records")
    assert line["below -0.1"] == "15.0 +3.0"
    assert line["smallest"] == "0.000 +0.000"
