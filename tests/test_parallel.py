"""Many devices compute what one does, and keep the parts that they should."""

import contextlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli
from jax.sharding import PartitionSpec as P
from populations import ROUNDING, alone, assert_same, started

from lottery_flow import checkpoint, models, parallel, population, stopping
from lottery_flow.errors import UserError
from lottery_flow.feed import Data
from lottery_flow.models.resnet import ResNet
from lottery_flow.parallel import Devices
from lottery_flow.train import creation, start, train


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# A kernel of 784 x 64 is cut, one of 64 x 10 is not.
FIELDS = {"sparsity__rule": "rigl", "model__widths": (64,)}
SHAPES = {
    "data": {"train__data_devices": 8},
    "model": {"train__model_devices": 8},
    "both_in_chunks": {
        "train__data_devices": 2,
        "train__model_devices": 4,
        "train__chunk_steps": 4,
    },
}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("single"), **FIELDS)


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_devices_train_what_one_does(tmp_path, single, shape):
    found = train(started(tmp_path, **FIELDS, **SHAPES[shape]))
    assert_same(found[0], single[0], ROUNDING)
    kernel = found[0].state.params["fc1"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    parts = SHAPES[shape].get("train__model_devices", 1)
    slots = jax.tree.leaves(found[0].state.opt_state.inner_state)
    masks = found[0].state.masks["fc1"]["kernel"]
    for leaf in [kernel, masks, *(s for s in slots if s.shape == kernel.shape)]:
        assert leaf.addressable_shards[0].data.shape == (784 // parts, 64)


def test_members_whose_batches_and_states_are_cut(tmp_path):
    fields = {**FIELDS, "train__seeds": (0, 1), "train__population": "together"}
    fields |= {f"train__{axis}_devices": 2 for axis in parallel.AXES}
    found = train(started(tmp_path / "cut", **fields))
    expected = alone(tmp_path / "alone", **FIELDS, train__seeds=(0, 1))
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, ROUNDING)


def test_streamed_batches_and_their_statistics_are_of_all_devices(
    tmp_path, monkeypatch
):
    """Normalisation uses the whole batch, also where each device has four images."""
    shallow = partial(
        ResNet, n_blocks=(1,), bottleneck=False, first=4, small_images=True
    )
    monkeypatch.setitem(models.MODELS, "shallow", shallow)
    fields = {"model__name": "shallow", "model__widths": ()}
    fields |= {"data__name": "synthetic", "data__image_size": 8}
    fields |= {"model__init": "module", "train__total_steps": 2}
    fields |= {"train__log_every_steps": 1, "eval__batch_size": 200}
    expected = train(started(tmp_path / "one", **fields))
    found = train(started(tmp_path / "many", train__data_devices=4, **fields))
    assert_same(found[0], expected[0], 1e-4)


def compiled_step(devices: Devices):
    job = run_cli.small_job(**FIELDS)
    pop = population.make(
        job.make_steps(), 1, way="auto", devices=devices, batch_size=16, shared=True
    )
    run = started(Path("does_not_exist"), **FIELDS)[0]
    state = start(run, 0, creation(job), pop.mesh)
    data = Data.of(job, job.load_data(), pop.mesh)
    train_ = population._on_mesh(pop.mesh, job.make_steps().train)
    indices = np.zeros(16, np.int32)
    return jax.jit(train_).lower(state, job.knobs, data.train, indices).compile()


def test_each_device_computes_its_part_of_the_batch():
    one, eight = (compiled_step(d) for d in (Devices(), Devices(data=8)))
    flops = [c.cost_analysis()["flops"] for c in (one, eight)]
    # Updates of the weights are done by all.
    assert flops[1] < flops[0] / 2


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 48), P("model")),
        ((48, 64), P(None, "model")),
        ((3, 3, 30, 64), P(None, None, None, "model")),
        ((50, 30), P()),  # nothing that 4 divides
        ((16, 16), P()),  # too small
        ((), P()),
    ],
)
def test_the_longest_axis_that_can_be_cut_is(shape, spec):
    mesh = parallel.make_mesh(2, 16, Devices(2, 1, 4))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert parallel.state_sharding(mesh, leaf).spec == spec
    leaf = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    found = parallel.state_sharding(mesh, leaf, member=True).spec
    assert found == P("member", *spec)


def test_examples_that_cannot_be_cut_are_whole_on_every_device():
    mesh = parallel.make_mesh(1, 16, Devices(data=8))
    assert parallel.batch_sharding(mesh, 40).spec == P(("data", "model"))
    assert parallel.batch_sharding(mesh, 41).spec == P(None)


@pytest.mark.parametrize(
    ("n", "batch_size", "devices", "message"),
    [
        (1, 16, Devices(data=16), r"train\.data_devices=16: there are 8 devices"),
        (1, 16, Devices(data=4, model=4), r"more than the 8 devices"),
        (1, 15, Devices(data=2, model=4), r"train\.batch_size=15 cannot be cut"),
    ],
)
def test_devices_that_cannot_be_had(n, batch_size, devices, message):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(n, batch_size, devices)


def test_devices_are_chosen(monkeypatch, caplog):
    assert parallel.make_mesh(4, 16, Devices()).size == 1
    # As on an accelerator.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dict(parallel.make_mesh(4, 16, Devices()).shape) == {
        "member": 4,
        "data": 2,
        "model": 1,
    }
    assert "nothing to do" not in caplog.text
    shape = parallel.make_mesh(1, 12, Devices()).shape
    assert (shape["data"], shape["model"]) == (6, 1)
    assert "2 of 8 devices have nothing to do; a multiple of 8" in caplog.text
    shape = parallel.make_mesh(1, 12, Devices(model=4)).shape
    assert (shape["data"], shape["model"]) == (1, 4)


def test_a_checkpoint_goes_on_with_other_devices(tmp_path, single):
    run = started(tmp_path, **FIELDS, train__model_devices=8)[0]
    train([run._replace(job=run.job._replace(total_steps=6))])
    _, network = checkpoint.restore_network(run.paths.checkpoints)
    assert isinstance(network.params["fc1"]["kernel"], np.ndarray)
    other = started(tmp_path, **FIELDS, train__data_devices=2)[0]
    found = train([other])[0]
    assert_same(found, single[0], ROUNDING)
    assert len(found.state.params["fc1"]["kernel"].sharding.device_set) == 2


@pytest.mark.parametrize(("calls", "chunk"), [(1, 1), (3, 5)])
def test_a_run_that_was_asked_to_stop_goes_on_with_the_same_bits(
    tmp_path, monkeypatch, calls, chunk
):
    fields = {"sparsity__rule": "rigl", "train__chunk_steps": chunk}
    whole = train(started(tmp_path / "whole", **fields))[0]
    run = started(tmp_path / "stopped", **fields)[0]
    left = iter([False] * (calls - 1) + [True])
    with monkeypatch.context() as patch:
        asked = contextlib.nullcontext(lambda: next(left))
        patch.setattr(stopping, "watch", lambda: asked)
        with pytest.raises(stopping.Stopped, match="stopped after step"):
            train([run])
    if calls == 1:
        assert checkpoint.steps_in(run.paths.checkpoints) == [0]
    assert_same(train([run])[0], whole)
