"""Any configuration trains, or is told in one sentence: never a trace, a hang, a file.

The long search: `pytest -m faults tests/test_bad_input.py`.
"""

import json
import re
import sys
import time
from pathlib import Path

import bad_input
import jax
import pytest
import run_cli
import search_input
import try_input

from lottery_flow import check, check_kinds, command_errors, flops, main, memory
from lottery_flow.errors import UserError

SMALL = ("--config.model.name=mlp",)


def search(n_examples: int, n_trained: int, timeout: float) -> dict[str, int]:
    """The counts of `search_input`, which finds no fault."""
    sizes = f"--examples={n_examples}", f"--trained={n_trained}"
    printed = run_cli.script(search_input, *sizes, timeout=timeout)
    return json.loads(printed.splitlines()[-1])


def test_a_hundred_and_fifty_configurations_are_trained_or_told():
    counts = search(150, 1, timeout=600)
    assert counts["tried"] == 150
    assert counts["accepted"] > 10
    assert counts["rejected"] > 50


@pytest.mark.faults
def test_thousands_of_configurations_are_trained_or_told(record_property):
    counts = search(2000, 40, timeout=3600)
    assert counts["tried"] >= 2000
    assert counts["accepted"] > 150
    assert counts["rejected"] > 1000
    assert counts["trained"] > 30
    record_property(
        "long",
        f"Of {counts['tried']:,} configurations drawn at random (other kinds, "
        "extremes, nothing, unicode, conflicts; as values and as flags) "
        f"{counts['rejected']:,} were refused in one sentence that names the field, "
        f"{counts['accepted']:,} were built, and {counts['trained']} of those trained; "
        "none ended in a trace, a hang or a directory that it should not have made.",
    )


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "cwd").mkdir()
    return tmp_path


NONE = bad_input.Input({}, {"optim.momentum": None}, [], "")


def test_the_search_finds_exceptions(directory, monkeypatch):
    assert search_input.guarded(try_input.try_one, NONE, directory) == (None, "", "")
    monkeypatch.setattr(check_kinds, "fields", lambda config: None)
    _, kind, told = search_input.guarded(try_input.try_one, NONE, directory)
    assert "Error at" in kind
    assert "momentum" in told


def test_the_search_finds_what_is_left_behind(directory, monkeypatch):
    def leaves(config):
        (directory / "cwd" / "runs").mkdir()
        fields(config)

    fields = check.fields
    monkeypatch.setattr(check, "fields", leaves)
    example = NONE._replace(values={"optim.momentum": 2.0})
    _, kind, _ = search_input.guarded(try_input.try_one, example, directory)
    assert kind.startswith("left behind")


def test_the_search_finds_a_hang(directory):
    def hangs(example, directory):
        time.sleep(60)

    assert search_input.guarded(hangs, NONE, directory, 1)[1].startswith("Hang at")


@pytest.mark.parametrize(
    ("stderr", "fault"),
    [
        ("Traceback\nerror: optim.momentum=None: give a number\n", "not one line"),
        ("error: optim.momentum=None: give\na number\n", "not one line"),
        ("error: optim.momentum=\0: give a number\n", "strange"),
        ("error: optim.momentum=" + "9" * 2000 + ": give a number\n", "strange"),
        ("error: momentum is wrong; give a number\n", "names none of"),
        ("error: optim.momentum=None is no number\n", "no remedy"),
        ("", "not one line"),
    ],
)
def test_what_is_no_clear_sentence(stderr, fault):
    with pytest.raises(try_input.Fault, match=fault):
        try_input.judge(run_cli.Outcome(2, "", stderr), NONE)
    with pytest.raises(try_input.Fault, match="status"):
        try_input.judge(run_cli.Outcome(1, "", stderr), NONE)


def told(args: list[str], tmp_path: Path, module=main) -> str:
    """The one line that a start ends with, which writes nothing."""
    before = run_cli.snapshot(tmp_path)
    workdir = [f"--workdir={tmp_path / 'runs'}"] if module is main else []
    outcome = run_cli.in_process(*args, *workdir, module=module)
    assert outcome.status == 2
    assert outcome.stderr.count("\n") == 1
    assert run_cli.snapshot(tmp_path) == before
    return outcome.stderr


HEAD = "from lottery_flow.config import default\ndef get_config():\n    c = default()\n"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (HEAD + "    c.optim.momentum = 'x'\n    return c", "line 4.*momentum"),
        (HEAD + "    1 / 0", "line 4 .*ZeroDivisionError"),
        (HEAD + "    return c +", "line 4 .*SyntaxError"),
        (HEAD + "    raise KeyError('x')", "line 4 .*KeyError"),
        ("import no_such_module_here", "line 1 .*ModuleNotFoundError"),
        ("x = 1", "get_config"),
        (HEAD + "    return {}", "--config: .*start from"),
        (HEAD + "    return type(c)()", "--config: .*start from"),
        (HEAD + "    del c.optim.momentum\n    return c", "optim.momentum is missing"),
        (HEAD + "    c.optim.x = 1\n    return c", "optim.x is not a field"),
        (HEAD + "    c.optim = None\n    return c", "optim=None is a group"),
        (HEAD + "    c.optim.momentum = None\n    return c", "optim.momentum=None"),
        (HEAD + "    c.train.seeds = [[]]\n    return c", "train.seeds=.*whole"),
        ("\0\1", "--config"),
    ],
)
@pytest.mark.parametrize("module", [main, flops])
def test_a_file_that_is_no_configuration(tmp_path, text, pattern, module):
    path = tmp_path / "config.py"
    path.write_text(text)
    sys.modules.pop("config_config", None)  # a file is loaded over the last one
    line = told([f"--config={path}"], tmp_path, module)
    assert re.search(pattern, line), line


def test_a_file_that_returns_nothing(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(HEAD)
    outcome = run_cli.in_process(f"--config={path}")
    assert outcome.errors == [
        "error: --config: get_config returned None; end it with return config"
    ]


@pytest.mark.parametrize(
    ("flag", "pattern"),
    [
        ("name=" + "a" * 300, "name='aaa.*up to 100 letters"),
        ("model.widths[0]=3", r"model\.widths\[0\] is not a field; .*model\.widths"),
        ("optim=3", "optim is not a field; there are .*optim.name"),
        ("optim.momentum=x", "momentum=x: give a number, such as 0.9"),
        ("train.total_steps=1e3", "total_steps=1e3: give a whole number"),
        ("model.remat=maybe", "remat=maybe: give True or False"),
        ("data.name=huggingface:x", "data.name='huggingface:x' is unknown"),
        ("data.name=mnist/data_dir=x", "data.name='mnist/data_dir=x' is unknown"),
        ("data.name=/etc", "data.name='/etc' is unknown"),
        ("data.dir=\0", "data.dir=.*printable"),
        ("optim.learning_rate=1e300", r"learning_rate=1e\+300.*3.4e\+38"),
        ("optim.learning_rate=1e-300", "learning_rate=1e-300.*1.2e-38"),
        ("train.total_steps=2000000000", "total_steps=2000000000: give at most"),
        ("train.seeds=(4294967296,)", r"seeds=.*2\^32"),
        ("tickets.rounds=-1", "tickets.rounds=-1"),
        ("tickets.level=1", "tickets.level=1.*leave it at 0"),
        ("tickets.treatment_options=x=1", "treatment_options: x is no option"),
        ("sparsity.masks_step=-2", "masks_step=-2"),
        ("sparsity.penalty_warmup_steps=-1", "penalty_warmup_steps=-1"),
        ("model.widths=(99999999,)", "model.widths.*parameters.*smaller"),
        ("eval.batch_size=2000000000", "eval.batch_size=2000000000.*GB.*fewer"),
        ("data.workers=99999", "data.workers=99999: give at most"),
    ],
)
def test_values_that_used_to_end_in_a_trace(tmp_path, flag, pattern, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 16 * 10**9)
    config = run_cli.ROOT / "configs" / "quickstart.py"
    line = told([f"--config={config}", *SMALL, f"--config.{flag}"], tmp_path)
    assert re.search(pattern, line), line


def test_memory_that_is_not_there(monkeypatch):
    batches = {"train.batch_size": 1000}
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    memory.check(10**7, 1000, batches, 1)
    memory.check(10**8, 1000, batches, 2)  # cut along two devices
    with pytest.raises(UserError, match=r"100,000,000 parameters.* 1 GB, so give a"):
        memory.check(10**8, 1000, batches, 1)
    with pytest.raises(UserError, match=r"batch_size=1000 images.*give fewer"):
        memory.check(10**7, 10**7, batches, 1)
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.check(10**18, 10**9, batches, 1)


def test_a_device_without_room_is_told(tmp_path, monkeypatch):
    def full(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 1 byte")

    monkeypatch.setattr(main, "main", full)
    line = told([f"--config={run_cli.ROOT / 'configs' / 'quickstart.py'}"], tmp_path)
    assert "not enough memory (RESOURCE_EXHAUSTED" in line
    assert not command_errors.is_memory(RuntimeError("another"))


@pytest.mark.parametrize(
    ("rule", "text", "pattern"),
    [
        ("han_pruning", "quality=x", "give quality=a number"),
        ("han_pruning", "quality=1e400", "give quality=a number"),
        ("han_pruning", "quality=9e99", "give quality=a number"),
        ("han_pruning", "is_due=1,quality=1", "is_due is no option"),
        ("snfs", "redistribute=2", "redistribute=True or False"),
        ("snfs", "timing=before", "timing=after or instead"),
        ("dsr", "n_prune=1.5", "n_prune=a whole number"),
        ("rigl", "granularity=1", "granularity is no option"),
        ("rigl", "timing=before", "timing=after or instead"),
        ("rigl", "x=" + "(" * 999, "x is no option"),
    ],
)
def test_options_of_another_kind(tmp_path, rule, text, pattern):
    config = run_cli.ROOT / "configs" / "quickstart.py"
    flags = [f"--config.sparsity.rule={rule}", f"--config.sparsity.rule_options={text}"]
    line = told([f"--config={config}", *SMALL, *flags], tmp_path)
    assert re.search(f"sparsity.rule_options.*{pattern}", line), line
