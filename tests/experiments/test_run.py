"""Experiments from the first run to the page, on the digits data."""

import contextlib
import re
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import run_cli  # noqa: F401  (its cache of compiled programs)

from experiments import costs, interpolation, publish, report, run
from experiments.trainings import Setup

NAMES = ("interpolation", "mds", "ensembles")


@contextlib.contextmanager
def usual():
    """As outside of tests: optax's schedules mix integers and floats."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Some experiments, and where."""
    folder = tmp_path_factory.mktemp("experiments")
    setup = Setup(workdir=str(folder / "runs"), smoke=True, jobs=1)
    # Of each of the trainings of this one the same is asked.
    (*_, last) = interpolation.runs(setup)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpolation, "runs", lambda setup: [last])
        with usual():
            run.run(list(NAMES), setup, folder / "results")
        yield setup, folder / "results"


def test_tables_have_every_seed(made):
    setup, out = made
    for name in NAMES:
        module, found = run.load(name), publish.read(out, name)[""]
        assert not found.isna().all(axis=None)
        assert set(found["seed"]) == set(setup.seeds)
        described = publish.described(module, setup)["trainings"]
        configs = {training["config"] for training in described}
        assert set(found["config"].astype(str)) <= configs


def test_again_trains_and_asks_nothing(made, monkeypatch):
    setup, out = made
    monkeypatch.setattr("lottery_flow.main.train_all", pytest.fail)
    monkeypatch.setattr("lottery_flow.analyze._write", pytest.fail)
    before = publish.read(out, "interpolation")
    with usual():
        run.run(["interpolation"], setup, out)
    pd.testing.assert_frame_equal(before[""], publish.read(out, "interpolation")[""])


def test_what_it_costs_is_noted(made):
    setup, _ = made
    found = pd.read_csv(f"{setup.workdir}/timings.csv")
    assert (found[["seconds", "processor_seconds"]] > 0).all(axis=None)
    trained = found[found["steps"] > 0]
    done = list(Path(setup.workdir).glob("*/seed_*/DONE"))
    assert trained["members"].sum() == len(done)
    (asked,) = found[found["steps"] == 0].to_dict("records")
    assert asked["kind"] == "alignment, curve, interpolation"
    assert asked["work"] == "8 questions"
    assert asked["members"] == len(setup.seeds)


def test_costs_are_added_up(tmp_path):
    (tmp_path / "timings.csv").write_text(
        "kind,work,members,steps,seconds,processor_seconds\n"
        "mlp,a,5,1000,30,72\nmesh,b,3,0,50,36\nmlp,c,1,4000,50,108\n"
    )
    found = costs.table(costs.path(str(tmp_path)))
    assert found.values.tolist() == [
        ["mlp", 6, "9,000", "0.05", "20.0"],  # 5 x 1,000 + 4,000 steps in 180 s
        ["mesh", 3, "", "0.01", ""],
        ["all", 9, "9,000", "0.06", ""],
    ]


def test_barriers_are_those_of_the_paths(made):
    found = publish.read(made[1], "interpolation")
    rows, barriers = found[""], found["barriers"]
    assert set(barriers["kind"]) == {"start", "end", "end, aligned", "end, curve"}
    one = barriers.iloc[0]
    path = rows[
        (rows["curve"] == one["curve"])
        & (rows["kind"] == one["kind"])
        & (rows["seed"] == one["seed"])
        & rows["alpha"].between(-1e-9, 1 + 1e-9)
    ]
    alpha, loss = path["alpha"].to_numpy(), path["loss"].to_numpy()
    line = (1 - alpha) * loss[0] + alpha * loss[-1]
    np.testing.assert_allclose(
        one["barrier"], np.max(loss - line), rtol=1e-3, atol=1e-6
    )


def test_map_has_the_networks_of_the_paper(made):
    setup, out = made
    rows = publish.read(out, "mds")[""]
    n = len(setup.seeds)
    for _, own in rows.groupby("map"):
        assert own["label"].value_counts().to_dict() == {
            "lottery start": 1,
            "lottery end": n,
            "scratch start": n,
            "scratch end": n,
            "pruning solution": 1,
        }


def test_ensembles_compare_other_solutions_without_the_solution_itself(made):
    found = publish.read(made[1], "ensembles")
    apart = found[""].set_index(["kind", "seed"])["disagreement_with_solution"]
    assert apart.isna().sum() == 1
    assert np.isnan(apart["other pruning solutions", 1])


def test_report_is_one_page_that_loads_nothing(made):
    text = report.page(made[1])
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "http" not in re.sub(r"<img[^>]*>", "", text)
    assert text.count("<img") >= len(NAMES)
    for name in NAMES:
        assert f'id="{name}"' in text


def test_report_escapes_what_it_shows(made, monkeypatch):
    evil = "<script>alert(1)</script>"
    frame = pd.DataFrame({evil: [evil]})
    monkeypatch.setattr("experiments.mds.beside", lambda found: frame)
    assert evil not in report.page(made[1])


def test_report_writes_the_tables_of_a_page_anew(made, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- mds -->\nold\n<!-- end mds -->\nafter\n")
    report.refresh(page, made[1])
    text = page.read_text()
    assert text.startswith("before\n<!-- mds -->\n\n| map |")
    assert text.endswith(".\n\n<!-- end mds -->\nafter\n")
    report.refresh(page, made[1])
    assert page.read_text() == text
