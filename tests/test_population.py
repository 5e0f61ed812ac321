"""Members trained together equal the same runs trained alone."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, metrics, population, runs
from lottery_flow.build import build
from lottery_flow.errors import UserError
from lottery_flow.loop import Result, Run
from lottery_flow.members import members
from lottery_flow.state import create
from lottery_flow.steps import make_steps
from lottery_flow.train import _restarts, train


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def started(root: Path, **fields: object) -> list[Run]:
    """The members of a small configuration."""
    config = run_cli.small_config(**fields)
    return [
        Run(build(own, seed), runs.RunPaths(root / f"run_{i}"), {"seed": seed})
        for i, (own, seed) in enumerate(members(config))
    ]


def alone(root: Path, **fields: object) -> list[Result]:
    """The same members, each trained as a run of its own."""
    return [train([run])[0] for run in started(root, **fields)]


def leaves(result: Result) -> list[np.ndarray]:
    state = result.state
    trees = state.params, state.batch_stats, state.masks, state.opt_state.inner_state
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def assert_same(found: Result, expected: Result, rtol: float = 0.0) -> None:
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
    for mine, theirs in zip(found.rows, expected.rows, strict=True):
        assert mine.keys() == theirs.keys()
        none = {k for k, v in theirs.items() if v is None}
        assert none == {k for k, v in mine.items() if v is None}
        numbers = {k: v for k, v in theirs.items() if k not in none}
        found_numbers = {k: v for k, v in mine.items() if k not in none}
        assert found_numbers == pytest.approx(numbers, rel=rtol, abs=rtol)


# Sums in another order, over 12 steps; masks must be the same.
ROUNDING = 2e-5

TABLE = {
    "static_momentum": {"optim__name": "momentum", "train__seeds": (0, 1)},
    "set_adam": {
        "sparsity__rule": "set",
        "optim__name": "adam",
        "optim__learning_rate": 1e-3,
        "train__vary": "model.init=masked_dense|per_neuron",
    },
    "rigl_keras_momentum": {
        "sparsity__rule": "rigl",
        "train__seeds": (0, 1),
        "train__vary": "optim.learning_rate=0.05|0.1; sparsity.drop_fraction=0.3",
    },
    "rigl_inverted_adamw": {
        "sparsity__rule": "rigl_inverted",
        "sparsity__timing": "instead",
        "sparsity__grow_examples": 0,
        "optim__name": "adamw",
        "optim__learning_rate": 1e-3,
        "train__vary": "sparsity.sparsity=0.7|0.8; sparsity.drop_fraction=0.5",
    },
    "gradual_pruning": {
        "sparsity__rule": "gradual_pruning",
        "sparsity__begin_steps": 2,
        "sparsity__end_steps": 8,
        "train__seeds": (0, 1),
    },
}


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    """name -> results of the members of a row of the table, each trained alone."""
    done = {}

    def get(name: str) -> list[Result]:
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            done[name] = alone(root, **TABLE[name])
        return done[name]

    return get


@pytest.mark.parametrize(
    ("name", "how", "chunk"),
    [
        *itertools.product(TABLE, ["one_by_one"], [1]),
        *itertools.product(TABLE, ["together"], [4]),
        ("rigl_keras_momentum", "one_by_one", 4),
        ("rigl_keras_momentum", "together", 1),
    ],
)
def test_a_member_equals_its_single_run(singles, tmp_path, name, how, chunk):
    fields = TABLE[name] | {"train__population": how, "train__chunk_steps": chunk}
    found = train(started(tmp_path, **fields))
    expected = singles(name)
    assert len(found) == len(expected) >= 2
    rtol = 0.0 if (how, chunk) == ("one_by_one", 1) else ROUNDING
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, rtol)
    # And members differ, or the test would say nothing.
    for a, b in itertools.combinations(found, 2):
        assert any((x != y).any() for x, y in zip(leaves(a), leaves(b), strict=True))


def test_members_over_eight_devices(tmp_path):
    fields = {"train__seeds": tuple(range(8)), "sparsity__rule": "rigl"}
    fields |= {"train__population": "together"}
    expected = train(started(tmp_path / "one", train__member_devices=1, **fields))
    found = train(started(tmp_path / "eight", train__member_devices=8, **fields))
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, ROUNDING)


def test_the_members_lie_on_their_devices():
    runs_ = [run_cli.small_job(seed) for seed in range(8)]
    _, state, *_ = compiled(runs_, how="together", n_devices=8)
    kernel = state.params["fc1"]["kernel"]
    assert kernel.shape[0] == 8
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape[0] == 1
    assert state.step.shape == ()


@pytest.mark.parametrize("how", ["one_by_one", "together"])
def test_members_with_one_order_of_the_examples(tmp_path, how):
    fields = {"train__seeds": (0, 1), "data__order_seed": 7}
    expected = alone(tmp_path / "alone", **fields)
    found = train(started(tmp_path / how, train__population=how, **fields))
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, 0.0 if how == "one_by_one" else ROUNDING)
    other = alone(tmp_path / "own", train__seeds=(0,))
    assert other[0].rows[-1]["loss"] != expected[0].rows[-1]["loss"]


def test_each_member_takes_the_masks_of_its_own_seed(tmp_path):
    pruned = {"sparsity__rule": "rigl", "train__seeds": (0, 1)}
    sources = train(started(tmp_path, **pruned))
    for i in (0, 1):
        (tmp_path / f"run_{i}").rename(tmp_path / f"seed_{i}")
    fields = {"sparsity__masks_from": str(tmp_path / "seed_{seed}")}
    found = train(started(tmp_path / "new", train__seeds=(0, 1), **fields))
    for mine, theirs in zip(found, sources, strict=True):
        for a, b in zip(
            jax.tree.leaves(mine.state.masks),
            jax.tree.leaves(theirs.state.masks),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


# Resuming


@pytest.mark.parametrize(("how", "chunk"), [("one_by_one", 1), ("together", 5)])
def test_a_population_resumes_where_its_slowest_member_was(tmp_path, how, chunk):
    fields = {"train__seeds": (0, 1, 2), "sparsity__rule": "rigl"}
    fields |= {"train__population": how, "train__chunk_steps": chunk}
    fields |= {"train__checkpoint_every_steps": 3}
    whole = train(started(tmp_path / "whole", **fields))
    cut = started(tmp_path / "cut", **fields)
    train([run._replace(job=run.job._replace(total_steps=9)) for run in cut])
    # As a kill leaves it, while the members save one after another.
    shutil.rmtree(cut[1].paths.checkpoints / "9")
    assert _restarts(cut) == [([1, 0, 2], 6)]
    resumed = train(cut)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert_same(mine, theirs)
    for run in cut:
        assert checkpoint.steps_in(run.paths.checkpoints) == [0, 3, 6, 9, 12]
        steps = [row["step"] for row in metrics.read(run.paths.metrics)]
        assert steps == sorted(set(steps))


def test_members_far_apart_go_on_each_from_where_it_is(tmp_path):
    fields = {"train__seeds": (0, 1), "train__checkpoint_every_steps": 3}
    fields |= {"eval__every_steps": 3}
    whole = train(started(tmp_path / "whole", **fields))
    cut = started(tmp_path / "cut", **fields)
    train([cut[0]._replace(job=cut[0].job._replace(total_steps=9))])
    assert _restarts(cut) == [([1], 0), ([0], 9)]
    kept = (cut[0].paths.checkpoints / "9").stat().st_mtime_ns
    for mine, theirs in zip(train(cut), whole, strict=True):
        assert_same(mine, theirs)
    assert (cut[0].paths.checkpoints / "9").stat().st_mtime_ns == kept


def test_a_member_goes_on_alone_from_where_the_others_took_it(tmp_path):
    """Rolled back to the step of a slower one, a member loses rows and checkpoints
    alike, so that it can go on without that one."""
    fields = {"train__seeds": (0, 1), "sparsity__rule": "rigl"}
    whole = train(started(tmp_path / "whole", **fields))
    cut = started(tmp_path / "cut", **fields)
    ahead = cut[1]._replace(job=cut[1].job._replace(total_steps=6))
    train([ahead])
    both = [run._replace(job=run.job._replace(total_steps=2)) for run in cut]
    train(both)
    (resumed,) = train([cut[1]])
    assert [row["step"] for row in resumed.rows[-2:]] == [10, 12]
    for a, b in zip(leaves(resumed), leaves(whole[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [row["step"] for row in metrics.read(cut[1].paths.metrics)]
    assert set(steps) >= {row["step"] for row in whole[1].rows}


def test_two_checkpoints_are_kept_while_members_save_one_after_another(tmp_path):
    fields = {"train__seeds": (0, 1), "train__keep_checkpoints": 1}
    cut = started(tmp_path, train__checkpoint_every_steps=3, **fields)
    train(cut)
    for run in cut:
        assert checkpoint.steps_in(run.paths.checkpoints) == [0, 9, 12]


def test_a_half_deleted_checkpoint_is_none(tmp_path):
    (run,) = started(tmp_path)
    train([run])
    directory = run.paths.checkpoints
    (directory / "12").rename(directory / "12.deleted")
    shutil.rmtree(directory / "12.deleted" / "network")
    assert checkpoint.steps_in(directory) == [0, 6]
    checkpoint.forget_after(directory, 6)
    assert {p.name for p in directory.iterdir()} == {"0", "6"}


READ = """
import sys
from pathlib import Path
from lottery_flow import checkpoint
step, network = checkpoint.restore_network(Path(sys.argv[1]))
print(step, network.params["fc1"]["kernel"].sum())
"""


def test_checkpoints_of_many_devices_are_read_on_one(tmp_path):
    fields = {"train__seeds": (0, 1, 2, 3), "train__population": "together"}
    cut = started(tmp_path, train__member_devices=4, **fields)
    results = train(cut)
    environment = os.environ | {"XLA_FLAGS": ""}
    for run, result in zip(cut[:2], results, strict=False):
        command = [sys.executable, "-c", READ, str(run.paths.checkpoints)]
        found = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=run_cli.ROOT
        )
        assert found.returncode == 0, found.stderr
        step, total = found.stdout.split()
        assert step == "12"
        expected = np.asarray(result.state.params["fc1"]["kernel"]).sum()
        assert float(total) == pytest.approx(expected, rel=1e-5)


def test_a_rule_on_a_network_without_masks(tmp_path):
    (result,) = alone(
        tmp_path, sparsity__rule="rigl", sparsity__sparsity=0.0, train__total_steps=4
    )
    assert result.rows[-1]["density"] == 1.0


def test_a_sweep_of_one_seed_has_the_bits_of_single_runs(tmp_path):
    fields = {"train__vary": "optim.learning_rate=0.05|0.1"}
    expected = alone(tmp_path / "alone", **fields)
    found = train(started(tmp_path / "both", **fields))
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


def test_a_member_that_diverges_is_named_and_stops_no_other(tmp_path):
    fields = {"train__vary": "optim.learning_rate=0.05|1e30"}
    cut = started(tmp_path, **fields)
    done = []
    with pytest.raises(UserError, match=r"run_1 is (nan|inf) at step \d+.*diverged"):
        train(cut, on_done=lambda run, result: done.append((run, result)))
    # The other one is finished, with the result that it has alone.
    (expected,) = alone(tmp_path / "alone")
    ((run, result),) = done
    assert run.paths == cut[0].paths
    assert_same(result, expected)
    assert checkpoint.steps_in(cut[0].paths.checkpoints) == [0, 6, 12]
    assert checkpoint.steps_in(cut[1].paths.checkpoints) == [0]


def test_jobs_of_other_settings_are_refused(tmp_path):
    first, second = (started(tmp_path, train__batch_size=n)[0] for n in (16, 8))
    with pytest.raises(UserError, match=r"train\.batch_size differs between members"):
        train([first, second])


# The compiled programs


def compiled(jobs, *, how: str, n_devices: int = 0, shared: bool = False):
    """The population of some jobs, its state, knobs, data and indices."""
    job = jobs[0]
    steps = make_steps(job.model.apply, job.make_method, job.spec.mean, job.spec.std)
    pop = population.make(
        steps, len(jobs), lowering=how, n_devices=n_devices, shared=shared
    )
    states = []
    for own in jobs:
        network = own.make_network()
        tx = own.make_tx(network.masks, own.rewire_key, own.knobs)
        states.append(create(tx, *network[:2], own.step_key))
    dataset = job.load_data()
    data = {"image": dataset.train_images, "label": dataset.train_labels}
    indices = np.zeros((len(jobs), job.batch_size), np.int32)
    knobs = pop.join([own.knobs for own in jobs])
    return pop, pop.join(states), knobs, pop.place(data), indices


def hlo(sparsity__rule: str, what: str) -> str:
    job = run_cli.small_job(sparsity__rule=sparsity__rule, sparsity__grow_examples=0)
    pop, state, *args = compiled([job] * 2, how="together")
    if what == "rewire":
        return pop.rewire.lower(state, *args, None).compile().as_text()
    return pop.train.lower(state, *args).compile().as_text()


def test_nothing_of_the_rewire_is_in_an_ordinary_step():
    ordinary, rewire = hlo("rigl", "train"), hlo("rigl", "rewire")
    traces = " sort(", "while(", "conditional(", "TopK", "65536"
    found = [trace for trace in traces if trace in ordinary]
    assert not found
    assert "while(" in rewire
    assert "65536" in rewire
    assert " sort(" not in rewire


def test_the_state_is_donated_and_masks_are_bytes():
    """Bytes of state for each weight: 4 params, 4 momentum, 1 mask, none twice."""
    fields = {"model__widths": (400,), "sparsity__grow_examples": 0}
    job = run_cli.small_job(sparsity__rule="rigl", **fields)
    steps = make_steps(job.model.apply, job.make_method, job.spec.mean, job.spec.std)
    _, (state,), _, data, indices = compiled([job], how="one_by_one")
    args = state, job.knobs, data, jnp.asarray(indices[0])
    found = jax.jit(steps.train, donate_argnums=0).lower(*args).compile()
    memory = found.memory_analysis()
    n_weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    batch = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
    own = memory.argument_size_in_bytes - batch
    assert 9 * n_weights * 0.97 <= own <= 9 * n_weights * 1.03
    assert memory.output_size_in_bytes <= own * 1.01
    # Every output takes the place of its argument.
    assert memory.alias_size_in_bytes >= 0.97 * memory.output_size_in_bytes


# Which members there are


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


def test_members_with_other_dense_layers_cannot_be_stacked(tmp_path):
    fields = {"train__vary": "sparsity.sparsity=0.0|0.8"}
    with pytest.raises(UserError, match="same layers to be sparse"):
        train(started(tmp_path, train__population="together", **fields))


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


def test_more_devices_than_there_are():
    n = devices = 16
    job = run_cli.small_job()
    steps = make_steps(job.model.apply, job.make_method, job.spec.mean, job.spec.std)
    with pytest.raises(UserError, match=r"member_devices=16: there are 8 devices"):
        population.make(steps, n, lowering="together", n_devices=devices, shared=False)
