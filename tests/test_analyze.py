"""Questions asked of finished runs, through the command."""

import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pandas as pd
import pytest
import run_cli

from lottery_flow import analyze, models
from lottery_flow.analysis import gradient_flow, results, spectrum
from lottery_flow.sparsity.active import active_space
from lottery_flow.studies import STUDIES
from lottery_flow.study import next_rewire, open_run

RIGL = {
    "sparsity__sparsity": 0.5,
    "sparsity__interval_steps": 4,
    "sparsity__grow_examples": 50,
    "train__checkpoint_every_steps": 5,
    "train__log_every_steps": 5,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs: three seeds of RigL, and a dense one."""
    workdir = tmp_path_factory.mktemp("runs")
    shape = {"model__widths": (5,), "train__batch_size": 16, "train__figure": False}
    for name, fields in (
        ("rigl_mlp:smoke", {"train__seeds": "(0,1,2)", **RIGL}),
        ("dense_mlp:smoke", {}),
    ):
        args = run_cli.flag_list(name, workdir / name[:4], **shape, **fields)
        outcome = run_cli.in_process(*args)
        assert outcome.status == 0, outcome.stderr
    found = [run_cli.run_directory(workdir / "rigl", i) for i in range(3)]
    return [*found, run_cli.run_directory(workdir / "dens")]


def ask(*args: object) -> run_cli.Outcome:
    """The command, in this process."""
    return run_cli.in_process(*map(str, args), module=analyze)


def against(what: str, runs) -> list[str]:
    low, high = STUDIES[what].n_against
    n = max(low, 2 if what == "surface" else min(high, 1))
    return [f"--against={','.join(map(str, runs[1 : n + 1]))}"] if n else []


@pytest.mark.parametrize("what", STUDIES)
def test_each_study_writes_tables_and_figures_once(what, runs):
    run, uses = runs[0], STUDIES[what].uses
    args = [what, f"--run={run}", *against(what, runs)]
    args += ["--step=5"] if what.startswith("rewire") else []
    args += ["--examples=60"] if "examples" in uses else []
    args += ["--train_steps=3"] if "train_steps" in uses else []
    outcome = ask(*args)
    assert outcome.status == 0, outcome.stderr
    assert not outcome.errors
    (record,) = (run / "analysis").rglob(f"{what}*.json")
    wanted = json.loads(record.read_text())
    assert wanted["what"] == what
    assert wanted["text"] in outcome.stdout
    parts = sorted(record.parent.glob(f"{record.stem}*"))
    kinds = {p.suffix for p in parts}
    assert {".csv", ".png", ".json"} <= kinds
    assert not list(record.parent.glob("*.partial*"))
    for table in record.parent.glob(f"{record.stem}*.csv"):
        assert len(pd.read_csv(table)) > 0
    before = run_cli.snapshot(run)
    again = ask(*args)
    assert again.status == 0
    assert "nothing to do" in again.stdout
    assert wanted["text"] in again.stdout
    assert run_cli.snapshot(run) == before


def test_a_run_that_changed_is_analysed_again(runs, tmp_path):
    """The files of another network of the same name do not count."""
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    assert "nothing" not in ask("calibration", f"--run={run}").stdout
    assert "nothing to do" in ask("calibration", f"--run={run}").stdout
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(runs[2] / "checkpoints", run / "checkpoints")
    outcome = ask("calibration", f"--run={run}")
    assert outcome.status == 0
    assert "nothing" not in outcome.stdout


def test_networks_with_norms_have_their_own_statistics(tmp_path, monkeypatch):
    """A rewire far from the checkpoint, and the end of a path."""

    def small(n_classes, **options):
        return Small(nn.relu, norm=True)

    class Small(nn.Module):
        activation: object
        norm: bool

        @nn.compact
        def __call__(self, images, train=False):
            x = nn.Dense(4, name="hidden")(images.reshape(len(images), -1))
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            return nn.Dense(10, name="logits")(self.activation(x))

    monkeypatch.setitem(models.MODELS, "resnet18", small)
    args = run_cli.flag_list(
        "rigl_mlp:smoke",
        tmp_path,
        train__seeds="(0,1)",
        train__figure=False,
        model__name="resnet18",
        **RIGL | {"sparsity__begin_steps": 9},
    )
    models.create.cache_clear()
    assert run_cli.in_process(*args).status == 0
    first, second = (run_cli.run_directory(tmp_path, i) for i in (0, 1))
    args = "rewire", f"--run={first}", "--step=0", "--norms=frozen", "--examples=60"
    outcome = ask(*args)
    assert outcome.status == 0, outcome.stderr
    (path,) = (first / "analysis").rglob("rewire-*.npz")
    found = results.load(path, gradient_flow.RewireGain)
    with jax.numpy_dtype_promotion("standard"):  # optax and flax mix types
        study = open_run(first, 0)
        due, _, after = next_rewire(study)
        assert due > 5
        norms = [
            gradient_flow.gradient_norm(
                one.objective("frozen"),
                after.params,
                after.masks,
                study.train_batches(60, 60),
            ).gradient_norm[0]
            for one in (study._replace(network=after), study)
        ]
    np.testing.assert_allclose(found.after[0], norms[0], rtol=1e-4)
    assert abs(norms[1] - norms[0]) > 0.05 * norms[0]  # statistics of step 0
    line = "interpolation", f"--run={first}", f"--against={second}"
    assert "statistics of their own" in ask(*line, "--norms=frozen").errors[0]
    assert ask(*line, "--examples=60", "--mask=own").status == 0
    flow = ask("gradient_flow", f"--run={first}", "--norms=frozen")
    assert "each checkpoint has statistics of its own" in flow.errors[0]
    models.create.cache_clear()


def rows_of(run):
    return pd.read_json(run / "metrics.jsonl", lines=True).set_index("step")


def test_gradient_flow_is_that_of_the_rows_of_metrics(runs):
    assert ask("gradient_flow", f"--run={runs[1]}").status == 0
    frame = pd.read_csv(runs[1] / "analysis" / "gradient_flow.csv")
    whole = frame[frame["layer"] == "all"].set_index("step")["gradient_norm"]
    assert len(whole) >= 3
    wanted = rows_of(runs[1])["gradient_norm"]
    np.testing.assert_allclose(whole, wanted[whole.index], rtol=1e-5)


def test_the_rewire_is_that_of_the_run(runs):
    assert ask("rewire", f"--run={runs[1]}", "--step=5").status == 0
    frame = pd.read_csv(runs[1] / "analysis" / "step_5" / "rewire.csv")
    whole = frame.set_index("layer").loc["all"]
    rows = rows_of(runs[1]).dropna(subset="gradient_norm_before")
    row = rows[rows.index > 5].iloc[0]
    np.testing.assert_allclose(whole["before"], row["gradient_norm_before"], rtol=1e-5)
    np.testing.assert_allclose(whole["after"], row["gradient_norm_after"], rtol=1e-5)
    assert whole["before"] != whole["after"]


def test_the_spectrum_is_that_of_the_library(runs):
    args = "spectrum", f"--run={runs[2]}", "--step=0", "--examples=70"
    assert ask(*args, "--weight_decay=0.1").status == 0
    (path,) = (runs[2] / "analysis" / "step_0").glob("spectrum-*.npz")
    found = results.load(path, spectrum.Spectrum)
    study = open_run(runs[2], 0)
    flat, unravel = jax.flatten_util.ravel_pytree(study.network.params)
    (batch,) = study.train_batches(70, 70)
    loss = study.objective("frozen", 0.1)
    whole = jax.jit(jax.hessian(lambda x: loss(unravel(x), batch)))(flat)
    space = active_space(study.network.params, study.network.masks)
    index = space.flatten(unravel(jax.numpy.arange(len(flat), dtype=flat.dtype)))
    index = np.asarray(index, int)
    dense = np.linalg.eigvalsh(np.asarray(whole, np.float64)[np.ix_(index, index)])
    np.testing.assert_allclose(
        np.sort(found.frame()["eigenvalue"]), dense, atol=1e-5 * dense[-1]
    )


def test_options_have_files_of_their_own(runs):
    base = "calibration", f"--run={runs[1]}"
    for options in ([], ["--batch_size=100"], ["--batch_size=200"]):
        assert ask(*base, *options).status == 0
    folder = runs[1] / "analysis"
    assert len(list(folder.rglob("calibration*.json"))) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["hessian", "--run={run}"], "say what to analyse"),
        ([], "say what to analyse"),
        (["spectrum"], "--run is missing"),
        (["spectrum", "--run=/nowhere"], "give the seed_N directory of a run"),
        (["spectrum", "--run={run}", "--step=3"], "has no checkpoint of step 3"),
        (["spectrum", "--run={run}", "--step=-5"], "--step=-5 must be at least -1"),
        (["interpolation", "--run={run}"], "--against names 0 runs; interpolation"),
        (["rewire", "--run={run}"], "no rewire follows"),
        (["rewire", "--run={dense}"], "it has none"),
        (["rules", "--run={dense}"], "is dense; give a sparse run"),
        (["spectrum", "--run={run}", "--norms=recomputed"], "--norms=recomputed is"),
        (["surface", "--run={run}", "--against={run}"], "needs two runs, or none"),
        (["masks", "--run={run}", "--examples=9"], "--examples=9 does nothing for"),
        (["distances", "--run={run}", "--step=5"], "looks at all checkpoints"),
        (["trace", "--run={run}", "--examples=99999"], "training images; give at most"),
        (["rules", "--run={run}", "--examples=0"], "for the growth scores; give at"),
        (["masks", "--run={run}", "--against={run}@x"], "'x' is no step"),
        (["masks", "--run={run}", "--steps=3"], "steps"),
        (["mds", "--run={run}", "--against={other}"], "model.widths is"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_nothing(args, message, runs, tmp_path):
    run, dense = tmp_path / "run", runs[3]
    run.symlink_to(runs[2])
    other = tmp_path / "other"
    other.mkdir()
    record = json.loads((dense / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(record | {"model.widths": [7, 7]}))
    (other / "checkpoints").symlink_to(dense / "checkpoints")
    before = run_cli.snapshot(runs[2])
    outcome = ask(*(a.format(run=run, dense=dense, other=other) for a in args))
    assert outcome.status == 2
    (error,) = outcome.errors
    assert message in error
    assert run_cli.snapshot(runs[2]) == before


def test_a_record_with_fields_of_another_version(runs, tmp_path):
    record = json.loads((runs[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"train.fancy": 1}))
    outcome = ask("spectrum", f"--run={tmp_path}")
    assert outcome.errors == [
        f"error: {tmp_path}/config.json: train.fancy is not a field of this version"
    ]
