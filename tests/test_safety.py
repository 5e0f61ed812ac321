"""Nothing that is read can execute code, and no name in it leads out of its place."""

import collections
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import run_cli
import safe_source
from safetensors.numpy import save as serialize

from experiments import compare, records, report
from lottery_flow import analyze, check, export, main, metrics, recorded, runs
from lottery_flow.analysis import lanczos, results, signal
from lottery_flow.config import default
from lottery_flow.data import digits, tfds_arrays
from lottery_flow.errors import UserError

SOURCES = [
    path
    for folder in ("lottery_flow", "experiments", "benchmarks", "configs")
    for path in sorted((run_cli.ROOT / folder).rglob("*.py"))
]
# A module of experiments by its name in EXPERIMENTS, not in a file.
# And files of configs/ by theirs, which are code.
ALLOWED = {
    "experiments/run.py": ["importlib.import_module"],
    "experiments/trainings.py": ["runpy"],
}


def test_no_source_executes_what_a_file_holds():
    assert len(SOURCES) > 100
    found = {}
    for path in SOURCES:
        name = str(path.relative_to(run_cli.ROOT))
        told = list(safe_source.dangers(path.read_text()))
        allowed = ALLOWED.get(name, [])
        told = [t for t in told if not t.endswith(tuple(allowed) or "-")]
        if told:
            found[name] = told
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "import yaml", "from joblib import load", "import marshal"),
        *("from importlib import import_module", "import shelve as s"),
        *("eval(text)", "exec(text)", "compile(x, 'f', 'exec')", "__import__(name)"),
        *("f = eval", "builtins = [exec]", "importlib.import_module(name)"),
        *("np.load(f)", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=x)"),
        *("read(f, allow_pickle=True)", "pd.read_pickle(f)", "torch.load(f)"),
        *("frame.eval(text)", "frame.query(text)", "os.system(text)"),
        *("subprocess.run(text, shell=True)", "tar.extractall(d)"),
        *("def f():\n    from pickle import loads", "class A:\n    x = eval('1')"),
    ],
)
def test_every_danger_is_seen(line):
    assert list(safe_source.dangers(line))


def test_what_is_no_danger():
    lines = [
        *("import json", "re.compile(x)", "model.eval()", "ast.literal_eval(x)"),
        *("np.load(f, allow_pickle=False)", "'eval(x)'", "json.loads(x)"),
    ]
    assert not list(safe_source.dangers("\n".join(lines)))


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
    with pytest.raises(UserError, match="damaged in line 1; mend or delete"):
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


# --- Exported networks that were made to do harm -------------------------------------


def made(tensors, shapes) -> bytes:
    """A file with a right checksum."""
    arrays = {k: np.asarray(v) for k, v in tensors.items()}
    about = {"shapes": json.dumps(shapes), "sha256": export._sha256(arrays)}
    return serialize(arrays, metadata=about)


VALUES, BITS = np.ones(3, np.float32), np.array([0b11100000], np.uint8)


def own(**changes):
    return {"params/w.values": VALUES, "params/w.mask": BITS} | changes


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        (own(), {"w": [2**40]}),  # terabytes
        (own(), {"w": [-3]}),
        (own(), {"w": [10**30]}),
        (own(), {"w": "3"}),
        (own(), {"w": [2]}),
        (own(), {"v": [3]}),
        (own(), ["w"]),
        (own(**{"params/w.mask": BITS.astype(np.float32)}), {"w": [3]}),
        (own(**{"other/w": VALUES}), {"w": [3]}),
        (own(**{"params/w/x": VALUES}), {"w": [3]}),  # a leaf in a leaf
    ],
)
def test_an_exported_network_that_does_not_fit_itself(tmp_path, tensors, shapes):
    path = tmp_path / "network"
    path.write_bytes(made(tensors, shapes))
    with pytest.raises(ValueError, match="is damaged, or no network"):
        export.load(path)


def test_names_in_an_exported_network_are_keys_and_no_paths(tmp_path):
    path = tmp_path / "folder" / "network"
    path.parent.mkdir()
    names = ("../../w", "/etc/w", "a\0b")
    path.write_bytes(made({f"params/{n}": VALUES for n in names}, {}))
    found = export.load(path)
    assert found.params[".."][".."]["w"].tolist() == [1, 1, 1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "network"]
    path.write_bytes(made(own(), {"w": [3]}))
    assert export.load(path).params["w"].tolist() == [1, 1, 1]


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
    names = ("DONE", "DONE.tmp", "x.csv", ".x.csv")
    for name in names:
        (folder / name).symlink_to(precious)
    runs.write_atomically(folder / "DONE", "done")
    results.save(folder / "x.csv", pd.DataFrame({"a": [1]}))
    assert precious.read_text() == "mine"
    assert (folder / "DONE").read_text() == "done"
    assert not any((folder / name).is_symlink() for name in names)


def test_a_run_in_a_directory_of_links(run, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("metrics.jsonl", "summary.txt", "figure.png", "DONE"):
        (run / name).unlink()
        for link in (name, f"{name}.tmp", f".{name}"):
            (run / link).symlink_to(precious if name != "DONE" else tmp_path / "gone")
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    assert start_again(run).status == 0
    assert precious.read_text() == "mine"
    assert not (tmp_path / "gone").exists()
    assert (run / "DONE").is_file()
    assert not (run / "DONE").is_symlink()


# --- The report ----------------------------------------------------------------------

HARM = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>&amp;'


def test_the_report_escapes_every_text(tmp_path, monkeypatch):
    name = "calibration"
    folder = tmp_path / name
    folder.mkdir()
    strings = {k: HARM for k in ("about", "command", "backend")}
    record = {
        **strings,
        "seeds": [HARM],
        "settings": {HARM: HARM},
        "versions": {HARM: HARM},
        "trainings": [{"training": HARM, "config": HARM, "file": HARM}],
    }
    (folder / "config.json").write_text(json.dumps(record))
    frame = pd.DataFrame({HARM: [HARM], "x": [1]})
    frame.to_csv(folder / f"{name}.csv", index=False)
    (folder / (HARM.replace("/", "") + ".png")).write_bytes(b"<script>")
    monkeypatch.setitem(report.paper.EXPECTED, name, HARM)
    monkeypatch.setattr(
        report, "load", lambda _: type("M", (), {"beside": lambda found: found[""]})
    )
    page = report.page(tmp_path)
    own = report._SCRIPT, report._STYLE
    for text in own:
        assert text in page
        page = page.replace(text, "")
    assert page.count("&lt;script&gt;") >= 12
    seen = Elements()
    seen.feed(page)
    assert seen.tags["script"] == 1  # its own, now empty
    assert seen.tags["img"] == 1
    assert {src[:22] for src in seen.attributes["src"]} == {"data:image/png;base64,"}
    assert not [name for name in seen.attributes if name.startswith("on")]


class Elements(HTMLParser):
    """How often each tag is there, and the values of each attribute."""

    def __init__(self):
        super().__init__()
        self.tags = collections.Counter()
        self.attributes = collections.defaultdict(list)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes[name].append(value)


def test_every_string_of_a_record_reaches_the_test_above():
    """A new field of a record that the page shows needs a line above."""
    source = Path(report.__file__).read_text()
    shown = set(re.findall(r"""(?:record|t)\[['"](\w+)['"]\]""", source))
    shown |= set(re.findall(r'"(\w+)"', source.partition("for k in (")[2][:60]))
    assert shown == {
        *("about", "command", "trainings", "training", "config", "file"),
        *("seeds", "settings", "versions", "backend"),
    }
