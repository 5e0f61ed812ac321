"""Granularity: groups against numpy, and what rules keep of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from uniformity import p_value_uniform

from lottery_flow.sparsity import granularity as lib
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules, schedules
from lottery_flow.sparsity.transform import sparsify

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
SHAPES = {"conv": (2, 3, 4, 6), "fc": (8, 12), "head": (5, 3)}
BLOCK, CHANNEL, TWO_OF_FOUR = lib.block(4, 3), lib.channel(), lib.n_of_m(2, 4)
ALL = {"block": BLOCK, "channel": CHANNEL, "n_of_m": TWO_OF_FOUR}
# Active weights: half of conv (24 x 6) and fc (8 x 12).
HALF = {"conv": 72, "fc": 48}
ALWAYS = schedules.every(1)
every_kind = pytest.mark.parametrize("kind", ALL)


def draw(seed):
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.standard_normal(s, np.float32)) for k, s in SHAPES.items()
    }


@functools.cache
def half(kind):
    """Random masks of half of the weights."""
    return jit(lambda key: lib.random(key, draw(0), HALF, ALL[kind]))(jax.random.key(2))


def tiles(x, rows, columns):
    """[(tile, its entries)], cut out of the matrix one by one."""
    matrix = np.asarray(x).reshape(-1, x.shape[-1])
    return [
        matrix[i : i + rows, j : j + columns].ravel()
        for i in range(0, matrix.shape[0], rows)
        for j in range(0, matrix.shape[1], columns)
    ]


def assert_fits(kind, masks, counts=HALF):
    for k, n in counts.items():
        mask, fan_in = masks[k], np.prod(SHAPES[k][:-1])
        assert mask.sum() == n
        if kind == "n_of_m":
            assert {int(t.sum()) for t in tiles(mask, 4, 1)} == {2}
        else:
            sides = (4, 3) if kind == "block" else (fan_in, 1)
            assert all(t.all() or not t.any() for t in tiles(mask, *sides))


# Groups


@pytest.mark.parametrize("kind", ["block", "channel"])
def test_pool_and_expand_by_tiles(kind):
    x = draw(0)["conv"]
    sides = (4, 3) if kind == "block" else (24, 1)
    expected = [t.mean() for t in tiles(x, *sides)]
    pooled = lib.pool(ALL[kind], x)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    flags = pooled > 0
    mask = lib.expand(ALL[kind], flags, x.shape)
    assert mask.shape == x.shape
    np.testing.assert_array_equal([t.all() for t in tiles(mask, *sides)], flags)
    np.testing.assert_array_equal(lib.pool(ALL[kind], mask), flags)


def test_the_mean_of_bfloat16_scores_is_taken_in_float32():
    scores = jnp.array([[256.0, 1.0], [256.0, 0.0]], jnp.bfloat16)
    assert lib.pool(lib.block(1, 2), scores).tolist() == [128.5, 128.0]


@every_kind
def test_random_masks_have_exact_counts_and_whole_groups(kind):
    assert_fits(kind, half(kind))
    assert half(kind)["head"] is None


def test_random_masks_are_uniform_over_groups():
    params = {"w": jnp.zeros((4, 6))}
    keys = jax.random.split(jax.random.key(3), 300)
    for kind, n_chosen in (("block", 1), ("n_of_m", 2)):
        one = functools.partial(
            lib.random, params=params, n_active={"w": 12}, granularity=ALL[kind]
        )
        masks = np.asarray(jit(jax.vmap(one))(keys)["w"])
        chosen = masks[:, 0, ::3] if kind == "block" else masks[:, :, 2]
        assert p_value_uniform(chosen, n_chosen) > 1e-3


def test_unstructured_random_masks_are_those_of_masks():
    key, params = jax.random.key(0), draw(0)
    others = masks_lib.random(key, params, HALF)
    mine = lib.random(key, params, HALF, None)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, mine, others)))


def test_round_counts():
    shapes = {"conv": (24, 6), "fc": (8, 12), "head": (5, 3)}
    asked = {"conv": 79, "fc": 3, "head": 15}  # the head stays dense
    assert lib.round_counts(None, asked, shapes) == asked
    # Blocks of 12, columns of 24 and 8, half.
    for kind, conv, fc in (("block", 84, 12), ("channel", 72, 8), ("n_of_m", 72, 48)):
        wanted = {"conv": conv, "fc": fc, "head": 15}
        assert lib.round_counts(ALL[kind], asked, shapes) == wanted
    tie = {"conv": 78}  # between 72 and 84
    assert lib.round_counts(BLOCK, tie, shapes) == {"conv": 72}


# Rules


def trained(kind, rule_name):
    """The masks after each of five rewires."""
    make = {"rigl": rules.rigl, "set": rules.set_}[rule_name]
    rule = make(ALWAYS, schedules.constant(0.7), granularity=ALL[kind])
    masks, key = half(kind), jax.random.key(2)
    params = masks_lib.apply(masks, draw(0))
    tx = sparsify(optax.sgd(0.1, momentum=0.9), masks, rule, key=key)
    update, state = jit(functools.partial(tx.update, rewire=True)), tx.init(params)
    found = [masks]
    for n in range(5):
        updates, state = update(draw(n + 1), state, params)
        params = optax.apply_updates(params, updates)
        found.append(state.masks)
    return found


@pytest.mark.parametrize(
    ("kind", "rule_name"), [("block", "rigl"), ("channel", "set"), ("n_of_m", "rigl")]
)
def test_rewires_keep_groups_and_counts(kind, rule_name):
    found = trained(kind, rule_name)
    for masks in found:
        assert_fits(kind, masks)
        assert masks["head"] is None
    pairs = itertools.pairwise(found)
    assert sum(not np.array_equal(a["conv"], b["conv"]) for a, b in pairs) >= 2


def drop_grow_oracle(kind, mask, drop, grow, fraction):
    """By loops over tiles and sorts."""
    matrix = np.arange(mask.size).reshape(-1, mask.shape[-1])
    m, d, g = (np.asarray(x).ravel() for x in (mask, drop, grow))
    new = np.zeros(mask.size, bool)
    if kind == "n_of_m":
        alive = np.flatnonzero(m)
        n_keep = alive.size - int(np.float32(alive.size) * np.float32(fraction))
        new[alive[np.argsort(-d[alive], kind="stable")[:n_keep]]] = True
        for tile in tiles(matrix, 4, 1):
            free = tile[~new[tile]]
            n_lost = m[tile].sum() - new[tile].sum()
            new[free[np.argsort(-g[free], kind="stable")[:n_lost]]] = True
        return new.reshape(mask.shape)
    groups = tiles(matrix, *((4, 3) if kind == "block" else (matrix.shape[0], 1)))
    alive = [t for t in groups if m[t].all()]
    n_keep = len(alive) - int(np.float32(len(alive)) * np.float32(fraction))
    kept = sorted(alive, key=lambda t: -d[t].mean())[:n_keep]
    rest = [t for t in groups if not any(np.array_equal(t, k) for k in kept)]
    rest = sorted(rest, key=lambda t: -g[t].mean())[: len(alive) - n_keep]
    for tile in [*kept, *rest]:
        new[tile] = True
    return new.reshape(mask.shape)


@every_kind
def test_drop_grow_equals_the_oracle(kind):
    rewire = jit(functools.partial(rules.drop_grow, granularity=ALL[kind]))
    masks = {k: half(kind)[k] for k in HALF}
    drop, grow = ({k: jnp.abs(draw(seed)[k]) for k in HALF} for seed in (1, 2))
    for fraction in (0.3, 0.7, 1.0):
        new = rewire(masks, drop, grow, fraction)
        for k in HALF:
            expected = drop_grow_oracle(kind, masks[k], drop[k], grow[k], fraction)
            np.testing.assert_array_equal(new[k], expected)
    assert (new["conv"] != masks["conv"]).any()


refill = jit(functools.partial(rules.drop_grow, granularity=TWO_OF_FOUR))


def test_n_of_m_by_hand():
    mask = jnp.array([True, True, False, False, True, False, True, False])[:, None]
    drop = jnp.array([4.0, 1.0, 0, 0, 2.0, 0, 3.0, 0])[:, None]
    grow = jnp.array([9.0, 5.0, 5.0, 1.0, 0.0, 7.0, 9.0, 8.0])[:, None]
    new = refill(mask, drop, grow, 0.5)
    # Drops 1 and 4. Of 1, 2 and 3 the tie goes to 1; of 4, 5 and 7 the best is 7.
    assert np.flatnonzero(new).tolist() == [0, 1, 6, 7]


@given(
    st.lists(st.booleans(), min_size=24, max_size=24),
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf]),
        min_size=24,
        max_size=24,
    ),
    st.floats(0, 1, width=32),
)
def test_each_group_grows_what_it_lost_whatever_the_scores(mask, scores, fraction):
    mask = np.array(mask).reshape(8, 3)
    scores = np.array(scores, np.float32).reshape(8, 3)
    new = refill(mask, scores, -scores, fraction)
    counts = ([t.sum() for t in tiles(x, 4, 1)] for x in (mask, new))
    np.testing.assert_array_equal(*counts)


@every_kind
def test_gradual_pruning_prunes_whole_groups(kind):
    """And of n of m the best; in between as many weights as the schedule says."""
    final = dict.fromkeys(HALF, 0.5)
    rule = rules.gradual_pruning(
        begin=1, end=3, interval=1, final_sparsity=final, granularity=ALL[kind]
    )
    masks, params = masks_lib.full(draw(0), HALF), draw(0)
    masks = masks | {"head": None}
    step = jit(lambda t, m, p: rule.propose(t, jax.random.key(0), m, p, p, ())[0])
    for t, left in ((1, 1.0), (2, 0.125), (3, 0.0)):
        new = step(t, masks, params)
        for k in HALF:
            assert not (new[k] & ~masks[k]).any()
            size = np.prod(SHAPES[k])
            group = {"block": 12, "channel": size // SHAPES[k][-1], "n_of_m": 1}[kind]
            n = round(size // group * (1 - (0.5 - 0.5 * left)))
            assert new[k].sum() == n * group
            if kind == "n_of_m":
                w = [np.abs(t) for t in tiles(params[k], 4, 1)]
                kept = tiles(new[k], 4, 1)
                assert all(
                    m[np.argsort(-x)[:2]].all() for m, x in zip(kept, w, strict=True)
                )
        masks = new
    assert_fits(kind, masks)


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lib.block(0, 2), r"block\(0, 2\)"),
        (lambda: lib.n_of_m(5, 4), r"n_of_m\(5, 4\)"),
        (lambda: lib.n_of_m(0, 4), r"n_of_m\(0, 4\)"),
        (
            lambda: lib.random(jax.random.key(0), draw(0), {"fc": 50}, BLOCK),
            "50 weights of layer fc are no whole groups; give 48",
        ),
        (
            lambda: lib.random(jax.random.key(0), draw(0), {"head": 6}, TWO_OF_FOUR),
            "layer head is a matrix of 5 x 3",
        ),
        (
            lambda: lib.random(jax.random.key(0), draw(0), {"fd": 6}, TWO_OF_FOUR),
            "no layer named fd",
        ),
        (
            lambda: rules.set_signed(
                ALWAYS, schedules.constant(0.5), granularity=CHANNEL
            ),
            "by_sign needs single weights",
        ),
        (
            lambda: rules.gradual_pruning(
                begin=0,
                end=1,
                interval=1,
                final_sparsity={"fc": 0.75},
                granularity=TWO_OF_FOUR,
            ),
            "final_sparsity of fc is 0.75, which n_of_m makes 0.5",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_refuse_layers_that_groups_do_not_fill():
    params = draw(0)
    masks = masks_lib.random(jax.random.key(0), params, {"fc": 48, "head": 6})
    for rule in (
        rules.rigl(ALWAYS, schedules.constant(0.5), granularity=BLOCK),
        rules.gradual_pruning(
            begin=0, end=1, interval=1, final_sparsity={}, granularity=BLOCK
        ),
    ):
        tx = sparsify(optax.sgd(0.1), masks, rule, key=jax.random.key(0))
        with pytest.raises(ValueError, match="layer head is a matrix of 5 x 3"):
            tx.init(params)
