"""Which directory a run lives in: what changes its name, and what does not."""

import json

import pytest
import run_cli

from lottery_flow import config as config_lib
from lottery_flow import runs
from lottery_flow.build import flat_fields
from lottery_flow.errors import UserError

DEFAULT = flat_fields(config_lib.default())


def config_hash(**fields: object) -> str:
    own = {k.replace("__", "."): v for k, v in fields.items()}
    return runs.config_hash(DEFAULT | own, DEFAULT)


def test_flat_fields_are_ready_for_json():
    assert DEFAULT["optim.learning_rate"] == 0.05
    assert DEFAULT["train.seeds"] == [0]
    assert json.loads(json.dumps(DEFAULT)) == DEFAULT
    assert list(DEFAULT) == sorted(DEFAULT)


def test_references_are_resolved():
    config = run_cli.small_config()
    config.sparsity.weights_from = config.sparsity.get_ref("masks_from")
    config.sparsity.masks_from = "there"
    assert flat_fields(config)["sparsity.weights_from"] == "there"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "other"),
        ("data__dir", "/data"),
        ("train__seeds", [1, 2]),
        ("train__tensorboard", True),
        ("train__figure", False),
    ],
)
def test_fields_that_do_not_change_a_run_stay_out_of_the_hash(field, value):
    assert config_hash(**{field: value}) == config_hash()


@pytest.mark.parametrize("field", sorted(set(DEFAULT) - set(runs.UNHASHED)))
def test_every_other_field_changes_the_hash(field):
    assert config_hash(**{field: "something else"}) != config_hash()


def test_a_field_at_its_default_stays_out_of_the_hash():
    rate = DEFAULT["optim.learning_rate"]
    changed = config_hash(optim__learning_rate=0.3)
    assert config_hash(optim__learning_rate=rate) == config_hash() != changed


@pytest.mark.parametrize("fields", [{}, {"optim.learning_rate": 0.3}])
def test_a_new_option_changes_no_hash(fields):
    fields = DEFAULT | fields
    newer = {"optim.new_option": 7}
    before = runs.config_hash(fields, DEFAULT)
    assert runs.config_hash(fields | newer, DEFAULT | newer) == before


def test_the_hash_does_not_depend_on_the_order_of_the_fields():
    fields = DEFAULT | {"optim.learning_rate": 0.3, "model.name": "mlp"}
    other = dict(reversed(fields.items()))
    assert runs.config_hash(other, DEFAULT) == runs.config_hash(fields, DEFAULT)


def test_the_hash_is_the_same_in_every_release():
    """A run directory of today is found again by a later version."""
    assert config_hash() == "44136fa3"
    assert config_hash(optim__learning_rate=0.3, model__name="mlp") == "4737375a"


def test_the_place_of_a_run(tmp_path):
    paths = runs.run_paths(str(tmp_path), DEFAULT | {"name": "x"}, DEFAULT, 7)
    assert paths.root == tmp_path / f"x-{config_hash()}" / "seed_7"
    names = ["config.json", "metrics.jsonl", "checkpoints", "summary.txt"]
    found = [paths.config, paths.metrics, paths.checkpoints, paths.summary]
    assert [p.relative_to(paths.root).as_posix() for p in found] == names
    assert paths.done == paths.root / "DONE"
    assert not any(tmp_path.iterdir())


RECORD = {"seed": 0, "name": "x", "optim.learning_rate": 0.1, "data.dir": ""}


@pytest.fixture
def paths(tmp_path) -> runs.RunPaths:
    return runs.RunPaths(tmp_path / "x-00000000" / "seed_0")


def test_a_claimed_directory_says_what_it_holds(paths):
    runs.check(paths, RECORD)
    assert not paths.root.exists()
    runs.claim(paths, RECORD)
    assert json.loads(paths.config.read_text()) == RECORD
    runs.check(paths, RECORD)
    runs.claim(paths, RECORD)


@pytest.mark.parametrize(
    "change", [{"data.dir": "/data"}, {"name": "y"}, {"optim.new_option": 7}]
)
def test_a_run_goes_on_whatever_does_not_change_it(paths, change):
    runs.claim(paths, RECORD)
    before = run_cli.snapshot(paths.root)
    runs.check(paths, RECORD | change)
    runs.claim(paths, RECORD | change)
    assert run_cli.snapshot(paths.root) == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"optim.learning_rate": 0.2}])
def test_the_directory_of_another_run_is_refused(paths, change):
    runs.claim(paths, RECORD)
    (name,) = change
    with pytest.raises(UserError, match=f"{name} is {RECORD[name]} .*--workdir"):
        runs.check(paths, RECORD | change)


def test_an_old_run_without_a_new_field_is_not_of_another_value(paths):
    """A field that config.json does not know yet had its default there."""
    runs.claim(paths, RECORD)
    runs.check(paths, RECORD | {"optim.new_option": 0})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--workdir"):
        runs.claim(runs.RunPaths(tmp_path / "file" / "seed_0"), RECORD)
