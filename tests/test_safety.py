"""Nothing that is read can execute code, and no name in it leads out of its place."""

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import run_cli

from experiments import compare, records
from lottery_flow import analyze, check, export, files, main, metrics, recorded, runs
from lottery_flow.analysis import lanczos, results, signal
from lottery_flow.config import default
from lottery_flow.data import digits, tfds_arrays
from lottery_flow.errors import UserError

# --- Files that would do harm --------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """What a bomb makes; it must not be there at the end."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))  # it does work
    path.rmdir()
    yield path
    assert not path.exists()


def bombs(marker) -> dict[str, bytes]:
    """Files of all kinds with a bomb in them."""
    raw = pickle.dumps(Bomb(marker))
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    member, zipped = io.BytesIO(), io.BytesIO()
    np.savez(member, x=np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("x.npy", raw)
    deep = b"[" * 100_000
    code = f"__import__('os').mkdir({str(marker)!r})".encode()
    tagged = f'!!python/object/apply:os.mkdir ["{marker}"]\n'.encode()
    return {
        "pickle": raw,
        "npy": objects.getvalue(),
        "npz": member.getvalue(),
        "npz of pickles": zipped.getvalue(),
        "deep": deep,
        "python": code,
        "yaml": tagged,
        "list": b"[1]",
        "nothing": b"",
        "binary": bytes(range(256)),
    }


KINDS = tuple(bombs(Path("x")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A work directory with a finished run."""
    workdir = tmp_path_factory.mktemp("safety") / "runs"
    flags = run_cli.flag_list("scratch_mlp:smoke", workdir, model__widths="(6,)")
    assert run_cli.in_process(*flags).status == 0
    return workdir


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """The directory of a copy of that run, to be spoilt."""
    return run_cli.run_directory(shutil.copytree(finished, tmp_path / "runs"))


def one_line(outcome: run_cli.Outcome, pattern: str) -> None:
    assert outcome.status == 2, outcome.stderr
    (line,) = outcome.errors
    assert "Traceback" not in outcome.stderr
    assert re.search(pattern, line), line


def start_again(run: Path) -> run_cli.Outcome:
    workdir = run.parents[1]
    return run_cli.in_process(
        *run_cli.flag_list("scratch_mlp:smoke", workdir, model__widths="(6,)")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_as_the_configuration_of_a_run(run, kind, marker):
    (run / "config.json").write_bytes(bombs(marker)[kind])
    one_line(start_again(run), "config.json is not a readable configuration")
    rerun = run_cli.in_process(f"--rerun={run}", f"--workdir={run.parents[1] / 'x'}")
    one_line(rerun, "config.json cannot be read; give the seed_N directory")
    asked = run_cli.in_process("gradient_flow", f"--run={run}", module=analyze)
    one_line(asked, "config.json cannot be read; give the seed_N directory")
    with pytest.raises(SystemExit, match=r"config.json cannot be read"):
        compare.collect([run])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_as_the_rows_of_a_run(run, kind, marker):
    path = run / "metrics.jsonl"
    path.write_bytes(bombs(marker)[kind] + b"\n")
    with pytest.raises(UserError, match="damaged in line 1; mend that line, or bring"):
        metrics.read(path)
    (run / "DONE").unlink()
    one_line(start_again(run), "metrics.jsonl is damaged in line 1")


@pytest.mark.parametrize("kind", ["pickle", "npy", "npz", "deep", "python", "yaml"])
def test_a_bomb_in_every_file_of_a_checkpoint(run, kind, marker):
    """Each is damaged, and none of them executes anything."""
    content = bombs(marker)[kind]
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(content)
    (run / "DONE").unlink()
    one_line(start_again(run), "no undamaged checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_as_an_exported_network(tmp_path, kind, marker):
    path = tmp_path / "network"
    path.write_bytes(bombs(marker)[kind])
    with pytest.raises(ValueError, match=f"{path} is damaged, or no .* anew"):
        export.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_as_the_arrays_of_an_analysis(tmp_path, kind, marker):
    path = tmp_path / "found.npz"
    path.write_bytes(bombs(marker)[kind])
    with pytest.raises(
        ValueError,
        match=f"{path} (is damaged, or|holds the fields x;)",
    ):
        results.load(path, signal.SignalPropagation)
    with pytest.raises(ValueError, match=f"{path} is damaged; move it away"):
        lanczos._kept(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_as_the_cache_of_a_data_set(tmp_path, kind, marker, caplog):
    path = tmp_path / "mnist.npz"
    path.write_bytes(bombs(marker)[kind])
    assert tfds_arrays._read_cache(path, b"", digits.SPEC) is None
    assert "damaged cache" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_as_kept_rows(tmp_path, kind, marker):
    path = tmp_path / "kept.jsonl.gz"
    path.write_bytes(bombs(marker)[kind])
    if kind == "nothing":
        assert records._read(path) == {}
        return
    with pytest.raises(UserError, match=f"{path} is damaged; bring it back"):
        records._read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_as_an_answer_that_was_found_before(tmp_path, kind, marker):
    path = tmp_path / "top.json"
    path.write_bytes(bombs(marker)[kind])
    assert not analyze._done(tmp_path / "top", {})


def test_features_that_name_code_of_others(tmp_path, write_tfds_features, marker):
    """TFDS would import the module that they name."""
    (tmp_path / "harm.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    write_tfds_features(tmp_path / "mnist" / "3.0.1", "harm.Feature")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=r"asks for the code of 'harm.Feature'"):
            tfds_arrays.prepared_builder("mnist", str(tmp_path))


@pytest.fixture
def write_tfds_features():
    def write(folder, name):
        folder.mkdir(parents=True)
        inner = {"pythonClassName": name, "x": {}}
        own = {"featuresDict": {"features": {"image": inner}}}
        own["pythonClassName"] = "tensorflow_datasets.core.features.FeaturesDict"
        (folder / "features.json").write_text(json.dumps(own))

    return write


# --- Paths ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/x", "a/b", "../x", "x/../../y", "a\\b", "a\nb", "-x", "~"]
)
def test_no_name_of_a_configuration_leads_out_of_the_work_directory(name):
    config = default()
    config.name = name
    with pytest.raises(UserError, match="name="):
        check.fields(config)


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("name", "../../away", "name='../../away' cannot name a directory"),
        ("name", ["x"], r"name=\('x',\): give a text"),
        ("seed", "../../../away", "config.json is damaged"),
        ("seed", -1, "seeds"),
        ("seed", True, "config.json is damaged"),
        ("optim.learning_rate", "x", "config.json: optim.learning_rate='x'"),
        ("optim.learning_rate", {"a": 1}, "config.json: optim.learning_rate="),
        ("train.seeds", ["../x"], "config.json: train.seeds="),
        ("environment", [], "config.json is damaged"),
        ("no.field", 1, "no.field is not a field"),
        ("optim", 1, "optim is not a field"),
    ],
)
def test_a_record_that_was_made_to_do_harm(run, tmp_path, field, value, pattern):
    """Trained again, it writes nowhere but in the work directory."""
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    before = run_cli.snapshot(tmp_path)
    workdir = tmp_path / "deep" / "in" / "here"
    outcome = run_cli.in_process(f"--rerun={run}", f"--workdir={workdir}", module=main)
    one_line(outcome, pattern)
    assert run_cli.snapshot(tmp_path) == before


def test_the_seed_in_a_template_is_a_number(run):
    record = recorded.read(run)
    fields = main.flat_fields(record.config)
    paths = runs.run_paths("w", fields, fields, 3)
    assert paths.root.parts[-1] == "seed_3"
    config = record.config
    with config.unlocked():
        config.train.seeds = (5,)
        config.sparsity.masks_from = "{seed}/{seed.__class__}/{0}"
    with pytest.raises(UserError, match=r"masks_from='5/\{seed.__class__\}/\{0\}'"):
        main.build(config, 5).make_network()


def test_what_a_link_points_to_is_not_overwritten(tmp_path):
    """A run directory may come from others, with links in it."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    names = ("DONE", ".partial-DONE", "x.csv", ".partial-x.csv")
    for name in names:
        (folder / name).symlink_to(precious)
    files.write(folder / "DONE", "done")
    results.save(folder / "x.csv", pd.DataFrame({"a": [1]}))
    assert precious.read_text() == "mine"
    assert (folder / "DONE").read_text() == "done"
    assert not any((folder / name).is_symlink() for name in names)


def test_a_run_in_a_directory_of_links(run, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("metrics.jsonl", "summary.txt", "figure.png", "DONE"):
        (run / name).unlink()
        for link in (name, f".partial-{name}"):
            (run / link).symlink_to(precious if name != "DONE" else tmp_path / "gone")
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    assert start_again(run).status == 0
    assert precious.read_text() == "mine"
    assert not (tmp_path / "gone").exists()
    assert (run / "DONE").is_file()
    assert not (run / "DONE").is_symlink()
