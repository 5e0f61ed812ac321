"""What lies in results/ is what the tree says; the paper's numbers stay apart."""

import ast
import hashlib
import inspect
import json
from pathlib import Path

import pandas as pd
import pytest

from experiments import paper, publish, records, report, run, tables, trainings
from experiments.trainings import Setup

RESULTS = Path(__file__).parents[2] / "results"
FINISHED = report.finished(RESULTS)


@pytest.mark.parametrize("name", FINISHED)
def test_results_come_from_the_configs_in_the_tree(name):
    record = json.loads((RESULTS / name / "config.json").read_text())
    now = publish.described(run.load(name), Setup())
    assert {k: record[k] for k in now} == now
    known = {training["config"] for training in now["trainings"]}
    for table in publish.read(RESULTS, name).values():
        if "config" in table:
            found = set(table["config"].astype(str))
            assert found <= known
            assert len(found) > 0


@pytest.mark.parametrize("name", FINISHED)
def test_tables_are_those_that_were_collected(name):
    record = json.loads((RESULTS / name / "config.json").read_text())
    files = {path.name for path in (RESULTS / name).glob("*.csv")}
    assert files == set(record["files"])
    for file, digest in record["files"].items():
        text = (RESULTS / name / file).read_bytes()
        assert hashlib.sha256(text).hexdigest() == digest


@pytest.mark.parametrize("name", FINISHED)
def test_every_seed_of_every_training_is_there(name):
    record = json.loads((RESULTS / name / "config.json").read_text())
    table = publish.read(RESULTS, name)[""]
    if not record["trainings"] or "seed" not in table:
        return
    assert set(table["seed"]) == set(record["seeds"]) == {0, 1, 2, 3, 4}


def test_kept_rows_are_of_whole_runs_of_the_configs_in_the_tree():
    setup = Setup(records=str(RESULTS / "runs"))
    runs = [t for name in run.EXPERIMENTS for t in run.load(name).runs(setup)]
    wanted = {t.directory(setup).name: t for t in trainings.with_sources(runs)}
    for path in (RESULTS / "runs").glob("*.jsonl.gz"):
        training = wanted[path.name.removesuffix(".jsonl.gz")]
        last = training.config(setup).train.total_steps
        own = tables.ends([training], setup, ["loss"])
        assert set(own["step"]) == {last}
        assert set(own["seed"]) == records.seeds(training, setup)


@pytest.mark.parametrize("name", ["interpolation", "fashion_interpolation"])
def test_barriers_are_those_of_the_paths(name):
    found = publish.read(RESULTS, name)
    points = found[""]
    points = points[points["alpha"].between(-1e-6, 1 + 1e-6)]
    by = [k for k in ("network", "curve", "kind", "seed") if k in found["barriers"]]
    assert len(found["barriers"]) == points.groupby(by).ngroups > 0
    for row in found["barriers"].to_dict("records"):
        path = points[(points[by] == [row[k] for k in by]).all(axis=1)]
        alpha, loss = path["alpha"].to_numpy(), path["loss"].to_numpy()
        line = loss[alpha.argmin()] * (1 - alpha) + loss[alpha.argmax()] * alpha
        assert max(loss - line) == pytest.approx(row["barrier"], rel=1e-4, abs=1e-5)
        ends = path["accuracy"].iloc[[alpha.argmin(), alpha.argmax()]].mean()
        drop = ends - path["accuracy"].min()
        assert drop == pytest.approx(row["instability"], rel=1e-4, abs=1e-5)


def test_the_page_of_results_shows_the_tables(tmp_path):
    text = (RESULTS / "README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text(text)
    report.refresh(copy, RESULTS)
    assert copy.read_text() == text
    assert set(FINISHED) == set(run.EXPERIMENTS)
    for name in FINISHED:
        assert f"<!-- {name} -->" in text


@pytest.mark.parametrize("name", run.EXPERIMENTS)
def test_only_plots_and_comparisons_read_the_paper(name):
    tree = ast.parse(inspect.getsource(run.load(name)))
    for node in tree.body:
        reads = any(isinstance(n, ast.Name) and n.id == "paper" for n in ast.walk(node))
        if reads:
            assert isinstance(node, ast.FunctionDef)
            assert node.name in ("plot", "beside", "_published")


def test_collecting_never_loads_the_paper():
    for module in (publish, tables):
        assert not hasattr(module, "paper")


def test_curves_of_the_paper_are_whole():
    for values in paper.SIGNAL_STD.values():
        assert len(values) == len(paper.SIGNAL_SPARSITY) == 15
    for curve in paper.GRADIENT_NORM.values():
        assert min(curve) == 100
        assert max(curve) == 11_719


# --- Tables -------------------------------------------------------------------------


def test_mean_and_spread_of_groups():
    frame = pd.DataFrame({"a": ["x", "x", "y"], "v": [0.1, 0.3, 0.5]})
    found = tables.mean_and_spread(frame, ["a"], "v", 100.0)
    assert found["a"].tolist() == ["x", "y"]
    assert found["mean"].tolist() == pytest.approx([20.0, 50.0])
    assert found["std"].iloc[0] == pytest.approx(200**0.5)
    assert found["std"].isna().tolist() == [False, True]
    assert found["count"].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (98.524, 0.018, "98.52 ± 0.02"),
        (98.5, None, "98.50"),
        (98.5, float("nan"), "98.50"),
    ],
)
def test_plus_minus(mean, spread, text):
    assert tables.plus_minus(mean, spread) == text


def test_markdown():
    frame = pd.DataFrame({"a": [1], "b": ["x"]})
    assert tables.markdown(frame) == "| a | b |\n| --- | --- |\n| 1 | x |"
