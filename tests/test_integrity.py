"""Damage to checkpoints: all of it is found, and none of it changes a run."""

import gc
import hashlib
import json
import random
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from populations import assert_same, started

from lottery_flow import checkpoint, integrity, restarts
from lottery_flow.errors import UserError
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules
from lottery_flow.sparsity.transform import sparsify
from lottery_flow.state import create
from lottery_flow.train import train

pytestmark = pytest.mark.filterwarnings(
    # orbax drops coroutines when a read fails.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
    gc.collect()


def items():
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    mask = weights % 3 == 0
    network = {
        "params": {"fc": {"kernel": jnp.asarray(weights * mask), "bias": jnp.ones(4)}},
        "masks": {"fc": {"kernel": jnp.asarray(mask), "bias": None}},
    }
    half = jnp.asarray([1.5, -0.0], jnp.bfloat16)
    return network, {"key": jax.random.key(3), "slots": (half, jnp.int32(7))}


def test_a_record_of_a_small_state_worked_by_hand():
    network, training = items()
    found = integrity.record(network, training)
    weights, mask = network["params"]["fc"]["kernel"], network["masks"]["fc"]["kernel"]
    expected = {
        "network/masks/fc/kernel": b"bool;(3, 4);" + np.asarray(mask).tobytes(),
        "network/params/fc/bias": b"float32;(4,);" + np.ones(4, np.float32).tobytes(),
        "network/params/fc/kernel": b"float32;(3, 4);" + np.asarray(weights).tobytes(),
        "training/key": b"uint32;(2,);" + np.array([0, 3], np.uint32).tobytes(),
        "training/slots/0": b"bfloat16;(2,);" + bytes.fromhex("c03f 0080"),
        "training/slots/1": b"int32;();" + bytes([7, 0, 0, 0]),
    }
    hashes = {k: hashlib.sha256(v).hexdigest() for k, v in expected.items()}
    assert found == {"sha256": hashes, "n_active": {"fc": 4}}
    assert integrity.parse(json.dumps(found)) == found
    assert integrity.problem(found, network=network, training=training) is None
    assert integrity.problem(found, network=network) is None


def test_where_an_array_lies_does_not_change_its_digest():
    network, training = items()
    expected = integrity.record(network, training)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    for spec in PartitionSpec(), PartitionSpec(None, "model"):
        kernel = network["params"]["fc"]["kernel"]
        moved = jax.device_put(kernel, NamedSharding(mesh, spec))
        network["params"]["fc"]["kernel"] = moved
        assert integrity.record(network, training) == expected


def changed(what: str):
    """The items with one thing about them changed, and what is said of it."""
    network, training = items()
    leaf = network["params"]["fc"]
    if what == "a bit":
        bias = np.ones(4, np.float32)
        bias.view(np.uint32)[2] ^= 1
        leaf["bias"] = bias
        return network, training, "network/params/fc/bias is not what was written"
    if what == "the sign of a zero":
        leaf["kernel"] = leaf["kernel"].at[0, 1].set(-0.0)
        return network, training, "params/fc/kernel is not what was written"
    if what == "a shape":
        leaf["bias"] = leaf["bias"].reshape(2, 2)
        return network, training, "fc/bias is not what was written"
    if what == "a type":
        leaf["bias"] = jax.lax.bitcast_convert_type(leaf["bias"], jnp.int32)
        return network, training, "fc/bias is not what was written"
    if what == "one less":
        del leaf["bias"]
        return network, training, "fc/bias is missing"
    if what == "one more":
        leaf["scale"] = jnp.ones(4)
        return network, training, "fc/scale is not in its record"
    training["key"] = jax.random.key(4)
    return network, training, "training/key is not what was written"


@pytest.mark.parametrize(
    "what",
    ["a bit", "the sign of a zero", "a shape", "a type", "one less", "one more", "key"],
)
def test_a_change_is_named(what):
    record = integrity.record(*items())
    network, training, told = changed(what)
    found = integrity.problem(record, network=network, training=training)
    assert found is not None
    assert told in found


def test_invariants_are_verified_where_no_digest_is():
    """As of arrays that are cut over many processes."""
    network, training = items()
    record = integrity.record(network, training)
    unknown = dict.fromkeys(record["sha256"])
    open_ = {**record, "sha256": unknown}
    assert integrity.problem(open_, network=network) is None
    uncounted = {"sha256": unknown, "n_active": {}}
    assert integrity.problem(uncounted, network=network) is None
    known = {**record, "n_active": {}}
    found = integrity.problem(known, network=network)
    assert found == "fc has 4 active weights and None in its record"
    wrong = {"sha256": unknown, "n_active": {"fc": 5}}
    found = integrity.problem(wrong, network=network)
    assert found == "fc has 4 active weights and 5 in its record"
    kernel = network["params"]["fc"]["kernel"]
    network["params"]["fc"]["kernel"] = kernel.at[0, 1].set(jnp.nan)
    found = integrity.problem(open_, network=network)
    assert found == "1 inactive weights of network/params/fc/kernel are not zero"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"sha256": {}}', '{"sha256": {"a": 1}, "n_active": {}}'],
)
def test_what_is_no_record(text):
    with pytest.raises(ValueError):
        integrity.parse(text)


def state(n_updates: int = 0):
    # Large enough to be in files of its own, and too irregular to be compressed.
    kernel = jax.random.normal(jax.random.key(0), (100, 30))
    params = {"fc": {"kernel": kernel, "bias": jnp.zeros(30)}}
    masks = masks_lib.random(jax.random.key(1), params, {"fc": 1500})
    tx = sparsify(optax.adam(0.1), masks, rules.static(), key=jax.random.key(2))
    found = create(tx, params, {}, jax.random.key(3))
    for _ in range(n_updates):
        grads = jax.tree.map(jnp.cos, found.params)
        updates, opt_state = tx.update(grads, found.opt_state, found.params)
        own = optax.apply_updates(found.params, updates)
        found = found._replace(step=found.step + 1, params=own, opt_state=opt_state)
    return found


def test_a_state_that_is_not_sparse_is_not_saved(tmp_path):
    broken = state()
    masks = jax.tree.map(jnp.zeros_like, broken.masks)
    broken = broken._replace(opt_state=broken.opt_state._replace(masks=masks))
    with (
        checkpoint.manager(tmp_path) as manager,
        pytest.raises(RuntimeError, match=r"step 0 is not sparse \(1500 inactive"),
    ):
        checkpoint.save(manager, broken)
    assert checkpoint.steps_in(tmp_path) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The checkpoints of steps 0, 1 and 2, which no test changes."""
    directory = tmp_path_factory.mktemp("integrity") / "checkpoints"
    with (
        jax.numpy_dtype_promotion("standard"),
        checkpoint.manager(directory) as manager,
    ):
        for n in range(3):
            checkpoint.save(manager, state(n))
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def arrays(directory: Path, step: int) -> list[bytes]:
    like = jax.eval_shape(state)
    with checkpoint.manager(directory, read_only=True) as manager:
        found = checkpoint.restore(manager, step, like)
    found = found._replace(key=jax.random.key_data(found.key))
    opt_state = found.opt_state
    found = found._replace(
        opt_state=opt_state._replace(key=jax.random.key_data(opt_state.key))
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)]


def test_undamaged_checkpoints(saved):
    for step in range(3):
        assert checkpoint.damage(saved, step) is None


def test_no_flipped_bit_is_read_as_if_it_were_right(directory):
    """At places in all files: it is found, or it was in bytes that mean nothing."""
    files = [p for p in sorted((directory / "2").glob("*/**/d/*")) if p.is_file()]
    files += [directory / "2" / "record" / "metadata"]
    expected, draw, told = arrays(directory, 2), random.Random(0), []
    for path in files:
        whole = path.read_bytes()
        # More places where weights lie: which bits mean something, chance decides.
        for _ in range(8 if len(whole) > 1000 else 1):
            spoilt = bytearray(whole)
            spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
            path.write_bytes(spoilt)
            found = checkpoint.damage(directory, 2)
            if found is None:
                assert arrays(directory, 2) == expected
            else:
                told.append(found)
        path.write_bytes(whole)
    # orbax reads a flipped bit of a weight as if nothing were wrong.
    assert len([t for t in told if "is not what was written" in t]) >= 2
    assert len([t for t in told if "cannot be read" in t]) >= 2
    assert checkpoint.damage(directory, 2) is None


def other_values(directory: Path) -> None:
    """Intact files with other values in them, which only a digest notices."""
    shutil.rmtree(directory / "2" / "training")
    shutil.copytree(directory / "1" / "training", directory / "2" / "training")


def truncate(directory: Path) -> None:
    for path in (directory / "2" / "network").glob("**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(change, directory: Path) -> None:
    path = directory / "2" / "record" / "metadata"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


DAMAGE = {
    "other values": (other_values, "is damaged (training/.*is not what was written"),
    "truncated": (truncate, "cannot be read"),
    "no record": (
        lambda d: shutil.rmtree(d / "2" / "record"),
        "is damaged (its record is missing)",
    ),
    "empty record": (
        lambda d: (d / "2" / "record" / "metadata").write_text(""),
        "is damaged (its record cannot be read",
    ),
    "record without its file": (
        lambda d: (d / "2" / "record" / "metadata").unlink(),
        "is damaged (its record cannot be read",
    ),
    "another digest": (
        partial(edit, lambda r: r["sha256"].update({"training/step": "0" * 64})),
        "is damaged (training/step is not what was written)",
    ),
    "another count": (
        partial(edit, lambda r: r["n_active"].update({"fc": 99})),
        "is damaged (fc has 1500 active weights and 99 in its record)",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_told(directory, how):
    spoil, told = DAMAGE[how]
    spoil(directory)
    found = checkpoint.damage(directory, 2)
    assert found is not None
    for part in told.split(".*"):
        assert part in found
    assert checkpoint.damage(directory, 1) is None
    if "training" in told:
        return  # the network itself is as it was
    with pytest.raises(UserError, match=r"step 2 .*move .*checkpoints/2 away"):
        checkpoint.restore_network(directory)


def test_restoring_verifies_what_it_read(directory):
    other_values(directory)
    with pytest.raises(UserError, match=r"step 2 .*is damaged \(training/"):
        arrays(directory, 2)


def test_checkpoints_of_earlier_versions_have_no_record(directory):
    expected = arrays(directory, 2)
    for step in "012":
        shutil.rmtree(directory / step / "record")
    assert [checkpoint.damage(directory, step) for step in range(3)] == [None] * 3
    assert checkpoint.restore_network(directory)[0] == 2
    assert arrays(directory, 2) == expected
    # Those that follow have one, and these still need none.
    with checkpoint.manager(directory) as manager:
        checkpoint.save(manager, state(3))
    assert [checkpoint.damage(directory, step) for step in range(4)] == [None] * 4
    shutil.rmtree(directory / "3" / "record")
    with checkpoint.manager(directory) as manager:
        checkpoint.save(manager, state(4))
    assert checkpoint.damage(directory, 3) is None


def test_what_is_set_aside_does_not_count_and_stays(directory):
    names = {"0", "1", "2"}
    for name in "2.damaged", "2.damaged-1", "2.damaged-2":
        checkpoint.set_aside(directory, [2])
        names |= {name}
        assert checkpoint.steps_in(directory) == [0, 1]
        with checkpoint.manager(directory, keep=2) as manager:
            assert manager.latest_step() == 1
            checkpoint.save(manager, state(2))
        checkpoint.forget_after(directory, 2)
        assert {p.name for p in directory.iterdir()} == names
        assert checkpoint.damage(directory, 2) is None


SMALL = {"sparsity__rule": "rigl", "train__total_steps": 9}
SMALL |= {"train__checkpoint_every_steps": 3}
PAIR = SMALL | {"train__seeds": (0, 1), "train__population": "together"}


def spoil(run, *steps: int) -> None:
    for step in steps:
        directory = run.paths.checkpoints / str(step) / "record" / "metadata"
        directory.write_text("{}")


def cut_short(runs, n: int):
    return [run._replace(job=run.job._replace(total_steps=n)) for run in runs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return train(started(tmp_path_factory.mktemp("whole"), **PAIR))


def test_members_go_on_from_what_all_have_whole(tmp_path, whole, caplog):
    """A damaged newest checkpoint, beside one that a kill kept from being written."""
    cut = started(tmp_path, **PAIR)
    train(cut_short(cut, 6))
    shutil.rmtree(cut[0].paths.checkpoints / "6")
    spoil(cut[1], 3)
    # In one program the bits are those of both, so neither goes on without the other.
    assert restarts.find(cut) == [([0, 1], 0, [[], [3]])]
    resumed = train(cut)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert_same(mine, theirs)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (told,) = [m for m in set(warned) if "damaged" in m]
    assert "step 3 in" in told
    assert "run_1/checkpoints is damaged" in told
    assert "going on from that of step 0" in told
    found = {p.name for p in cut[1].paths.checkpoints.iterdir()}
    assert found == {"0", "3", "6", "9", "3.damaged"}


def test_members_of_which_one_is_damaged(tmp_path, whole):
    cut = started(tmp_path, **PAIR)
    train(cut_short(cut, 6))
    spoil(cut[0], 6)
    assert restarts.find(cut) == [([0, 1], 3, [[6], []])]
    for mine, theirs in zip(train(cut), whole, strict=True):
        assert_same(mine, theirs)


def test_a_run_without_an_undamaged_checkpoint_does_not_start_over(tmp_path, caplog):
    (run,) = started(tmp_path, **SMALL)
    train(cut_short([run], 6))
    spoil(run, 0, 3, 6)
    before = sorted(p.name for p in run.paths.checkpoints.iterdir())
    pattern = (
        r"no undamaged checkpoint \(that of step 6 .*step 3 .*, and 1 more\); bring"
    )
    with pytest.raises(UserError, match=pattern):
        train([run])
    assert sorted(p.name for p in run.paths.checkpoints.iterdir()) == before
    # The remedy works, and says what it does.
    run.paths.checkpoints.rename(tmp_path / "away")
    assert restarts.find([run]) == [([0], 0, [[]])]
    assert "has rows up to step 6 but no checkpoint; starting over" in caplog.text
