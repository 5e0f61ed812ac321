"""Updates that are not finite: they stop a run, or leave no trace but their count."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_cli
from populations import ROUNDING, alone, assert_same, leaves, started

from lottery_flow import checkpoint, metrics
from lottery_flow.errors import UserError
from lottery_flow.loop import Run
from lottery_flow.train import train

SKIP = {"train__on_nonfinite": "skip", "sparsity__rule": "rigl"}
BAD = 4  # updates before the one that is not finite


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def poisoned(runs: list[Run], bad: int = BAD, above: float = 0.0) -> list[Run]:
    """The same runs; of those with such a learning rate, one update is not finite."""

    def poison(make_method, knobs):
        inner, rule = make_method(knobs)
        is_bad = knobs["learning_rate"] > above
        factor = optax.scale_by_schedule(
            lambda n: jnp.where((n == bad) & is_bad, jnp.nan, 1.0)
        )
        return optax.chain(inner, factor), rule

    return [
        run._replace(job=run.job._replace(make_method=partial(poison, method)))
        for run, method in ((run, run.job.make_method) for run in runs)
    ]


def bits(tree) -> list[bytes]:
    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def one_step(way: str, rewire: bool):
    """A state, what becomes of it in a bad step, its metrics, and what was rewired."""
    fields = SKIP | {"train__ema_decay": 0.9, "optim__name": "adam"}
    job = run_cli.small_job(**fields)
    state = jax.jit(job.create)(
        job.make_network(None), job.rewire_key, job.step_key, job.knobs
    )
    shape = 16, *job.spec.image_shape
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    batch = {
        "image": images,
        "label": np.arange(16, dtype=np.int32) % 10,
    }
    steps, knobs = job.make_steps(), dict(job.knobs)
    # Slots that are not zero, to be kept.
    state, _ = jax.jit(steps.train)(state, knobs, batch, None)
    if way == "gradient":  # the loss is, and its gradient is not
        params = jax.tree.map(lambda p: p * jnp.float32(1e30), state.params)
        state = state._replace(params=params)
    elif way == "weights":
        knobs["learning_rate"] = np.float32(jnp.inf)
    else:
        assert way == "none"
    if rewire:
        new, found, before = jax.jit(steps.rewire)(state, knobs, batch, None, batch)
        return state, new, found, before
    return state, *jax.jit(steps.train)(state, knobs, batch, None), None


def parts(state):
    slots = [x for x in jax.tree.leaves(state.opt_state.inner_state) if x.ndim]
    own = state.params, state.batch_stats, state.ema, state.masks
    return bits((own, state.opt_state.rule_state, slots))


@pytest.mark.parametrize("way", ["gradient", "weights"])
@pytest.mark.parametrize("rewire", [False, True])
def test_a_skipped_update_changes_nothing_but_the_counters(way, rewire):
    old, new, found, before = one_step(way, rewire)
    assert parts(new) == parts(old)
    assert int(found["skipped"]) == int(new.skipped) == 1
    assert int(new.step) == int(new.opt_state.step) == int(old.step) + 1
    counts = [x for x in jax.tree.leaves(new.opt_state.inner_state) if not x.ndim]
    assert len(counts) == 2  # of Adam, and of the schedule
    assert all(int(n) == int(old.step) + 1 for n in counts)
    if rewire:
        assert bits(before.params) == bits(old.params)


@pytest.mark.parametrize("rewire", [False, True])
def test_a_finite_update_is_applied(rewire):
    old, new, found, _ = one_step("none", rewire)
    assert int(found["skipped"]) == int(new.skipped) == 0
    changed = [a != b for a, b in zip(parts(new), parts(old), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_without_bad_updates_a_run_is_as_if_none_were_looked_for(tmp_path):
    (watched,) = alone(tmp_path / "skip", **SKIP)
    (plain,) = alone(tmp_path / "stop", **SKIP | {"train__on_nonfinite": "stop"})
    for a, b in zip(leaves(watched), leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING)
    assert [row.pop("skipped") for row in watched.rows] == [0] * len(plain.rows)
    assert [list(row) for row in watched.rows] == [list(row) for row in plain.rows]


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_run_goes_on_over_a_bad_update(tmp_path, caplog, chunk):
    fields = SKIP | {"train__log_every_steps": 1, "train__chunk_steps": chunk}
    (run,) = poisoned(started(tmp_path / "whole", **fields))
    (whole,) = train([run])
    by_step = {row["step"]: row for row in whole.rows}
    assert [by_step[n]["skipped"] for n in sorted(by_step)] == [0] * 5 + [1] * 8
    same = "probe_loss", "probe_accuracy", "gradient_norm"
    assert [by_step[BAD + 1][k] for k in same] == [by_step[BAD][k] for k in same]
    assert by_step[BAD + 2]["probe_loss"] != by_step[BAD]["probe_loss"]
    told = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(told) == 1
    assert "1 of 5 updates were not finite and skipped" in told[0]
    # Resumed after it, a run still knows.
    (cut,) = poisoned(started(tmp_path / "cut", **fields))
    train([cut._replace(job=cut.job._replace(total_steps=7))])
    (resumed,) = train([cut])
    assert bits(resumed.state) == bits(whole.state)
    assert int(resumed.state.skipped) == 1
    rows = [r for r in metrics.read(cut.paths.metrics) if r["step"] > 7]
    assert rows == [r for r in metrics.read(run.paths.metrics) if r["step"] > 7]


def test_a_skipped_loss_is_none_in_its_row(tmp_path):
    metrics_of = {"loss": float("nan"), "accuracy": 0.1, "skipped": 1.0}
    from lottery_flow.loop import Loop

    (run,) = started(tmp_path, **SKIP)
    with metrics.Writer(None, -1) as writer:
        own = dict.fromkeys(Loop._fields) | {
            "job": run.job,
            "members": [run],
            "writers": [writer],
        }
        assert Loop(**own)._skipped(0, 9, metrics_of) == {"skipped": 1}
    assert metrics_of == {}


def test_only_the_member_with_a_bad_update_skips_it(tmp_path):
    fields = SKIP | {"train__vary": "optim.learning_rate=0.1|0.2"}
    fields |= {"train__population": "together"}
    calm, hit = train(poisoned(started(tmp_path / "both", **fields), above=0.15))
    assert [row["skipped"] for row in calm.rows] == [0] * len(calm.rows)
    assert hit.rows[-1]["skipped"] == 1
    one, other = poisoned(started(tmp_path / "alone", **fields), above=0.15)
    for found, expected in (calm, train([one])), (hit, train([other])):
        assert_same(found, expected[0], ROUNDING)


def test_a_run_that_stops_names_what_is_not_finite(tmp_path):
    fields = {"train__checkpoint_every_steps": 2, "model__widths": (6, 5)}
    (run,) = poisoned(started(tmp_path, **fields))
    with pytest.raises(UserError) as error:
        train([run])
    assert str(error.value) == (
        "the gradient norm is nan at step 5: the run has diverged, with weights that "
        "are not finite in fc1, fc1/bias, fc2, fc2/bias, fc3 and 1 more; lower "
        "optim.learning_rate (the checkpoint of step 4 is kept)"
    )
    assert checkpoint.steps_in(run.paths.checkpoints) == [0, 2, 4]


def test_an_unknown_way(tmp_path: Path):
    with pytest.raises(UserError, match=r"on_nonfinite='ignore' is unknown.*'stop'"):
        started(tmp_path, train__on_nonfinite="ignore")
