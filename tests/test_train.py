"""Whole runs of the host loop: rows, seeds, and what passes through."""

from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, metrics, models, report, runs
from lottery_flow.loop import Result, Run
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.train import train


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(root: Path, seed: int = 0, **fields: object) -> Result:
    job = run_cli.small_job(seed, **fields)
    (result,) = train([Run(job, runs.RunPaths(root / "run"), {"seed": seed})])
    return result


@pytest.fixture(scope="module")
def rigl(tmp_path_factory, _promotion) -> tuple[Path, Result]:
    root = tmp_path_factory.mktemp("rigl")
    return root / "run", run(root, sparsity__rule="rigl")


EVERY_ROW = {
    "step",
    "seed",
    "loss",
    "accuracy",
    "learning_rate",
    "gradient_norm",
    "probe_loss",
    "probe_accuracy",
    "drop_fraction",
    "density",
    "density/fc1",
    "density/fc2",
}
AT_REWIRES = {"gradient_norm_before", "gradient_norm_after"}
AT_EVALUATIONS = {"test_loss", "test_accuracy"}


def test_rows_come_at_logs_rewires_evaluations_and_the_ends(rigl):
    assert [row["step"] for row in rigl[1].rows] == [0, 3, 5, 6, 9, 10, 12]


def test_every_row_has_its_columns(rigl):
    for row in rigl[1].rows:
        expected = set(EVERY_ROW)
        expected |= AT_REWIRES if row["step"] in (3, 6, 9, 12) else set()
        expected |= AT_EVALUATIONS if row["step"] in (0, 6, 12) else set()
        assert set(row) == expected, row["step"]
        assert row["seed"] == 0
        assert (row["loss"] is None) == (row["step"] == 0)


def test_schedules_in_the_rows(rigl):
    for row in rigl[1].rows:
        share = 0.5 * (1 + np.cos(np.pi * row["step"] / 12))
        assert row["learning_rate"] == pytest.approx(0.05 * share, abs=1e-8)
        assert row["drop_fraction"] == pytest.approx(0.3 * share, abs=1e-7)


def test_density_in_the_rows_is_that_of_the_masks(rigl):
    path, result = rigl
    row = result.rows[-1]
    _, network = checkpoint.restore_network(path / "checkpoints")
    masks = masks_lib.named_leaves(network.masks)
    n_active = {k: int(masks[k].sum()) for k in ("fc1", "fc2")}
    assert n_active == {"fc1": 941, "fc2": 12}  # 4,704 and 60 less floor(0.8 n)
    assert row["density/fc1"] == 941 / 4704
    assert row["density/fc2"] == 12 / 60
    assert row["density"] == 953 / 4764
    for name, weights in (("fc1", "fc1"), ("fc2", "fc2")):
        kernel = network.params[weights]["kernel"]
        assert not kernel[~masks[name]].any()


def test_the_norm_after_a_rewire_is_that_of_its_row(rigl):
    for row in rigl[1].rows:
        if row["step"] in (3, 6, 9, 12):
            assert row["gradient_norm_after"] == row["gradient_norm"]


ONE_REWIRE = {
    "train__total_steps": 6,
    "train__log_every_steps": 1,
    "sparsity__begin_steps": 4,
    "sparsity__interval_steps": 100,
}


@pytest.fixture(scope="module")
def never(tmp_path_factory, _promotion) -> list[metrics.Row]:
    """The rows of the run that does not rewire."""
    root = tmp_path_factory.mktemp("never")
    return run(root, sparsity__rule="static", **ONE_REWIRE).rows


@pytest.mark.parametrize("timing", ["after", "instead"])
def test_the_norm_before_a_rewire_is_that_without_it(never, tmp_path, timing):
    fields = {"sparsity__rule": "rigl", "sparsity__timing": timing}
    rows = run(tmp_path, **fields, **ONE_REWIRE).rows
    (rewired,) = (row for row in rows if "gradient_norm_before" in row)
    # Timing 'instead' spends update 5, and the gradient step of update 4 comes first.
    step = 4
    assert rewired["step"] == (4 if timing == "after" else 5)
    expected = never[step]["gradient_norm"]
    assert rewired["gradient_norm_before"] == pytest.approx(expected, rel=1e-5)
    assert rewired["gradient_norm_after"] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "is_told"),
    [
        ({"sparsity__sparsity": 0.95}, True),
        ({"sparsity__sparsity": 0.95, "sparsity__dense_layers": "fc2"}, False),
        ({"sparsity__sparsity": 0.1}, False),
    ],
)
def test_classes_without_weights_are_told(tmp_path, caplog, fields, is_told):
    own = {"sparsity__rule": "static", "train__total_steps": 2, **fields}
    mask = masks_lib.named_leaves(run(tmp_path, **own).state.masks)["fc2"]
    lost = [] if mask is None else [i for i in range(10) if not mask[:, i].any()]
    assert bool(lost) == is_told
    told = [r.getMessage() for r in caplog.records if "classes" in r.getMessage()]
    assert bool(told) == is_told
    if told:
        assert f"{len(lost)} of the 10 classes without any weight in fc2" in told[0]
        assert f"({', '.join(map(str, lost))})" in told[0]
        assert "add fc2 to sparsity.dense_layers" in told[0]


def test_the_summary_counts_outputs_without_weights(tmp_path):
    fields = {"sparsity__sparsity": 0.95, "sparsity__rule": "static"}
    result = run(tmp_path, train__total_steps=2, **fields)
    model = run_cli.small_job(**fields).model
    table = report.summary("name", model, result.state, result.rows).splitlines()
    some = 0
    for name in ("fc1", "fc2"):
        mask = np.asarray(masks_lib.named_leaves(result.state.masks)[name])
        n = sum(not mask[:, i].any() for i in range(mask.shape[1]))
        some += n
        (line,) = (line for line in table if line.split()[:1] == [name])
        assert line.endswith(f" {n} of {mask.shape[1]}")
    assert some > 0


def test_the_file_holds_the_rows(rigl):
    path, result = rigl
    assert metrics.read(path / "metrics.jsonl") == result.rows


def test_checkpoints_come_as_often_as_asked(rigl):
    path, result = rigl
    assert checkpoint.steps_in(path / "checkpoints") == [0, 6, 12]
    _, network = checkpoint.restore_network(path / "checkpoints")
    for a, b in zip(
        jax.tree.leaves(network.params),
        jax.tree.leaves(result.state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def bits(result: Result) -> list[bytes]:
    leaves = jax.tree.leaves((result.state.params, result.state.masks))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def test_the_same_seed_gives_the_same_bits(rigl, tmp_path):
    again = run(tmp_path, sparsity__rule="rigl")
    assert bits(again) == bits(rigl[1])
    assert again.rows == rigl[1].rows


def test_another_seed_gives_another_run(rigl, tmp_path):
    other = run(tmp_path, seed=1, sparsity__rule="rigl")
    assert all(a != b for a, b in zip(_kernels(other), _kernels(rigl[1]), strict=True))
    assert [row["seed"] for row in other.rows] == [1] * len(rigl[1].rows)
    assert other.rows[0]["probe_loss"] != rigl[1].rows[0]["probe_loss"]


def _kernels(result: Result) -> list[bytes]:
    masks = [np.asarray(m).tobytes() for m in jax.tree.leaves(result.state.masks)]
    layers = masks_lib.layers(result.state.params).values()
    return masks + [np.asarray(k).tobytes() for k in layers]


def test_how_often_is_logged_changes_no_bit(rigl, tmp_path):
    fields = {"train__log_every_steps": 1, "train__checkpoint_every_steps": 5}
    other = run(tmp_path, sparsity__rule="rigl", eval__every_steps=0, **fields)
    assert bits(other) == bits(rigl[1])
    steps = {row["step"]: row for row in rigl[1].rows}
    for row in other.rows:
        if row["step"] in steps:
            shared = row.keys() & steps[row["step"]].keys()
            assert {k: row[k] for k in shared} == {
                k: steps[row["step"]][k] for k in shared
            }


def test_the_loss_falls(tmp_path):
    fields = {"model__widths": (32,), "optim__weight_decay": 0.0}
    fields |= {"train__total_steps": 150, "train__log_every_steps": 50}
    fields |= {"eval__every_steps": 0, "train__checkpoint_every_steps": 150}
    rows = run(tmp_path, **fields).rows
    assert rows[0]["probe_loss"] > 2.0
    assert rows[-1]["probe_loss"] < 0.5
    assert rows[0]["test_accuracy"] < 0.3
    assert rows[-1]["test_accuracy"] > 0.8


class Normalized(nn.Module):
    """Batch norm and dropout, as small as it goes."""

    n_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1)
        x = nn.relu(nn.Dense(5, name="fc1")(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.n_classes, name="fc2")(x)


NORMALIZED = {"model__name": "normalized", "model__widths": ()}


@pytest.fixture(scope="module")
def normalized(tmp_path_factory, _promotion) -> Iterator[tuple[Path, Result]]:
    root = tmp_path_factory.mktemp("normalized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "normalized", Normalized)
        yield root / "run", run(root, **NORMALIZED)


def test_batch_norm_and_dropout_pass_through(normalized, tmp_path):
    path, result = normalized
    stats = result.state.batch_stats["norm"]
    assert set(stats) == {"mean", "var"}
    assert np.abs(stats["mean"]).max() > 0
    _, first = checkpoint.restore_network(path / "checkpoints", 0)
    np.testing.assert_array_equal(first.batch_stats["norm"]["mean"], np.zeros(5))
    _, last = checkpoint.restore_network(path / "checkpoints")
    np.testing.assert_array_equal(last.batch_stats["norm"]["mean"], stats["mean"])
    # Their scale and bias are vectors: dense, and not decayed.
    assert masks_lib.named_leaves(result.state.masks)["norm/scale"] is None
    # The same run stopped in the middle: dropout, too, goes on as it was.
    half = run_cli.small_job(**NORMALIZED)
    paths = runs.RunPaths(tmp_path / "run")
    train([Run(half._replace(total_steps=6), paths, {"seed": 0})])
    (resumed,) = train([Run(half, paths, {"seed": 0})])
    assert bits(resumed) == bits(result)
    assert resumed.rows == result.rows


def test_statistics_come_with_the_weights_of_another_run(normalized):
    path, _ = normalized
    fields = NORMALIZED | {"sparsity__weights_from": str(path)}
    job = run_cli.small_job(1, sparsity__weights_step=12, **fields)
    _, last = checkpoint.restore_network(path / "checkpoints")
    found = job.make_network().batch_stats["norm"]["mean"]
    np.testing.assert_array_equal(found, last.batch_stats["norm"]["mean"])
