"""Training on images that are decoded on the way."""

import json

import jax
import numpy as np
import pytest
import run_cli
from numpy.testing import assert_array_equal
from PIL import Image

from lottery_flow import analyze, feed, loop, runs
from lottery_flow.build import build
from lottery_flow.errors import UserError
from lottery_flow.loop import Run
from lottery_flow.studies.common import Options
from lottery_flow.study import open_run
from lottery_flow.train import train

FIELDS = {
    "model__widths": "(32,)",
    "data__image_size": 8,
    "optim__learning_rate": 0.05,
    "sparsity__sparsity": 0.5,
    "train__total_steps": 36,
    "train__batch_size": 16,
    "train__probe_examples": 20,
    "train__figure": False,
    "eval__batch_size": 8,
    "sparsity__grow_examples": 10,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes that a network can tell apart: bright and dark."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 20), ("val", 7)):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (12, 14, 3)) + 150 * label
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{i:03}.png")
    return root


def job_of(folder, **fields):
    own = {"data__name": f"folder:{folder}", "data__image_size": 8}
    return run_cli.small_job(**own, **fields)


def trained(job, directory):
    with jax.numpy_dtype_promotion("standard"):
        (result,) = train([Run(job, runs.RunPaths(directory), {"seed": 0})])
    return result


def same(a, b):
    jax.tree.map(assert_array_equal, a.state.params, b.state.params)
    jax.tree.map(assert_array_equal, a.state.masks, b.state.masks)
    assert a.rows == b.rows


def test_a_run_resumes_with_the_same_bits_and_any_number_of_workers(folder, tmp_path):
    job = job_of(folder)
    whole = trained(job, tmp_path / "whole")
    assert [row["step"] for row in whole.rows][-1] == 12
    # In two goes, the second with worker processes.
    trained(job._replace(total_steps=6), tmp_path / "halves")
    same(trained(job._replace(workers=1), tmp_path / "halves"), whole)


def test_a_run_learns_and_is_analysed(folder, tmp_path):
    args = run_cli.flag_list(
        "rigl_mlp:smoke", tmp_path, data__name=f"folder:{folder}", **FIELDS
    )
    done = run_cli.in_process(*args)
    assert done.status == 0, done.stderr
    directory = run_cli.run_directory(tmp_path)
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(rows[0]), json.loads(rows[-1])
    assert last["test_accuracy"] == 1
    assert last["test_loss"] < first["test_loss"] / 2
    study = open_run(directory, 6)
    (batch,) = study.train_batches(20, 20)
    # Sorted by name: the dark ones came second.
    assert_array_equal(batch["label"], [0] * 20)
    assert batch["image"].shape == (20, 8, 8, 3)
    assert sum(len(b["label"]) for b in study.test_batches(5)) == 14
    # Trained on to the next rewire on the batches that the run saw.
    with jax.numpy_dtype_promotion("standard"):
        table = analyze.answer("rewire", study, Options()).table()
    found = table[table["layer"] == "all"].iloc[0]
    rewires = [r for r in map(json.loads, rows) if "gradient_norm_before" in r]
    row = next(r for r in rewires if r["step"] > 6)
    assert found["before"] == pytest.approx(row["gradient_norm_before"], rel=1e-5)
    assert found["after"] == pytest.approx(row["gradient_norm_after"], rel=1e-5)


def test_members_that_share_the_stream_are_trained_together(folder, tmp_path):
    jobs = [job_of(folder, data__order_seed=0)]
    jobs.append(
        build(
            run_cli.small_config(
                data__name=f"folder:{folder}", data__image_size=8, data__order_seed=0
            ),
            1,
        )
    )
    alone = [trained(job, tmp_path / f"alone_{i}") for i, job in enumerate(jobs)]
    started = [
        Run(job, runs.RunPaths(tmp_path / f"both_{i}"), {"seed": i})
        for i, job in enumerate(jobs)
    ]
    with jax.numpy_dtype_promotion("standard"):
        both = train(started)
    for a, b in zip(both, alone, strict=True):
        same(a, b)


def test_members_with_streams_of_their_own_are_refused(folder, tmp_path):
    jobs = [
        job_of(folder),
        build(
            run_cli.small_config(data__name=f"folder:{folder}", data__image_size=8), 1
        ),
    ]
    started = [
        Run(job, runs.RunPaths(tmp_path / str(i)), {}) for i, job in enumerate(jobs)
    ]
    with pytest.raises(UserError, match="all members need the same batches"):
        train(started)
    assert not list(tmp_path.iterdir())


def test_batches_are_placed_ahead_and_the_stream_is_closed():
    placed, closed = [], []

    def batches():
        try:
            for i in range(5):
                yield {"label": i}
        finally:
            closed.append(True)

    def place(batch):
        placed.append(batch["label"])
        return batch

    stream = feed.ahead(batches(), place)
    assert next(stream)["label"] == 0
    assert placed == [0, 1]
    assert [b["label"] for b in stream] == [1, 2, 3, 4]
    assert closed == [True]
    early = feed.ahead(batches(), place)
    next(early)
    early.close()
    assert closed == [True, True]
    assert loop.Data is feed.Data
