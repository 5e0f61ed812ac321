"""Every method of configs/ on a small network, through the code that trains runs."""

import math
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli
from test_configs import NAMES, OWN, get_config
from test_readme import blocks

from lottery_flow import checkpoint, data, method, options
from lottery_flow.build import build, layers
from lottery_flow.errors import UserError
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.at_init import METHODS
from lottery_flow.sparsity.methods import PRUNING, RULES
from lottery_flow.sparsity.parameterizations import PARAMETERIZATIONS
from lottery_flow.sparsity.rules import is_rewire

LENET5 = [name for name in NAMES if name.endswith("_lenet5")]
# How many weights are active follows from the data.
FREE = {
    *("han_pruning", "str", "supermask", "variational_dropout"),
    *("l0_hard_concrete", "bayesian_compression"),
}


@pytest.fixture(autouse=True)
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def small(name):
    """The configuration's method, on the digits and a small MLP."""
    own = get_config(name)
    fields = {f"sparsity.{k}": v for k, v in own.sparsity.items()}
    fields |= {f"optim.{k}": own.optim[k] for k in ("name", "learning_rate")}
    fields |= {
        "model.widths": (12, 8),
        "sparsity.sparsity": own.sparsity.sparsity and min(own.sparsity.sparsity, 0.8),
        "sparsity.masks_from": "",
        "sparsity.weights_from": "",
        "sparsity.grow_examples": 30,
        "sparsity.interval_steps": 3,
        "sparsity.begin_steps": 0,
        "sparsity.end_steps": 9 if own.sparsity.end_steps > 0 else -1,
        "sparsity.penalty_warmup_steps": 0,
        "sparsity.dense_layers": own.sparsity.dense_layers.replace("conv1,conv2", ""),
    }
    if own.sparsity.at_init.endswith(("iterative", "synflow")):
        fields["sparsity.at_init_options"] = "rounds=3"
    if own.sparsity.rule == "dsr":
        fields["sparsity.rule_options"] = "n_prune=9"
    return run_cli.small_config(**{k.replace(".", "__"): v for k, v in fields.items()})


def n_active(masks, params):
    return sum(masks_lib.counts(masks, params).values())


def check_zeros(state):
    for mask, leaf in zip(
        jax.tree.leaves(state.masks),
        masks_lib.tree_leaves_at(state.masks, state.params),
        strict=True,
    ):
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])


@pytest.mark.parametrize("name", [name for name in LENET5 if name not in OWN])
def test_a_method_trains_and_rewires(name):
    config = small(name)
    job, rule = build(config, 0), config.sparsity.rule
    dataset = job.load_data()
    state = job.create(
        job.make_network(dataset), job.rewire_key, job.step_key, job.knobs
    )
    sizes = {k: v.size for k, v in masks_lib.layers(state.params).items()}
    kind = config.sparsity.parameterization or rule
    goal = sum(layers(config).n_active[name] for name in sizes)
    first = n_active(state.masks, state.params)
    if kind in PRUNING:
        assert first == sum(sizes.values())
    elif kind not in FREE:
        assert first == goal
    steps = job.make_steps()
    train, rewire = jax.jit(steps.train), jax.jit(steps.rewire)
    examples = data.examples(dataset, "train", 0, 64)
    batch = jax.tree.map(jnp.asarray, examples)
    indices = jnp.arange(16)
    for step in range(4):
        before = state
        if not is_rewire(job.rule, step):
            state, metrics = train(state, job.knobs, batch, indices)
        else:
            grow = batch if job.grow_examples else None
            state, metrics, _ = rewire(state, job.knobs, batch, indices, grow)
            if kind not in PRUNING:
                changed = jax.tree.map(
                    lambda a, b: bool(jnp.any(a != b)), before.masks, state.masks
                )
                assert any(jax.tree.leaves(changed)), "nothing was rewired"
        assert np.isfinite(metrics["loss"])
        check_zeros(state)
        if kind not in FREE | PRUNING:
            assert n_active(state.masks, state.params) == goal
    same = jax.tree.map(np.array_equal, before.params, state.params)
    assert not all(jax.tree.leaves(same))
    if kind in PRUNING:
        assert n_active(state.masks, state.params) < first


OTHERS = [name for name in NAMES if name not in OWN and "imagenette" not in name]


@pytest.mark.parametrize("name", OTHERS)
def test_the_full_size_is_what_the_configuration_says(name):
    config = get_config(name)
    job, found = build(config, 0), layers(config)
    sparse = {
        k: n for k, n in found.n_active.items() if n != math.prod(found.shapes[k])
    }
    sizes = [math.prod(found.shapes[k]) for k in sparse]
    if config.sparsity.granularity != "channel":  # of which there are few
        left = 1 - sum(sparse.values()) / sum(sizes)
        assert left == pytest.approx(config.sparsity.sparsity, abs=2e-3)
    assert job.total_steps == config.train.total_steps
    dense = config.sparsity.dense_layers.split(",")
    assert {name for name in dense if name} == found.shapes.keys() - sparse.keys()


def test_every_method_has_a_configuration():
    used = {"rule": set(), "at_init": set(), "parameterization": set()}
    for name in LENET5:
        for field, found in used.items():
            found.add(get_config(name).sparsity[field])
    assert used["rule"] == set(RULES)
    assert used["parameterization"] - {""} == set(PARAMETERIZATIONS)
    # Random masks need no name, and a ranking of each layer is an option of another.
    assert used["at_init"] - {""} == set(METHODS) - {"random", "snip_layerwise"}


def test_pruning_at_initialisation_keeps_the_weights_unless_they_are_drawn_anew():
    found = {}
    for fresh in (False, True):
        fields = {"at_init": "magnitude", "fresh_weights": fresh}
        job = run_cli.small_job(**{f"sparsity__{k}": v for k, v in fields.items()})
        found[fresh] = job.make_network(job.load_data())
    dense = run_cli.small_job(sparsity__sparsity=0.0).make_network()
    masks = [jax.tree.leaves(network.masks) for network in found.values()]
    assert all(np.array_equal(a, b) for a, b in zip(*masks, strict=True))
    for name, mask in masks_lib.named_leaves(found[False].masks).items():
        if mask is None:
            continue
        kernels = [
            np.asarray(masks_lib.named_leaves(network.params)[name])[np.asarray(mask)]
            for network in (dense, found[False], found[True])
        ]
        np.testing.assert_array_equal(kernels[0], kernels[1])
        assert not np.any(kernels[0] == kernels[2])


def test_invert_keeps_the_weights_of_least_sensitivity():
    found = []
    for text in ("", "invert=True"):
        job = run_cli.small_job(
            sparsity__at_init="magnitude", sparsity__at_init_options=text
        )
        found.append(job.make_network(job.load_data()))
    smallest = [
        min(
            float(jnp.min(jnp.abs(w), where=m, initial=jnp.inf))
            for w, m in zip(
                masks_lib.tree_leaves_at(network.masks, network.params),
                jax.tree.leaves(network.masks),
                strict=True,
            )
        )
        for network in found
    ]
    assert smallest[1] < smallest[0]


def test_a_collapsed_layer_is_told():
    job = run_cli.small_job(
        sparsity__at_init="magnitude",
        sparsity__sparsity=0.99,
        model__widths=(40, 2),
        sparsity__layer_sparsity="fc2=0.999",
    )
    # Of a magnitude that depends on the fan-in the widest layers go first.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        network = job.make_network(job.load_data())
    counts = masks_lib.counts(network.masks, network.params)
    empty = [name for name, n in counts.items() if not n]
    assert bool(empty) == any("no active weight" in str(w.message) for w in told)
    for name in empty:
        assert any(name in str(w.message) for w in told)


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity__parameterization": "edge_popup", "optim__learning_rate": 0.1},
        {"sparsity__at_init": "snip", "sparsity__rule": "rigl"},
    ],
    ids=["edge_popup", "snip_rigl"],
)
def test_a_run_goes_on_with_the_same_bits(tmp_path, fields):
    """As after a kill between its two last checkpoints."""
    args = run_cli.flag_list("scratch_mlp:smoke", tmp_path, **fields)
    assert not run_cli.in_process(*args).errors
    run = run_cli.run_directory(tmp_path, 0)
    rows = (run / "metrics.jsonl").read_bytes()
    whole = checkpoint.restore_network(run / "checkpoints")[1]
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints" / "12")
    assert not run_cli.in_process(*args).errors
    step, again = checkpoint.restore_network(run / "checkpoints")
    assert step == 12
    assert (run / "metrics.jsonl").read_bytes() == rows
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "sett"}, r"sparsity\.rule='sett' is unknown"),
        ({"rule_options": "a=1"}, r"rule_options: a is no option here; leave it empty"),
        ({"rule": "dsr"}, r"sparsity\.rule_options: n_prune is missing"),
        ({"rule_options": "a"}, r"rule_options='a': write name=value"),
        (
            {"rule": "snfs", "rule_options": "deca=0.5"},
            r"deca is no option here; there are decay, redistribute",
        ),
        ({"at_init": "snop"}, r"sparsity\.at_init='snop' is unknown"),
        ({"at_init": "snip", "masks_from": "x"}, r"sparsity\.masks_from='x'"),
        ({"at_init": "snip", "at_init_options": "x=1"}, r"x is no option here"),
        ({"at_init": "snip", "at_init_options": "rounds=x"}, r"rounds='x' is not of"),
        (
            {"at_init": "snip", "parameterization": "dnw"},
            r"dnw starts from all weights",
        ),
        ({"fresh_weights": True}, r"nothing is pruned at initialisation"),
        ({"parameterization": "dnv"}, r"sparsity\.parameterization='dnv' is unknown"),
        ({"parameterization": "dnw", "rule": "set"}, r"sparsity\.rule='set'"),
        ({"parameterization": "dnw", "sparsity": 0.0}, r"makes no layer sparse"),
        ({"parameterization_options": "a=1"}, r"there is no parameterization"),
        ({"grow_init": "grad_sign"}, r"static grows no weights"),
        ({"rule": "rigl", "grow_init": "ones"}, r"sparsity\.grow_init='ones'"),
        ({"granularity": "4x4"}, r"sparsity\.granularity='4x4' is unknown"),
        ({"granularity": "4:2"}, r"sparsity\.granularity='4:2'"),
        ({"granularity": "2:4"}, r"has the sparsity 0\.5"),
        ({"granularity": "channel", "rule": "snfs"}, r"snfs knows single weights"),
    ],
)
def test_wrong_methods_get_one_sentence(fields, message):
    config = run_cli.small_config(**{f"sparsity__{k}": v for k, v in fields.items()})
    with pytest.raises(UserError, match=message) as caught:
        build(config, 0)
    assert "\n" not in str(caught.value)


# --- Calling by the names of arguments ----------------------------------------------


def test_options_are_numbers_and_words():
    found = options.parse("f", " a=1, b=-0.5,c=True ,d=per_layer")
    assert found == {"a": 1, "b": -0.5, "c": True, "d": "per_layer"}
    assert options.parse("f", "") == {}


def test_what_is_given_is_called_only_where_it_is_asked_for():
    def make(a, b=2, *, c):
        return a, b, c

    given = {"a": lambda: 1, "b": lambda: 3, "x": pytest.fail}
    assert options.call("f", make, given, "c=4") == (1, 3, 4)
    assert options.call("f", make, given, "c=4,b=5") == (1, 5, 4)
    with pytest.raises(UserError, match=re.escape("f: c is missing; write c=...")):
        options.call("f", make, given, "")


def test_a_method_from_outside_needs_its_function_the_dict_and_a_config(monkeypatch):
    """That of the README."""
    monkeypatch.setitem(RULES, "careless", None)  # forgotten again at the end
    exec(blocks()[3], {"__name__": "careless"})
    fields = {"rule": "careless", "rule_options": "share=0.5"}
    job = run_cli.small_job(**{f"sparsity__{k}": v for k, v in fields.items()})
    state = job.create(job.make_network(), job.rewire_key, job.step_key, job.knobs)
    dataset = job.load_data()
    batch = jax.tree.map(jnp.asarray, data.examples(dataset, "train", 0, 64))
    after, *_ = jax.jit(job.make_steps().rewire)(
        state, job.knobs, batch, jnp.arange(16), batch
    )
    dropped = {}
    for name, mask in masks_lib.named_leaves(state.masks).items():
        if mask is not None:
            kept = mask & masks_lib.named_leaves(after.masks)[name]
            dropped[name] = int(mask.sum()) - int(kept.sum())
    assert n_active(after.masks, after.params) == n_active(state.masks, state.params)
    for name, n in dropped.items():
        active = masks_lib.counts(state.masks, state.params)[name]
        assert 0 < n <= int(active * 0.5 * 0.3)
    assert method.takes(run_cli.small_config(sparsity__rule="careless"), "fraction")
