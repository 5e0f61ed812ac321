"""Runs whose linear layers are computed by their active weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, metrics, plans
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


def test_it_goes_on_with_the_same_bits_and_paths(sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(execution_choice, "measure", pytest.fail)
    run = tmp_path / sparse.parent.name / sparse.name
    shutil.copytree(sparse, run)
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints" / "12")
    assert start(tmp_path, train__execution=SPARSE) == run
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
        (784, 6): execution_choice.Times(dense=1.0, csr=0.9, csr_gathered=0.5),
        (6, 10): execution_choice.Times(dense=1.0, csr=0.99, csr_gathered=2.0),
    }
    monkeypatch.setattr(execution_choice, "measure", lambda shape, *_: times[shape])
    record = tmp_path / "execution.json"
    args = job, made.params, made.masks, record
    chosen = plans.choose(*args)
    assert chosen == {"fc1": "csr_gathered", "fc2": "dense"}
    plans.keep(chosen, record)
    times[784, 6] = execution_choice.Times(dense=1.0, csr=2.0, csr_gathered=2.0)
    assert plans.choose(*args) == {"fc1": "csr_gathered", "fc2": "dense"}
    record.unlink()
    assert set(plans.choose(*args).values()) == {"dense"}
    for text in ("{", "[]", "{}", '{"fc1": "csr", "fc2": "fast"}'):
        record.write_text(text)
        with pytest.raises(UserError, match=r"execution\.json is damaged; delete it"):
            plans.choose(*args)


@pytest.mark.parametrize("model", ["mlp", "lenet5"])
def test_networks_with_plans_are_the_same_functions(model):
    widths = {"mlp": (30, 20), "lenet5": (2, 3, 30, 20)}[model]
    job = build(run_cli.small_config(model__name=model, model__widths=widths), 0)
    made = job.make_network()
    paths = {"fc1": "csr", "fc2": "csr_gathered"}
    own = plans.of_masks(paths, made.masks)
    images = jax.random.uniform(jax.random.key(0), (5, 28, 28, 1))

    @jax.jit
    def gradient(params, plan):
        def loss(p):
            logits, _ = job.model.apply(p, {}, images, True, None, plan)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.grad(loss, has_aux=True)(params)

    (g, logits), (wanted_g, wanted) = (gradient(made.params, p) for p in (own, {}))
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)
    masks = masks_lib.named_leaves(made.masks)
    for name, leaf in masks_lib.named_leaves(g).items():
        other = masks_lib.named_leaves(wanted_g)[name]
        if paths.get(name) == "csr_gathered":
            assert not np.any(leaf[~masks[name]])
            leaf, other = leaf[masks[name]], other[masks[name]]
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__name": "resnet20", "model__widths": ()}, r"of resnet20 all layers"),
        ({"sparsity__rule": "snfs"}, r"which snfs changes; write dense"),
        ({"sparsity__parameterization": "dnw"}, r"which dnw changes; write dense"),
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
    ],
)
def test_what_shows_only_at_the_start_too(tmp_path, fields, message):
    args = run_cli.flag_list("rigl_mlp:smoke", tmp_path, **(FIELDS | fields))
    outcome = run_cli.in_process(*args)
    (error,) = outcome.errors
    assert message in error
    assert not list(tmp_path.iterdir())
