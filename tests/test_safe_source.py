"""No source of ours executes what a file holds."""

import pytest
import run_cli
import safe_source

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
