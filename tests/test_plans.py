"""Runs whose layers are computed by their active weights."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import layer_kinds
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, metrics, plans, storage
from lottery_flow.build import build
from lottery_flow.errors import UserError
from lottery_flow.sparsity import execution_choice
from lottery_flow.sparsity import masks as masks_lib

SPARSE = "fc1=csr_gathered,fc2=csr"
FIELDS = {
    "model__widths": "(30,20)",
    "sparsity__sparsity": 0.8,
    "sparsity__grow_examples": 50,
}


@pytest.fixture(autouse=True)
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start(workdir, **fields):
    args = run_cli.flag_list("rigl_mlp:smoke", workdir, **(FIELDS | fields))
    outcome = run_cli.in_process(*args)
    assert not outcome.errors, outcome.errors
    return run_cli.run_directory(workdir)


def network(run, step=-1):
    return checkpoint.restore_network(run / "checkpoints", step)[1]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return start(tmp_path_factory.mktemp("sparse"), train__execution=SPARSE)


def test_it_trains_what_dense_products_do(sparse, tmp_path):
    dense = start(tmp_path)
    assert not (dense / "execution.json").exists()
    kept = json.loads((sparse / "execution.json").read_text())
    assert kept == {"fc1": "csr_gathered", "fc2": "csr", "fc3": "dense"}
    mine, theirs = network(sparse), network(dense)
    for a, b in zip(
        jax.tree.leaves(mine.masks), jax.tree.leaves(theirs.masks), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(mine.params), jax.tree.leaves(theirs.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    start_masks = network(sparse, 0).masks
    changed = [
        bool(np.any(a != b))
        for a, b in zip(
            jax.tree.leaves(start_masks), jax.tree.leaves(mine.masks), strict=True
        )
    ]
    assert all(changed)  # so that plans of the first masks would not have done


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    own = {"train__storage": "compact", "train__execution": SPARSE}
    return start(tmp_path_factory.mktemp("packed"), **own, train__ema_decay=0.9)


def test_storing_active_weights_alone_changes_nothing(sparse, packed):
    mine, theirs = (metrics.read(r / "metrics.jsonl") for r in (packed, sparse))
    for a, b in zip(mine, theirs, strict=True):
        for k, v in b.items():
            assert a[k] == (v and pytest.approx(v, rel=1e-4, abs=1e-6)), k
    for step in (0, -1):
        mine, theirs = network(packed, step), network(sparse, step)
        for a, b in zip(*map(jax.tree.leaves, (mine.masks, theirs.masks)), strict=True):
            np.testing.assert_array_equal(a, b)
        weights = mine.params, theirs.params
        for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_packed_states_are_smaller_and_come_back():
    job = build(run_cli.small_config(train__storage="compact"), 0)
    create = partial(job.create, job.make_network())
    state = create(job.rewire_key, job.step_key, job.knobs)
    held = storage.make(job, [job.knobs], state.params)
    for paths in ({}, {"fc1": "csr_gathered", "fc2": "csr"}):
        plan = [plans.of_masks(paths, state.masks, compact=True)]
        (small,) = held.pack([state], plan)
        sizes = [
            sum(v.nbytes for v in jax.tree.leaves(s.params)) for s in (state, small)
        ]
        assert sizes[1] < 0.3 * sizes[0]
        assert held.pack([small], plan)[0] is small
        (again,) = held.unpack([small], plan)
        assert held.unpack([again], plan)[0] is again
        assert jax.tree.structure(again) == jax.tree.structure(state)
        for a, b in zip(*map(jax.tree.leaves, (again, state)), strict=True):
            assert a.dtype == b.dtype
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["sparse", "packed"])
def test_it_goes_on_with_the_same_bits_and_paths(kind, request, tmp_path, monkeypatch):
    sparse = request.getfixturevalue(kind)
    own = {"train__execution": SPARSE}
    if kind == "packed":
        own |= {"train__storage": "compact", "train__ema_decay": 0.9}
    monkeypatch.setattr(execution_choice, "measure", pytest.fail)
    run = tmp_path / sparse.parent.name / sparse.name
    shutil.copytree(sparse, run)
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints" / "12")
    assert start(tmp_path, **own) == run
    for a, b in zip(
        jax.tree.leaves(network(sparse)), jax.tree.leaves(network(run)), strict=True
    ):
        assert a.tobytes() == b.tobytes()
    rows = [metrics.read(r / "metrics.jsonl") for r in (sparse, run)]
    assert rows[0] == rows[1]


def test_auto_takes_what_was_measured_and_keeps_it(tmp_path, monkeypatch):
    job = build(run_cli.small_config(train__execution="auto"), 0)
    made = job.make_network()
    times = {
        (784, 6): execution_choice.Times(dense=1.0, csr=0.9, csr_gathered=0.4),
        (6, 10): execution_choice.Times(dense=1.0, csr=0.9, csr_gathered=2.0),
    }
    steps = {}
    monkeypatch.setattr(
        execution_choice, "measure", lambda layer, *_: times[layer.kernel_shape]
    )
    monkeypatch.setattr(
        execution_choice, "least", lambda passes: list(steps.values())[: len(passes)]
    )
    record = tmp_path / "execution.json"
    args = job, job.create(made, job.rewire_key, job.step_key, job.knobs), record
    both = {"fc1": "csr_gathered", "fc2": "csr"}
    clear, dense = both | {"fc2": "dense"}, dict.fromkeys(both, "dense")
    for fastest, *own in (
        *((both, 1.0, 0.5, 0.6), (clear, 1.0, 0.6, 0.5)),
        (dense, 1.0, 0.98, 0.99),  # within the margin
    ):
        steps.update(zip(("dense", "both", "clear"), own, strict=True))
        assert plans.choose(*args) == fastest
    plans.keep(both, record)
    assert plans.choose(*args) == both
    record.unlink()
    assert plans.choose(job._replace(execution="csr"), *args[1:]) == dict.fromkeys(
        both, "csr"
    )
    times[784, 6] = times[6, 10] = execution_choice.Times(1.0, csr=2, csr_gathered=2)
    assert plans.choose(*args) == dense
    for text in ("{", "[]", "{}", '{"fc1": "csr", "fc2": "fast"}'):
        record.write_text(text)
        with pytest.raises(UserError, match=r"execution\.json is damaged; delete it"):
            plans.choose(*args)


@pytest.mark.parametrize("path", ["csr", "csr_gathered"])
@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [({}, 1e-5), ({"remat": True}, 1e-5), ({"dtype": jnp.bfloat16}, 0.1)],
    ids=["float32", "remat", "bfloat16"],
)
def test_networks_with_plans_are_the_same_functions(path, fields, tolerance):
    model, variables, masks = layer_kinds.network(**fields)
    params = variables["params"]
    assert list(model.layers) == layer_kinds.PLANNED
    plan = plans.of_masks(dict.fromkeys(model.layers, path), masks)
    images = jax.random.normal(jax.random.key(2), (5, *layer_kinds.IMAGE))

    @jax.jit
    def gradient(params, plan):
        def loss(p):
            args = p, variables["batch_stats"], images, True, None, plan
            logits, stats = model.apply(*args)
            return jnp.sum(jnp.sin(logits.astype(jnp.float32))), (logits, stats)

        return jax.grad(loss, has_aux=True)(params)

    (g, found), (wanted_g, wanted) = (gradient(params, p) for p in (plan, {}))
    program = str(jax.make_jaxpr(gradient)(params, plan))
    assert program.count("bcsr_dot_general") >= len(model.layers)

    def assert_close(a, b):
        a, b = (np.asarray(v).astype(np.float32) for v in (a, b))
        scale = np.abs(b).max() + 1e-6
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)

    jax.tree.map(assert_close, found, wanted)
    named, others = map(masks_lib.named_leaves, (g, wanted_g))
    for name, mask in masks_lib.named_leaves(masks).items():
        a, b = named[name], others[name]
        if mask is not None and path == "csr_gathered":
            assert not np.any(a[~mask])
            b = jnp.where(mask, b, 0)
        assert_close(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model__name": "resnet20", "model__widths": (), "model__norm_examples": 8},
            r"knows no model\.norm_examples",
        ),
        ({"sparsity__rule": "snfs"}, r"which snfs changes; write dense"),
        ({"sparsity__parameterization": "dnw"}, r"which dnw changes; write dense"),
        ({"train__storage": "small"}, r"train\.storage='small' is unknown; give one"),
        ({"train__execution": "sparse"}, r"train\.execution='sparse': write name="),
    ],
)
def test_wrong_choices_get_one_sentence(fields, message):
    config = run_cli.small_config(**({"train__execution": "auto"} | fields))
    with pytest.raises(UserError, match=message):
        build(config, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__execution": "fc9=csr"}, "train.execution: override={'fc9': 'csr'}"),
        (
            {"train__execution": "fc3=csr", "sparsity__dense_layers": "fc3"},
            "train.execution: fc3 has no inactive weights",
        ),
        ({"train__execution": "fc1=fast"}, "train.execution: override={'fc1': 'fast'}"),
        (
            {
                "train__execution": SPARSE,
                "train__seeds": "(0,1)",
                "train__population": "together",
            },
            "needs members that take turns",
        ),
        (
            {
                "train__storage": "compact",
                "train__seeds": "(0,1)",
                "train__population": "together",
            },
            "train.storage='compact' needs members that take turns",
        ),
    ],
)
def test_what_shows_only_at_the_start_too(tmp_path, fields, message):
    args = run_cli.flag_list("rigl_mlp:smoke", tmp_path, **(FIELDS | fields))
    outcome = run_cli.in_process(*args)
    (error,) = outcome.errors
    assert message in error
    assert not list(tmp_path.iterdir())
