"""A user's mistake: status 2, one line that names it, and nothing lost on the disk."""

import gc
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint

# (what is wrong, config, fields, what the line on stderr must say)
BEFORE_TRAINING = [
    ("unknown_argument", "dense_mlp:smok", {}, "smok"),
    ("missing_file", "no_such_config", {}, "no_such_config"),
    ("unknown_field", "dense_mlp", {"optim__learning_rat": 1}, "learning_rat"),
    ("no_number", "dense_mlp", {"optim__learning_rate": "abc"}, "learning_rate.*abc"),
    ("no_integer", "dense_mlp", {"train__total_steps": 1.5}, "total_steps.*1.5"),
    ("rule", "dense_mlp", {"sparsity__rule": "rig"}, "sparsity.rule='rig'.*rigl"),
    ("model", "dense_mlp", {"model__name": "lenet"}, "model.name='lenet'.*lenet5"),
    ("data", "dense_mlp", {"data__name": "minst"}, "data.name='minst'.*mnist"),
    ("init", "dense_mlp", {"model__init": "he"}, "model.init='he'.*per_neuron"),
    ("fan", "dense_mlp", {"model__init_fan": "in"}, "init_fan='in'.*fan_in"),
    ("gain", "dense_mlp", {"model__init_gain": -1.0}, "init_gain=-1.0"),
    ("optimizer", "dense_mlp", {"optim__name": "sgd"}, "optim.name='sgd'.*adam"),
    ("schedule", "dense_mlp", {"optim__schedule": "x"}, "schedule='x'.*cosine"),
    ("distribution", "rigl_mlp", {"sparsity__distribution": "erk"}, "='erk'.*uniform"),
    ("sparsity_one", "rigl_mlp", {"sparsity__sparsity": 1.0}, "sparsity=1.0.*below 1"),
    ("sparsity_below", "rigl_mlp", {"sparsity__sparsity": -0.1}, "sparsity=-0.1"),
    ("sparsity_nan", "rigl_mlp", {"sparsity__sparsity": "nan"}, "sparsity=nan"),
    (
        "layer_keeps_nothing",
        "rigl_mlp",
        {"sparsity__layer_sparsity": "fc1=1.0"},
        "fc1.*1.0",
    ),
    ("layer_map", "rigl_mlp", {"sparsity__layer_sparsity": "fc1"}, "fc1.*name="),
    ("layer_twice", "rigl_mlp", {"sparsity__layer_sparsity": "fc1=0,fc1=0"}, "fc1"),
    ("layer_unknown", "rigl_mlp", {"sparsity__layer_sparsity": "fc9=.5"}, "fc9.*fc1"),
    ("dense_unknown", "rigl_mlp", {"sparsity__dense_layers": "fc9"}, "fc9.*fc1"),
    ("all_dense", "rigl_mlp", {"sparsity__dense_layers": "fc1,fc2,fc3"}, "sparsity"),
    ("interval", "rigl_mlp", {"sparsity__interval_steps": 0}, "interval_steps=0"),
    ("drop", "rigl_mlp", {"sparsity__drop_fraction": 1.5}, "drop_fraction=1.5"),
    ("timing", "rigl_mlp", {"sparsity__timing": "before"}, "timing='before'.*after"),
    (
        "end_before_begin",
        "rigl_mlp",
        {"sparsity__begin_steps": 9, "sparsity__end_steps": 5},
        "end_steps=5.*begin_steps=9",
    ),
    ("prune_forever", "prune_mlp", {"sparsity__end_steps": -1}, "end_steps=-1"),
    ("prune_twice", "prune_mlp", {"sparsity__masks_from": "run"}, "masks_from='run'"),
    ("rate_zero", "dense_mlp", {"optim__learning_rate": 0.0}, "learning_rate=0.0"),
    ("rate_nan", "dense_mlp", {"optim__learning_rate": "nan"}, "learning_rate=nan"),
    ("momentum", "dense_mlp", {"optim__momentum": 1.0}, "momentum=1.0"),
    ("decay", "dense_mlp", {"optim__weight_decay": "inf"}, "weight_decay=inf"),
    ("warmup", "dense_mlp", {"optim__warmup_steps": 99_999}, "warmup_steps=99999"),
    ("warmup_lr", "rigl_mlp", {"optim__warmup_steps": 5}, "warmup_steps=5.*cosine"),
    (
        "schedule",
        "dense_mlp",
        {"optim__schedule_steps": 5},
        "schedule_steps=5.*total_steps=11719",
    ),
    ("no_steps", "dense_mlp", {"train__total_steps": 0}, "total_steps=0"),
    ("no_seed", "dense_mlp", {"train__seeds": "()"}, "seeds=()"),
    ("seed_below", "dense_mlp", {"train__seeds": "(0,-1)"}, "seed.*-1"),
    ("seed_twice", "dense_mlp", {"train__seeds": "(3,3)"}, "seeds.*3"),
    ("seed_fraction", "dense_mlp", {"train__seeds": "(0.5,)"}, "seed.*0.5"),
    ("seed_text", "dense_mlp", {"train__seeds": "('a',)"}, "seed.*a"),
    ("seed_huge", "dense_mlp", {"train__seeds": f"({2**70},)"}, "seed.*1180591"),
    ("batch", "dense_mlp", {"train__batch_size": 60_001}, "batch_size=60001.*60000"),
    ("probe", "dense_mlp", {"train__probe_examples": 60_001}, "probe_examples=60001"),
    ("widths_count", "dense_lenet5", {"model__widths": "(6,16)"}, "widths=.*6, 16"),
    ("widths_zero", "dense_mlp", {"model__widths": "(8,0)"}, "widths=.*8, 0"),
    ("widths_float", "dense_mlp", {"model__widths": "(8.5,8)"}, "widths=.*8.5"),
    (
        "milestones",
        "dense_mlp",
        {"optim__milestone_steps": "(3,)"},
        r"milestone_steps=\(3,\).*'cosine' needs none",
    ),
    (
        "falling_milestones",
        "dense_resnet50",
        {"optim__milestone_steps": "(30,20)"},
        r"milestone_steps=\(30, 20\): give rising",
    ),
    (
        "smoothing",
        "dense_mlp",
        {"loss__label_smoothing": 1.0},
        r"label_smoothing=1\.0: give a fraction",
    ),
    ("width", "dense_mlp", {"model__width": 0.5}, r"width=0\.5: mlp has no"),
    ("norm", "dense_lenet5", {"model__norm": "layer"}, "norm='layer'.*fixup"),
    (
        "no_norm",
        "dense_lenet5",
        {"model__norm": "fixup", "model__init": "module"},
        "norm='fixup': lenet5 has no such choice",
    ),
    (
        "lowering",
        "dense_mlp",
        {"model__lowering": "patches"},
        "lowering='patches': mlp has no",
    ),
    (
        "module_gain",
        "dense_mlp",
        {"model__init": "module", "model__init_gain": 2.0},
        r"init_gain=2\.0: model\.init='module' has",
    ),
    (
        "redrawn",
        "dense_mlp",
        {"model__name": "vgg16", "model__kernel_init": "delta_orthogonal"},
        "kernel_init='delta_orthogonal'.*model.init=module",
    ),
    (
        "redrawn_fixup",
        "dense_mlp",
        {"model__name": "resnet20", "model__norm": "fixup"},
        "norm='fixup'.*model.init=module",
    ),
    (
        "patch",
        "dense_mlp",
        {"model__name": "vit_s16"},
        "vit_s16: patch=16 does not divide images of 28 x 28",
    ),
    ("stray", "dense_mlp", {"train__log_every_steps": 0}, "log_every_steps=0"),
    ("masks", "rigl_mlp:smoke", {"sparsity__masks_from": "none"}, "masks_from='none'"),
    (
        "weights",
        "rigl_mlp:smoke",
        {"sparsity__weights_from": "none"},
        "weights_from='none'",
    ),
    ("no_data", "dense_mlp", {"data__dir": "none"}, "mnist.*none.*prepare"),
]


def assert_one_line(outcome: run_cli.Outcome, pattern: str) -> None:
    assert outcome.status == 2
    assert "Traceback" not in outcome.stderr
    assert len(outcome.errors) == 1, outcome.stderr
    # Nothing follows but the line: what is logged before it has a time in front.
    rest = [k for k in outcome.stderr.splitlines() if not re.match(r"\d\d:\d\d:", k)]
    assert rest == outcome.errors
    assert re.search(pattern, outcome.errors[0]), outcome.errors[0]


@pytest.mark.parametrize(
    ("config", "fields", "pattern"),
    [row[1:] for row in BEFORE_TRAINING],
    ids=[row[0] for row in BEFORE_TRAINING],
)
def test_a_mistake_is_told_before_anything_is_written(
    tmp_path, config, fields, pattern
):
    workdir = tmp_path / "runs"
    outcome = run_cli.in_process(*run_cli.flag_list(config, workdir, **fields))
    assert_one_line(outcome, pattern)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--config=configs/dense_mlp.py:smok"], "smok"),
        (["--config=configs/none.py"], "none.py"),
        (["--confi=configs/dense_mlp.py"], "confi"),
        ([], "--config"),
        (["--config=configs/dense_mlp.py", "x"], "'x'"),
    ],
)
def test_the_command_line_in_a_process_of_its_own(tmp_path, args, pattern):
    outcome = run_cli.subprocess_run(*args, f"--workdir={tmp_path / 'runs'}")
    assert_one_line(outcome, pattern)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The work directory of a finished run, which no test changes."""
    workdir = tmp_path_factory.mktemp("errors") / "runs"
    assert run_cli.in_process(*flags_of(workdir)).status == 0
    return workdir


@pytest.fixture
def workdir(finished, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "runs")


def flags_of(workdir: Path, **fields: object) -> list[str]:
    small = {"model__widths": "(12,)", "train__figure": False}
    return run_cli.flag_list("scratch_mlp:smoke", workdir, **small | fields)


def fails_and_changes_nothing(workdir: Path, pattern: str, **fields: object) -> None:
    before = run_cli.snapshot(workdir)
    outcome = run_cli.in_process(*flags_of(workdir, **fields))
    assert_one_line(outcome, pattern)
    assert run_cli.snapshot(workdir) == before


@pytest.mark.parametrize("what", ["masks", "weights"])
def test_a_step_that_the_other_run_does_not_have(finished, what):
    source = {f"sparsity__{what}_from": run_cli.run_directory(finished)}
    source[f"sparsity__{what}_step"] = 7
    pattern = rf"sparsity.{what}_from=.*step 7.*0, 6, 12"
    fails_and_changes_nothing(finished, pattern, **source)


@pytest.mark.parametrize("what", ["masks", "weights"])
def test_a_run_of_another_model(finished, what):
    source = {f"sparsity__{what}_from": run_cli.run_directory(finished)}
    pattern = rf"sparsity.{what}_from=.*fc1.*784, 12.*784, 9"
    fails_and_changes_nothing(finished, pattern, model__widths="(9,)", **source)


def test_a_run_directory_with_another_configuration(workdir):
    path = run_cli.run_directory(workdir) / "config.json"
    record = json.loads(path.read_text()) | {"optim.learning_rate": 0.7}
    path.write_text(json.dumps(record))
    fails_and_changes_nothing(workdir, r"learning_rate is 0.7 .*0.2 .*--workdir")


def test_a_run_directory_copied_to_another_name(workdir):
    other = workdir.parent / "other"
    fields = {"optim__learning_rate": 0.1}
    assert run_cli.in_process(*flags_of(other, **fields)).status == 0
    right, wrong = run_cli.run_directory(other), run_cli.run_directory(workdir)
    shutil.rmtree(right)
    shutil.copytree(wrong, right)
    fails_and_changes_nothing(other, "learning_rate is 0.2 .*0.1", **fields)


def test_a_seed_directory_copied_to_another_seed(workdir):
    run = run_cli.run_directory(workdir)
    shutil.copytree(run, run.with_name("seed_1"))
    fails_and_changes_nothing(workdir, "seed is 0 .*1", train__seeds="(1,)")


def test_every_directory_is_checked_before_the_first_run_starts(workdir):
    run = run_cli.run_directory(workdir)
    shutil.copytree(run, run.with_name("seed_1"))
    fails_and_changes_nothing(workdir, "seed is 0 .*1", train__seeds="(2,1)")


def test_an_unreadable_configuration(workdir):
    path = run_cli.run_directory(workdir) / "config.json"
    path.write_text(path.read_text()[:50])
    fails_and_changes_nothing(workdir, "config.json.*--workdir")


def test_a_file_in_the_place_of_the_work_directory(tmp_path):
    (tmp_path / "runs").write_text("mine")
    outcome = run_cli.in_process(*flags_of(tmp_path / "runs"))
    assert_one_line(outcome, "--workdir.*runs")
    assert (tmp_path / "runs").read_text() == "mine"


def unfinish(workdir: Path) -> Path:
    run = run_cli.run_directory(workdir)
    (run / "DONE").unlink()
    return run


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 3, 2 * len(data) // 3):
        data[i] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture
def _dropped_coroutines():
    """orbax drops coroutines when a read fails: in this test, not in a later one."""
    yield
    gc.collect()


def damaged(test):
    ignored = "ignore::pytest.PytestUnraisableExceptionWarning"
    test = pytest.mark.filterwarnings(ignored)(test)
    return pytest.mark.usefixtures("_dropped_coroutines")(test)


def goes_on_from_the_one_before(workdir: Path, finished: Path, start) -> None:
    """With a warning, the same bits, and the damaged checkpoint kept."""
    run, whole = (run_cli.run_directory(w) for w in (workdir, finished))
    outcome = start(*flags_of(workdir))
    assert outcome.status == 0, outcome.stderr
    warned = [line for line in outcome.stderr.splitlines() if "step 12 in" in line]
    assert len(warned) == 1, outcome.stderr
    assert re.search(
        r"step 12 in .*seed_0/checkpoints (cannot be read|is damaged) \(.+\); going on "
        r"from that of step 6, and keeping it as 12\.damaged",
        warned[0],
    )
    for name in "metrics.jsonl", "summary.txt", "DONE":
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    mine, theirs = (
        checkpoint.restore_network(r / "checkpoints")[1] for r in (run, whole)
    )
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {"0", "6", "12", "12.damaged"}


@damaged
@pytest.mark.parametrize(
    ("spoil", "item"), [(truncate, "network"), (flip, "training"), (Path.unlink, "*")]
)
def test_a_damaged_newest_checkpoint(workdir, finished, spoil, item):
    newest = unfinish(workdir) / "checkpoints" / "12"
    for path in newest.glob(f"{item}/**/d/*"):
        spoil(path)
    goes_on_from_the_one_before(workdir, finished, run_cli.in_process)


@damaged
@pytest.mark.parametrize("item", ["network", "training", "record"])
def test_a_newest_checkpoint_that_lacks_an_item(workdir, finished, item):
    run = unfinish(workdir)
    shutil.rmtree(run / "checkpoints" / "12" / item)
    goes_on_from_the_one_before(workdir, finished, run_cli.in_process)


def test_a_damaged_checkpoint_in_a_process_of_its_own(workdir, finished):
    for path in (unfinish(workdir) / "checkpoints" / "12").glob("network/**/d/*"):
        truncate(path)
    goes_on_from_the_one_before(workdir, finished, run_cli.subprocess_run)


@damaged
def test_no_undamaged_checkpoint_is_left(workdir):
    for path in (unfinish(workdir) / "checkpoints").glob("*/training/**/d/*"):
        flip(path)
    fails_and_changes_nothing(workdir, r"no undamaged checkpoint .*12 .*6 .*start over")


@damaged
def test_a_damaged_checkpoint_that_is_asked_for(finished, workdir):
    """Masks come from the step that was meant, or from none."""
    run = run_cli.run_directory(workdir)
    flip(run / "checkpoints" / "12" / "record" / "metadata")
    for step in 12, -1:
        source = {"sparsity__masks_from": run, "sparsity__masks_step": step}
        pattern = r"masks_from=.*step 12 .*is damaged .*move .*checkpoints/12 away"
        fails_and_changes_nothing(finished, pattern, **source)


def test_a_newest_checkpoint_that_was_moved_away(workdir, finished):
    run = unfinish(workdir)
    shutil.move(run / "checkpoints" / "12", workdir.parent / "12")
    assert run_cli.in_process(*flags_of(workdir)).status == 0
    whole = run_cli.run_directory(finished)
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_metrics_that_are_damaged_in_the_middle(workdir):
    path = unfinish(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "rubbish\n", *lines[2:]]))
    fails_and_changes_nothing(workdir, "metrics.jsonl")


def test_a_loss_that_is_not_finite(tmp_path):
    workdir = tmp_path / "runs"
    fields = {"optim__learning_rate": 1e20, "optim__schedule": "constant"}
    args = flags_of(workdir, train__checkpoint_every_steps=1, **fields)
    outcome = run_cli.in_process(*args)
    assert_one_line(outcome, r"(nan|inf) at step \d+.*learning_rate.*step \d+ is kept")
    run = run_cli.run_directory(workdir)
    assert not (run / "DONE").exists()
    kept = int(re.search(r"checkpoint of step (\d+)", outcome.errors[0])[1])
    assert kept == checkpoint.steps_in(run / "checkpoints")[-1]
    for step in checkpoint.steps_in(run / "checkpoints"):
        assert checkpoint.restore_network(run / "checkpoints", step)[0] == step
    again = run_cli.in_process(*args)
    assert again.errors == outcome.errors
