"""sparsify(): one table of (optimizer, rule) rows runs every promise over all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery_flow.sparsity import (
    granularity,
    rules,
    rules_adaptive,
    rules_growth,
    rules_pruning,
    schedules,
)
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.transform import sparsify

STEPS, EVERY = 22, 5
SHAPES = {
    "conv": {"kernel": (2, 2, 2, 4), "bias": (4,)},
    "fc": {"kernel": (6, 5)},
    "head": {"kernel": (5, 3)},  # stays dense
}
ACTIVE = {"conv": 14, "fc": 16}
FINAL_SPARSITY = {"conv": 0.8, "fc": 0.9}
RATE = optax.cosine_decay_schedule(0.1, 40)


def is_kernel(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def kind(params):
    return jax.tree.map(lambda p: "kernel" if p.ndim > 1 else "bias", params)


def to_bfloat16(updates, params):
    return jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates)


OPTIMIZERS = {
    "momentum": optax.sgd(RATE, momentum=0.9),
    "nesterov_decay": optax.chain(
        optax.add_decayed_weights(1e-2, mask=is_kernel),
        optax.sgd(RATE, momentum=0.9, nesterov=True),
    ),
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE, weight_decay=0.1),
    "lion": optax.lion(RATE),
    "rmsprop": optax.rmsprop(RATE, momentum=0.9, initial_scale=0.5),
    "inject": optax.inject_hyperparams(optax.sgd)(learning_rate=RATE, momentum=0.9),
    "multi_steps": optax.MultiSteps(
        optax.sgd(RATE, momentum=0.9), every_k_schedule=2
    ).gradient_transformation(),
    "partition": optax.partition(
        {"kernel": optax.adamw(RATE), "bias": optax.sgd(RATE)}, kind
    ),
    "noise": optax.chain(
        optax.add_noise(0.1, 0.5, key=0), optax.sgd(RATE, momentum=0.9)
    ),
    "adam_mu_bfloat16": optax.adam(RATE, mu_dtype=jnp.bfloat16),
    "params_bfloat16": optax.sgd(RATE, momentum=0.9),
    "updates_bfloat16": optax.chain(
        optax.sgd(RATE, momentum=0.9), optax.stateless(to_bfloat16)
    ),
}

_TIMES = schedules.every(EVERY), schedules.constant(0.5)
RULES = {
    "static": rules.static(),
    "set": rules.set_(*_TIMES),
    "rigl": rules.rigl(*_TIMES),
    "rigl_instead": rules.rigl(*_TIMES, timing="instead"),
    "rigl_inverted": rules.rigl_inverted(*_TIMES),
    "gradual_pruning": rules.gradual_pruning(
        begin=5, end=20, interval=EVERY, final_sparsity=FINAL_SPARSITY
    ),
    "set_signed": rules.set_signed(*_TIMES),
    "one_of_two": rules.rigl(*_TIMES, granularity=granularity.n_of_m(1, 2)),
    "rigl_grad_sign": rules_growth.with_grown(rules.rigl(*_TIMES), "grad_sign", 3.0),
    "snfs": rules_adaptive.snfs(*_TIMES),
    "dsr": rules_adaptive.dsr(_TIMES[0], n_prune=6, threshold=0.4),
    "global_pruning": rules_pruning.global_gradual_pruning(
        begin=5, end=20, interval=EVERY, final_sparsity=0.85
    ),
    "han_pruning": rules_pruning.han_pruning(_TIMES[0], 0.4),
}
# These start from full masks and grow nothing.
PRUNING = "gradual_pruning", "global_pruning", "han_pruning"
ROWS = [(name, "rigl") for name in OPTIMIZERS] + [
    ("momentum", "static"),
    ("momentum", "set"),
    ("lion", "rigl_inverted"),
    ("momentum", "gradual_pruning"),
    ("params_bfloat16", "gradual_pruning"),
    ("momentum", "rigl_instead"),
    ("adam", "rigl_instead"),
    ("multi_steps", "rigl_instead"),
    ("updates_bfloat16", "rigl_instead"),
    ("momentum", "set_signed"),
    ("momentum", "one_of_two"),
    ("updates_bfloat16", "rigl_grad_sign"),
    ("momentum", "snfs"),
    ("params_bfloat16", "dsr"),
    ("momentum", "global_pruning"),
    ("momentum", "han_pruning"),
]
every_row = pytest.mark.parametrize("row", ROWS, ids="-".join)


def random_tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def kernels(tree):
    return {name: np.asarray(tree[name]["kernel"]) for name in ACTIVE}


def slots(inner_state):
    """Every array of the optimizer that belongs to a masked kernel."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner_state):
        name = jax.tree_util.keystr(path)
        for layer in ACTIVE:
            if name.endswith(f"['{layer}']['kernel']"):
                found[name] = layer, np.asarray(leaf)
    return found


def counters(inner_state):
    return [int(v) for _, v in optax.tree.get_all_with_path(inner_state, "count")]


def bits(x):
    return np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")


@functools.cache
def run(row):
    """One dict a step: before, after, and after a plain step of the optimizer."""
    name, rule_name = row
    inner = OPTIMIZERS[name]
    dtype = jnp.bfloat16 if name == "params_bfloat16" else jnp.float32
    params = random_tree(0, dtype)
    key = jax.random.key(1)
    masks = masks_lib.random(key, params, ACTIVE)
    if rule_name in PRUNING:
        masks = masks_lib.full(params, ACTIVE)
    elif rule_name == "one_of_two":
        half, shape = {"conv": 16, "fc": 15}, granularity.n_of_m(1, 2)
        masks = granularity.random(key, params, half, shape)
    tx = sparsify(inner, masks, RULES[rule_name], key=key)

    def both(grads, state, params):
        sparse_grads = jax.tree.map(
            lambda m, g: g if m is None else jnp.where(m, g, jnp.zeros_like(g)),
            state.masks,
            grads,
            is_leaf=lambda x: x is None,
        )
        plain = inner.update(sparse_grads, state.inner_state, params)
        return tx.update(grads, state, params), plain

    def look(params, state):
        return {
            "params": kernels(params),
            "head": np.asarray(params["head"]["kernel"]),
            "bias": np.asarray(params["conv"]["bias"]),
            "masks": kernels(state.masks),
            "slots": slots(state.inner_state),
            "counters": counters(state.inner_state),
            "state": state,
        }

    # The fusions of the default options round bfloat16 in places of their own.
    quick = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    both = jax.jit(both, compiler_options=None if "bfloat16" in name else quick)
    steps = []
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        params = masks_lib.apply(masks, params)
        state = tx.init(params)
        before = initial = look(params, state)
        for n in range(STEPS):
            (updates, new_state), plain = both(random_tree(n + 1, dtype), state, params)
            plain_state = state._replace(inner_state=plain[1])
            plain = look(optax.apply_updates(params, plain[0]), plain_state)
            params, state = optax.apply_updates(params, updates), new_state
            after = look(params, state)
            steps.append(dict(before=before, after=after, plain=plain, n=n))
            before = after
    return initial, steps


def is_due(rule_name, n):
    first = {"static": np.inf, "rigl_instead": 0}.get(rule_name, EVERY - 1)
    return n >= first and (n - first) % EVERY == 0


def rewires(row):
    return [s for s in run(row)[1] if is_due(row[1], s["n"])]


def wanted_counts(rule_name, n):
    """Active weights of each layer, or of all; None where the weights decide."""
    if rule_name == "han_pruning":
        return None
    if rule_name in ("snfs", "dsr"):
        return sum(ACTIVE.values())
    if rule_name == "one_of_two":
        return {"conv": 16, "fc": 15}
    if rule_name not in PRUNING:
        return ACTIVE
    t = EVERY * ((n + 1) // EVERY)
    left = 1 - np.clip((t - 5) / 15, 0, 1)
    if rule_name == "global_pruning":
        return round(62 * (1 - (0.85 - 0.85 * left**3)))
    sizes = {"conv": 32, "fc": 30}
    return {
        k: round(sizes[k] * (1 - (s - s * left**3))) for k, s in FINAL_SPARSITY.items()
    }


def close(row, actual, expected):
    rtol = 2e-2 if "bfloat16" in row[0] else 1e-5
    actual, expected = (x.astype(np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol / 10)


@every_row
def test_after_every_step_an_inactive_weight_is_bit_exactly_zero(row):
    initial, steps = run(row)
    for look in (initial, *(s["after"] for s in steps)):
        for layer, weights in look["params"].items():
            assert not bits(weights)[~look["masks"][layer]].any()
            assert np.isfinite(weights.astype(np.float32)).all()


@every_row
def test_a_rewire_conserves_the_budget_exactly_layer_by_layer(row):
    for s in run(row)[1]:
        counts = {k: int(m.sum()) for k, m in s["after"]["masks"].items()}
        wanted = wanted_counts(row[1], s["n"])
        if wanted is not None:
            given = counts if isinstance(wanted, dict) else sum(counts.values())
            assert given == wanted


@pytest.mark.parametrize("row", [r for r in ROWS if r[1] in PRUNING], ids="-".join)
def test_a_pruned_weight_never_returns(row):
    for s in run(row)[1]:
        for layer, mask in s["after"]["masks"].items():
            assert not (mask & ~s["before"]["masks"][layer]).any()


@pytest.mark.parametrize("rule_name", ["snfs", "dsr"])
def test_rules_that_move_weights_between_layers_do(rule_name):
    (row,) = (r for r in ROWS if r[1] == rule_name)
    counts = [s["after"]["masks"]["fc"].sum() for s in run(row)[1]]
    assert len(set(counts)) > 1


@every_row
def test_masks_change_in_due_steps_only(row):
    for s in run(row)[1]:
        pairs = [(s["before"]["masks"][k], s["after"]["masks"][k]) for k in ACTIVE]
        changed = any((a != b).any() for a, b in pairs)
        gradual = row[1] in ("gradual_pruning", "global_pruning")
        first_pruning = gradual and s["n"] == EVERY - 1
        assert changed == (is_due(row[1], s["n"]) and not first_pruning)


@every_row
def test_a_newly_grown_weight_starts_at_zero_with_its_slots_as_at_init(row):
    """Or at the value of the rule, with the same bits."""
    initial, n_born = run(row)[0], 0
    for s in rewires(row):
        born = {k: m & ~s["before"]["masks"][k] for k, m in s["after"]["masks"].items()}
        for layer, where in born.items():
            n_born += where.sum()
            value = s["after"]["params"][layer]
            start = np.zeros_like(value)
            if row[1] == "rigl_grad_sign":
                start = np.sign(random_tree(s["n"] + 1)[layer]["kernel"]) / np.float32(
                    3
                )
            assert (bits(value) == bits(start))[where].all()
        for path, (layer, slot) in s["after"]["slots"].items():
            at_init = initial["slots"][path][1]
            assert (slot == at_init)[born[layer]].all()
    assert initial["slots"]
    assert (n_born > 0) == (row[1] not in ("static", *PRUNING))


@every_row
def test_other_weights_keep_their_value_and_their_slots(row):
    """Of the plain step, or with timing 'instead' of the weights before it."""
    for s in run(row)[1]:
        instead = row[1] == "rigl_instead" and is_due(row[1], s["n"])
        source = s["before"] if instead else s["plain"]
        after = s["after"]
        for layer, mask in after["masks"].items():
            stay = mask & s["before"]["masks"][layer]
            close(row, after["params"][layer][stay], source["params"][layer][stay])
        for path, (layer, slot) in after["slots"].items():
            stay = after["masks"][layer] & s["before"]["masks"][layer]
            close(row, slot[stay], source["slots"][path][1][stay])
        for dense in ("head", "bias"):
            close(row, after[dense], source[dense])


@pytest.mark.parametrize("row", [r for r in ROWS if "rigl" in r[1]], ids="-".join)
def test_a_weight_that_is_dropped_and_grown_again_at_once_occurs(row):
    """So that the test above holds of such weights too."""
    n_regrown = 0
    for s in rewires(row):
        source = s["before" if row[1] == "rigl_instead" else "plain"]["params"]
        for layer, mask in s["before"]["masks"].items():
            size = np.where(mask, np.abs(source[layer].astype(np.float32)), -1.0)
            kept = np.argsort(-size, axis=None)[: ACTIVE[layer] - ACTIVE[layer] // 2]
            regrown = (mask & s["after"]["masks"][layer]).ravel()
            n_regrown += regrown.sum() - regrown[kept].sum()
            assert regrown[kept].all()
    assert n_regrown > 0


@every_row
def test_the_schedule_counter_equals_the_global_step(row):
    for s in run(row)[1]:
        state, n = s["after"]["state"], s["n"] + 1
        assert int(state.step) == n
        if row[0] == "multi_steps":
            n, inner = n // 2, state.inner_state
            assert (int(inner.mini_step), int(inner.gradient_step)) == (
                (s["n"] + 1) % 2,
                n,
            )
        assert s["after"]["counters"]
        assert set(s["after"]["counters"]) == {n}
        if row[0] == "inject":
            rate = state.inner_state.hyperparams["learning_rate"]
            np.testing.assert_allclose(rate, RATE(s["n"]), rtol=1e-6)
