"""One table runs the promises of a parameterization over all methods."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import parameterizations
from lottery_flow.sparsity.parameterization import Raw

STEPS = 40
ACTIVE = {"fc1": 41, "fc2": 60}
BACKWARD = {"fc1": 70, "fc2": 96}
SHAPES = {
    "fc1": {"kernel": (8, 16), "bias": (16,)},
    "fc2": {"kernel": (16, 12)},
    "head": {"kernel": (12, 2), "bias": (2,)},  # stays dense
}


class Row(NamedTuple):
    name: str
    options: dict
    learning_rate: float
    counts: dict | int | None = None  # of active weights, by layer or in all
    decayed: tuple = ()
    frozen: tuple = ()
    dense_frozen: bool = False
    stochastic: bool = False


SCORES = dict(decayed=("scores",), frozen=("weights",), dense_frozen=True)
LOGITS = dict(frozen=("weights",), dense_frozen=True, stochastic=True)
ROWS = {
    "dnw": Row("dnw", {"n_active": ACTIVE}, 0.05, ACTIVE, ("weights",)),
    "global": Row(
        "magnitude_ste",
        {"n_active": ACTIVE, "scope": "global"},
        0.05,
        sum(ACTIVE.values()),
        ("weights",),
    ),
    "top_kast": Row(
        "top_kast",
        {"n_active_forward": ACTIVE, "n_active_backward": BACKWARD},
        0.05,
        ACTIVE,
    ),
    "str": Row("str", {"init": -3.0}, 0.05, None, ("weights", "thresholds")),
    "edge_popup": Row("edge_popup", {"n_active": ACTIVE}, 0.1, ACTIVE, **SCORES),
    "supermask": Row("supermask", {}, 5.0, **LOGITS),
    "variational_dropout": Row(
        "variational_dropout",
        {"kl_scale": 1e-3, "warmup": optax.linear_schedule(0.0, 1.0, 20)},
        0.05,
        stochastic=True,
    ),
    "l0": Row(
        "l0_hard_concrete",
        {"l0_scale": 1e-3},
        0.05,
        decayed=("theta",),
        stochastic=True,
    ),
    "bayesian_compression": Row(
        "bayesian_compression",
        {"kl_scale": 1e-3, "threshold": {"fc1": -8.9995, "fc2": -3.0}},
        0.05,
        stochastic=True,
    ),
}
NAMES = list(ROWS)


def method(name):
    row = ROWS[name]
    return parameterizations.PARAMETERIZATIONS[row.name](**row.options)


def start_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) * (2 / s[0]) ** 0.5, dtype),
        SHAPES,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def forward(params, x):
    x = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    x = jnp.tanh(x @ params["fc2"]["kernel"])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def data():
    x = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    return x, np.stack([np.sin(x[:, 0]) + x[:, 1], x[:, 2] * x[:, 3]], axis=1)


class Run(NamedTuple):
    first: Raw
    last: Raw
    losses: np.ndarray
    penalties: np.ndarray
    params: dict  # in evaluation, first and last
    active: dict
    noisy: dict  # the last in training, by keys 1, 1, 2


@functools.cache
def trained(name) -> Run:
    """A run of gradient descent, all of it in one program."""
    p, row = method(name), ROWS[name]
    params = start_params()
    masks = masks_lib.full(params, ACTIVE)
    x, y = data()
    tx = optax.chain(
        optax.add_decayed_weights(1e-3, mask=p.decayed),
        optax.sgd(row.learning_rate, momentum=0.9),
    )

    def loss_fn(raw, key, step):
        weights = p.weights(raw, key, True)
        loss = jnp.mean(jnp.square(forward(weights, x) - y))
        penalty = p.penalty(raw, step)
        return loss + penalty, (loss, penalty)

    @jax.jit
    def run(key):
        raw = p.init(key, params, masks)

        def one(carry, step):
            raw, state = carry
            grads, terms = jax.grad(loss_fn, has_aux=True)(
                raw, jax.random.fold_in(key, step), step
            )
            updates, state = tx.update(grads, state, raw)
            updates = jax.tree.map(
                lambda moves, u: u if moves else jnp.zeros_like(u),
                p.trained(raw),
                updates,
            )
            raw = optax.apply_updates(raw, updates)
            return (raw, state), terms

        (last, _), (losses, penalties) = jax.lax.scan(
            one, (raw, tx.init(raw)), jnp.arange(STEPS, dtype=jnp.int32)
        )

        def evaluate(raw):
            return p.weights(raw, None, False), p.masks(raw)

        # One program for both, and for all keys: compiling takes most of the time.
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), raw, last)
        shown, active = jax.lax.map(evaluate, both)
        noisy = jax.lax.map(
            lambda i: p.weights(last, jax.random.key(i), True), jnp.array([1, 1, 2])
        )
        return Run(raw, last, losses, penalties, shown, active, noisy)

    return jax.device_get(run(jax.random.key(0)))


def part(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def same_bits(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b))


def test_the_table_has_every_method():
    assert {row.name for row in ROWS.values()} | {"dnw"} == set(
        parameterizations.PARAMETERIZATIONS
    )


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls(name):
    run, third = trained(name), STEPS // 3
    assert np.isfinite(run.losses).all()
    assert run.losses[-third:].mean() < 0.8 * run.losses[:third].mean()


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_where_weights_are_not_zero(name):
    run = trained(name)
    for i in range(2):
        params, masks = part(run.params, i), part(run.active, i)
        masks_lib.check(masks, params)
        named = masks_lib.named_leaves(masks)
        assert {k for k, m in named.items() if m is not None} == set(ACTIVE)
        for layer in ACTIVE:
            kernel = params[layer]["kernel"]
            np.testing.assert_array_equal(named[layer], kernel.view(np.uint32) != 0)


@pytest.mark.parametrize("name", NAMES)
def test_counts(name):
    run, counts = trained(name), ROWS[name].counts
    for masks in (part(run.active, 0), part(run.active, 1)):
        found = {k: int(masks[k]["kernel"].sum()) for k in ACTIVE}
        if isinstance(counts, dict):
            assert found == counts
        elif counts is not None:
            assert sum(found.values()) == counts
        else:
            assert all(0 < n <= masks[k]["kernel"].size for k, n in found.items())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(name):
    run, row = trained(name), ROWS[name]
    flags = method(name).trained(run.first)
    assert jax.tree.structure(flags) == jax.tree.structure(run.first)
    assert all(flag == (not row.dense_frozen) for flag in jax.tree.leaves(flags.dense))
    for quantity, tree in flags.sparse.items():
        wanted = quantity not in row.frozen
        assert all(flag == wanted for flag in jax.tree.leaves(tree))
    moved = jax.tree.map(lambda a, b: a.tobytes() != b.tobytes(), run.first, run.last)
    assert moved == flags


@pytest.mark.parametrize("name", NAMES)
def test_dense_leaves_reach_the_model_with_their_bits(name):
    run, params = trained(name), jax.device_get(start_params())
    for i, raw in enumerate((run.first, run.last)):
        shown = part(run.params, i)
        assert same_bits(raw.dense["head"], shown["head"])
        assert same_bits(raw.dense["fc1"]["bias"], shown["fc1"]["bias"])
    assert same_bits(run.first.dense["head"], params["head"])


@pytest.mark.parametrize("name", NAMES)
def test_what_decays(name):
    run, row = trained(name), ROWS[name]
    flags = method(name).decayed(run.first)
    assert jax.tree.structure(flags) == jax.tree.structure(run.first)
    assert flags.dense == {
        "fc1": {"kernel": None, "bias": False},
        "fc2": {"kernel": None},
        "head": {"kernel": not row.dense_frozen, "bias": False},
    }
    for quantity, tree in flags.sparse.items():
        wanted = quantity in row.decayed
        assert all(flag == wanted for flag in jax.tree.leaves(tree))
    assert set(row.decayed) <= flags.sparse.keys()


@pytest.mark.parametrize("name", NAMES)
def test_penalty_is_a_finite_scalar_with_finite_gradients(name):
    run = trained(name)
    assert run.penalties.dtype == np.float32
    assert run.penalties.shape == (STEPS,)
    assert np.isfinite(run.penalties).all()
    for leaf in jax.tree.leaves(run.last):  # every step added its gradient
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_key_matters_in_training_of_stochastic_methods_alone(name):
    run, is_stochastic = trained(name), ROWS[name].stochastic
    first, again, other = (part(run.noisy, i) for i in range(3))
    assert same_bits(first, again)
    assert same_bits(first, other) == (not is_stochastic)
    assert is_stochastic or same_bits(first, part(run.params, 1))
    if is_stochastic:
        evaluated = jax.jit(lambda raw, key: method(name).weights(raw, key, False))
        shown = jax.device_get(evaluated(run.last, jax.random.key(1)))
        assert same_bits(shown, part(run.params, 1))
        with pytest.raises(ValueError, match="key=None: training draws noise"):
            method(name).weights(run.last, None, True)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_kept_for_several_members_in_bfloat16(name):
    """Traced alone: strict promotion and batching rules speak up there."""
    p, params = method(name), start_params(jnp.bfloat16)
    masks = masks_lib.full(params, ACTIVE)

    def loss(raw, key):
        weights = p.weights(raw, key, True)
        sums = [jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(weights)]
        return sum(sums) + p.penalty(raw, jnp.int32(3)), weights

    def member(key):
        raw = p.init(key, params, masks)
        grads, weights = jax.grad(loss, has_aux=True)(raw, key)
        return raw, grads, weights, p.weights(raw, None, False)

    keys = jax.random.split(jax.random.key(0), 3)
    raw, grads, *shown = jax.eval_shape(jax.vmap(member), keys)
    for leaf in jax.tree.leaves((raw, grads, shown)):
        assert leaf.dtype == jnp.bfloat16
    shapes = jax.tree.map(lambda x: (3, *x.shape), params)
    for weights in shown:
        assert jax.tree.map(lambda x: x.shape, weights) == shapes


def test_draws_of_a_layer_do_not_depend_on_which_others_are_dense():
    p = parameterizations.edge_popup({"fc2": 60})
    both = trained("edge_popup").first.sparse["scores"]["fc2"]["kernel"]
    params = start_params()
    raw = p.init(jax.random.key(0), params, masks_lib.full(params, {"fc2": 60}))
    assert raw.sparse["scores"]["fc1"]["kernel"] is None
    np.testing.assert_array_equal(raw.sparse["scores"]["fc2"]["kernel"], both)


@pytest.mark.parametrize("name", ["dnw", "l0", "variational_dropout"])
def test_without_a_mask_anywhere_the_network_is_dense(name):
    options = {**ROWS[name].options} | ({"n_active": {}} if name == "dnw" else {})
    p = parameterizations.PARAMETERIZATIONS[ROWS[name].name](**options)
    params = start_params()
    raw = p.init(jax.random.key(0), params, masks_lib.dense(params))
    assert same_bits(
        jax.device_get(p.weights(raw, None, False)), jax.device_get(params)
    )
    assert p.masks(raw) == masks_lib.dense(params)
    assert p.penalty(raw, jnp.int32(0)) == 0.0


def test_masks_that_do_not_fit_are_rejected():
    params = start_params()
    masks = {**masks_lib.full(params, ACTIVE), "fc2": {"kernel": jnp.ones(3, bool)}}
    with pytest.raises(ValueError, match="layer fc2 has shape"):
        method("l0").init(jax.random.key(0), params, masks)
