"""Members trained together equal the same runs trained alone."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli
from populations import ROUNDING, alone, assert_same, leaves, started

from lottery_flow import checkpoint, parallel, population
from lottery_flow.errors import UserError
from lottery_flow.loop import Result
from lottery_flow.parallel import Devices
from lottery_flow.steps import make_steps
from lottery_flow.train import train


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# A checkpoint takes a tenth of a second: fewer where they are not what is looked at.
FEW = {"train__checkpoint_every_steps": 12}
SHORT = {"train__total_steps": 4, "train__checkpoint_every_steps": 4}  # one rewire

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


def pair(root: Path, name: str, **fields: object) -> list:
    """Two members of a row of the table, which differ in all that it varies."""
    runs = started(root, **TABLE[name], **FEW, **fields)
    return [runs[0], runs[-1]]


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    """name -> results of the pair of a row of the table, each trained alone."""
    done = {}

    def get(name: str) -> list[Result]:
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            done[name] = [train([run])[0] for run in pair(root, name)]
        return done[name]

    return get


@pytest.fixture(scope="module")
def single(tmp_path_factory, _promotion) -> Result:
    """The run of the small configuration as it is."""
    (found,) = alone(tmp_path_factory.mktemp("single"), **FEW)
    return found


@pytest.mark.parametrize(
    ("name", "how", "chunk"),
    [
        *itertools.product(TABLE, ["together"], [4]),
        # One by one they run the program of a single run.
        ("gradual_pruning", "one_by_one", 1),
        ("rigl_keras_momentum", "one_by_one", 4),
        ("rigl_keras_momentum", "together", 1),
    ],
)
def test_a_member_equals_its_single_run(singles, tmp_path, name, how, chunk):
    fields = {"train__population": how, "train__chunk_steps": chunk}
    found = train(pair(tmp_path, name, **fields))
    expected = singles(name)
    assert len(found) == len(expected) == 2
    rtol = 0.0 if (how, chunk) == ("one_by_one", 1) else ROUNDING
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, rtol)
    # And members differ, or the test would say nothing.
    both = zip(*map(leaves, found), strict=True)
    assert any((x != y).any() for x, y in both)


def test_members_over_eight_devices(tmp_path):
    fields = {"train__seeds": tuple(range(8)), "sparsity__rule": "rigl"}
    fields |= {"train__population": "together", **SHORT}
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


def test_members_with_one_order_of_the_examples(single, tmp_path):
    fields = {"train__seeds": (0, 1), "data__order_seed": 7, **FEW}
    expected = alone(tmp_path / "alone", **fields)
    for how, rtol in (("one_by_one", 0.0), ("together", ROUNDING)):
        found = train(started(tmp_path / how, train__population=how, **fields))
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs, rtol)
    assert single.rows[-1]["loss"] != expected[0].rows[-1]["loss"]


def test_each_member_takes_the_masks_of_its_own_seed(tmp_path):
    pruned = {"sparsity__rule": "rigl", "train__seeds": (0, 1), **SHORT}
    sources = train(started(tmp_path, **pruned))
    for i in (0, 1):
        (tmp_path / f"run_{i}").rename(tmp_path / f"seed_{i}")
    fields = {"sparsity__masks_from": str(tmp_path / "seed_{seed}"), **SHORT}
    found = train(started(tmp_path / "new", train__seeds=(0, 1), **fields))
    for mine, theirs in zip(found, sources, strict=True):
        for a, b in zip(
            jax.tree.leaves(mine.state.masks),
            jax.tree.leaves(theirs.state.masks),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_a_rule_on_a_network_without_masks(tmp_path):
    (result,) = alone(
        tmp_path, sparsity__rule="rigl", sparsity__sparsity=0.0, train__total_steps=4
    )
    assert result.rows[-1]["density"] == 1.0


def test_a_sweep_of_one_seed_has_the_bits_of_single_runs(single, tmp_path):
    rates = {"train__vary": "optim.learning_rate=0.05|0.1"}
    found = train(started(tmp_path / "both", **rates, **FEW))
    fast = alone(tmp_path / "alone", optim__learning_rate=0.1, **FEW)
    for mine, theirs in zip(found, [single, *fast], strict=True):
        assert_same(mine, theirs)


def test_a_member_that_diverges_is_named_and_stops_no_other(single, tmp_path):
    fields = {"train__vary": "optim.learning_rate=0.05|1e30"}
    cut = started(tmp_path, **fields)
    done = []
    with pytest.raises(UserError, match=r"run_1 is (nan|inf) at step \d+.*diverged"):
        train(cut, on_done=lambda run, result: done.append((run, result)))
    # The other one is finished, with the result that it has alone.
    ((run, result),) = done
    assert run.paths == cut[0].paths
    assert_same(result, single)
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
        steps,
        len(jobs),
        way=how,
        devices=Devices(member=n_devices),
        batch_size=job.batch_size,
        shared=shared,
    )
    states = []
    for own in jobs:
        keys = own.rewire_key, own.step_key
        states.append(own.create(own.make_network(), *keys, own.knobs))
    dataset = job.load_data()
    data = {"image": dataset.train_images, "label": dataset.train_labels}
    indices = np.zeros((len(jobs), job.batch_size), np.int32)
    knobs = pop.join([own.knobs for own in jobs])
    return (
        pop,
        pop.join(states),
        knobs,
        parallel.put(data, parallel.sharding(pop.mesh)),
        indices,
    )


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


def test_members_with_other_dense_layers_cannot_be_stacked(tmp_path):
    fields = {"train__vary": "sparsity.sparsity=0.0|0.8"}
    with pytest.raises(UserError, match="same layers to be sparse"):
        train(started(tmp_path, train__population="together", **fields))


def test_more_devices_than_there_are():
    n = devices = 16
    job = run_cli.small_job()
    steps = make_steps(job.model.apply, job.make_method, job.spec.mean, job.spec.std)
    with pytest.raises(UserError, match=r"member_devices=16: there are 8 devices"):
        population.make(
            steps,
            n,
            way="together",
            devices=Devices(member=devices),
            batch_size=16,
            shared=False,
        )
