"""Checkpoints: what goes in comes out, bit for bit, and what is kept."""

import contextlib
import gc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow import checkpoint
from lottery_flow.errors import UserError
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules
from lottery_flow.sparsity.transform import sparsify
from lottery_flow.state import create

NAMES = {"none": (), "one": ("conv",), "all": ("conv", "head")}


@pytest.fixture(autouse=True)
def _promotion():
    """optax's Adam mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(sparse: str, with_stats: bool = False):
    rng = np.random.default_rng(0)
    params = {
        "conv": {"bias": np.zeros(3), "kernel": rng.normal(size=(2, 2, 1, 3))},
        "head": {"kernel": rng.normal(size=(3, 4))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    masks = masks_lib.random(jax.random.key(1), params, dict.fromkeys(NAMES[sparse], 5))
    stats = {"norm": {"mean": jnp.arange(3.0)}} if with_stats else {}
    return SimpleNamespace(params=params, masks=masks, batch_stats=stats)


def start(net, inner=None):
    inner = optax.adam(0.1) if inner is None else inner
    tx = sparsify(inner, net.masks, rules.static(), key=jax.random.key(2))
    return tx, create(tx, net.params, net.batch_stats, jax.random.key(3))


def advance(tx, state):
    grads = jax.tree.map(lambda p: jnp.sin(p) + 0.5, state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state)


def save_steps(directory: Path, n: int, net, keep: int = 0, every: int = 1):
    """Saves the states after 0, every, 2 every, ... steps; returns all of them."""
    tx, state = start(net)
    states = [state]
    with checkpoint.manager(directory, keep) as manager:
        checkpoint.save(manager, state)
        for _ in range(n):
            for _ in range(every):
                state = advance(tx, state)
            checkpoint.save(manager, state)
            states.append(state)
    return tx, states


def bits(tree):
    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).dtype, np.shape(leaf), np.asarray(leaf).tobytes()

    return jax.tree.map(raw, tree)


def equal(a, b) -> bool:
    same_tree = jax.tree.structure(a) == jax.tree.structure(b)
    return same_tree and bits(a) == bits(b)


CASES = [
    pytest.param(sparse, stats, id=f"{sparse}-{'stats' if stats else 'plain'}")
    for sparse, stats in [("none", False), ("one", True), ("all", False)]
]


@pytest.mark.parametrize(("sparse", "stats"), CASES)
def test_a_state_comes_back_bit_for_bit(tmp_path, sparse, stats):
    net = network(sparse, stats)
    tx, states = save_steps(tmp_path, 2, net)
    like = jax.eval_shape(
        partial(create, tx), net.params, net.batch_stats, jax.random.key(3)
    )
    with checkpoint.manager(tmp_path) as manager:
        for step, state in enumerate(states):
            found = checkpoint.restore(manager, step, like)
            assert equal(found, state)
            assert equal(advance(tx, found), advance(tx, state))


@pytest.mark.parametrize(("sparse", "stats"), CASES)
def test_a_network_comes_back_without_its_optimizer(tmp_path, sparse, stats):
    _, states = save_steps(tmp_path, 2, network(sparse, stats))
    for asked, step in [(-1, 2), (0, 0), (1, 1)]:
        found_step, found = checkpoint.restore_network(tmp_path, asked)
        assert found_step == step
        expected = states[step]
        assert equal(found.params, expected.params)
        assert equal(found.batch_stats, expected.batch_stats)
        # None where a leaf is dense, as in the state.
        assert equal(found.masks, expected.masks)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))


def test_bfloat16_parameters(tmp_path):
    net = network("all")
    net.params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), net.params)
    _, state = start(net, optax.sgd(0.1, momentum=0.9))
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, state)
    assert equal(checkpoint.restore_network(tmp_path)[1].params, state.params)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0, [0, 2, 4, 6, 8]), (1, [0, 8]), (2, [0, 6, 8]), (9, [0, 2, 4, 6, 8])],
)
def test_the_newest_and_step_0_are_kept(tmp_path, keep, kept):
    save_steps(tmp_path, 4, network("one"), keep, every=2)
    assert checkpoint.steps_in(tmp_path) == kept


def test_keeping_goes_on_after_a_restart(tmp_path):
    tx, states = save_steps(tmp_path, 3, network("one"), keep=2)
    with checkpoint.manager(tmp_path, 2) as manager:
        checkpoint.save(manager, advance(tx, states[-1]))
    assert checkpoint.steps_in(tmp_path) == [0, 3, 4]


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    save_steps(tmp_path, 1, network("one"))
    (tmp_path / "2.orbax-checkpoint-tmp-5" / "network").mkdir(parents=True)
    assert checkpoint.steps_in(tmp_path) == [0, 1]
    assert checkpoint.restore_network(tmp_path)[0] == 1
    with checkpoint.manager(tmp_path) as manager:
        assert manager.latest_step() == 1


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_directory_without_checkpoints(tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert checkpoint.steps_in(tmp_path / name) == []
    with pytest.raises(UserError, match=f"{name} has no checkpoints.*seed_N"):
        checkpoint.restore_network(tmp_path / name)
    assert not (tmp_path / "none").exists()


def test_a_step_that_is_not_there(tmp_path):
    save_steps(tmp_path, 2, network("one"))
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 0, 1, 2"):
        checkpoint.restore_network(tmp_path, 7)


# orbax drops a coroutine when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_state_of_another_model(tmp_path):
    save_steps(tmp_path, 1, network("one"))
    net = network("one")
    net.params["head"]["kernel"] = jnp.zeros((3, 5))
    tx, _ = start(net)
    like = jax.eval_shape(partial(create, tx), net.params, {}, jax.random.key(3))
    with (
        checkpoint.manager(tmp_path) as manager,
        pytest.raises(UserError, match=r"step 1 in .* cannot be read"),
    ):
        checkpoint.restore(manager, 1, like)
    gc.collect()


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    tx, state = start(network("all"))
    step = jax.jit(partial(advance, tx), donate_argnums=0)
    state = step(state)
    expected = jax.tree.map(np.array, state.params)
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, state)
        for _ in range(5):
            state = step(state)
    assert equal(checkpoint.restore_network(tmp_path)[1].params, expected)


def test_reading_warns_of_nothing(tmp_path, caplog, monkeypatch):
    save_steps(tmp_path, 1, network("one"))
    caplog.clear()
    with checkpoint.manager(tmp_path, read_only=True) as manager:
        assert manager.latest_step() == 1
    assert caplog.records == []
    # And this would see it.
    monkeypatch.setattr(checkpoint, "_without_warnings", contextlib.nullcontext)
    with checkpoint.manager(tmp_path, read_only=True):
        assert any("read only" in r.getMessage() for r in caplog.records)
