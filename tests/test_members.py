"""Which members a configuration has."""

import itertools
from pathlib import Path

import pytest
import run_cli

from lottery_flow.errors import UserError
from lottery_flow.members import members


def test_every_combination_is_a_member():
    vary = "model.init=masked_dense|per_neuron; optim.learning_rate=0.1|0.2|0.3"
    config = run_cli.small_config(train__seeds=(4, 2), train__vary=vary)
    found = [
        (own.model.init, own.optim.learning_rate, seed) for own, seed in members(config)
    ]
    inits, rates = ("masked_dense", "per_neuron"), (0.1, 0.2, 0.3)
    assert found == list(itertools.product(inits, rates, (4, 2)))
    assert all(own.train.vary == "" for own, _ in members(config))


def test_fields_that_follow_another_follow_it_in_every_member():
    path = run_cli.flag_list("lottery_mlp:smoke", Path("unused"))[0]
    module, arg = path.removeprefix("--config=").split(":")
    scope: dict = {}
    exec(compile(Path(module).read_text(), module, "exec"), scope)
    config = scope["get_config"](arg)
    config.train.vary = "sparsity.masks_from=a|b"
    found = [own.sparsity.weights_from for own, _ in members(config)]
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("optim.learning_rate", "write field=value|value"),
        ("optim.learning_rate=1.0; optim.learning_rate=2.0", "each field once"),
        ("train.batch_size=1|2", "train.batch_size cannot differ between members"),
        ("optim.learning_rate=0.1|fast", "'fast' is not a number"),
        ("sparsity.masks_step=1|x", "'x' is not a whole number"),
        ("sparsity.shuffle_masks=True|no", "'no' is not True or False"),
        ("optim.learning_rate=0.1|0.10", "has a value twice"),
    ],
)
def test_what_cannot_vary_is_one_sentence(vary, message):
    with pytest.raises(UserError, match=r"train\.vary.*" + message.replace("|", r"\|")):
        members(run_cli.small_config(train__vary=vary))


def test_gradual_pruning_fixes_where_it_ends():
    pruning = {"sparsity__rule": "gradual_pruning"}
    config = run_cli.small_config(train__vary="sparsity.sparsity=0.5|0.8", **pruning)
    with pytest.raises(UserError, match=r"sparsity\.sparsity cannot differ"):
        members(config)


def test_of_two_fields_that_follow_each_other_one_varies():
    config = run_cli.small_config()
    config.sparsity.weights_from = config.sparsity.get_ref("masks_from")
    config.train.vary = "sparsity.masks_from=a|b; sparsity.weights_from=c|d"
    with pytest.raises(UserError, match="follows another varied field"):
        members(config)


def test_a_seed_is_a_whole_number():
    with pytest.raises(UserError, match="whole numbers"):
        members(run_cli.small_config(train__seeds=(True, 0)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"member_devices": 2}, "does not divide the 3 members"),
        ({"member_devices": 3, "population": "one_by_one"}, "are on one device"),
    ],
)
def test_devices_that_cannot_be_used_are_one_sentence(fields, message):
    fields = {f"train__{k}": v for k, v in fields.items()}
    with pytest.raises(UserError, match=message):
        members(run_cli.small_config(train__seeds=(0, 1, 2), **fields))
