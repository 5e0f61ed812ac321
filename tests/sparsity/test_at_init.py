"""Selection and rounds of pruning at initialisation, against sorts on the host."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lottery_flow.sparsity import at_init
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.at_init import METHODS, PruneAtInit
from lottery_flow.sparsity.at_init_checks import collapsed
from lottery_flow.sparsity.at_init_scores import Network

KEY = jax.random.key(0)
SHAPES = {"a": (3, 4), "b": (4, 5), "c": (5, 2)}
SIZES = {"a": 12, "b": 20, "c": 10}


def tree_of(arrays):
    """A bias that has no mask beside each kernel."""
    return {k: {"bias": None, "kernel": x} for k, x in arrays.items()}


def arrays(values, dtype):
    """Hypothesis: an array of `values` for each layer."""

    def layer(name):
        size = SIZES[name]
        elements = st.lists(st.sampled_from(values), min_size=size, max_size=size)
        return elements.map(lambda x: np.array(x, dtype).reshape(SHAPES[name]))

    return st.fixed_dictionaries({name: layer(name) for name in SHAPES})


def best(scores, where, n):
    """The n highest of the eligible scores; ties by the lower index."""
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(scores.size, bool)
    kept[order[where[order]][:n]] = True
    return kept


def assert_masks(masks, expected):
    for name, mask in expected.items():
        assert masks[name]["bias"] is None
        np.testing.assert_array_equal(masks[name]["kernel"], mask)


def joined(tree):
    return np.concatenate([np.ravel(tree[k]) for k in SHAPES])


def cut(flat):
    ends = np.cumsum([*SIZES.values()])[:-1]
    parts = np.split(flat, ends)
    return {k: x.reshape(SHAPES[k]) for k, x in zip(SHAPES, parts, strict=True)}


# prune

prune = jax.jit(at_init.prune, static_argnames=("scope", "invert"))
scores_ = arrays((0.0, -0.0, 0.5, 1.0, 2.0, -1.0), np.float32)
eligible_ = arrays((True, False), bool)
budgets = st.fixed_dictionaries({k: st.integers(0, n) for k, n in SIZES.items()})


@given(scores_, eligible_, budgets, st.booleans())
def test_prune_of_all_layers_together_equals_a_sort(scores, where, n_active, invert):
    """Ties go to the lower flat index, and to the earlier layer."""
    new = prune(tree_of(scores), tree_of(where), n_active, "global", invert=invert)
    sign = -1 if invert else 1
    total = sum(n_active.values())
    assert_masks(new, cut(best(sign * joined(scores), joined(where), total)))


@given(scores_, eligible_, budgets, st.booleans())
def test_prune_of_each_layer_equals_a_sort(scores, where, n_active, invert):
    new = prune(tree_of(scores), tree_of(where), n_active, "layer", invert=invert)
    sign = -1 if invert else 1
    expected = {}
    for k, n in n_active.items():
        kept = best(sign * scores[k].ravel(), where[k].ravel(), n)
        expected[k] = kept.reshape(SHAPES[k])
    assert_masks(new, expected)


def test_prune_ranks_layers_of_different_dtypes_together():
    """And a NaN is below everything."""
    scores = {
        "a": {"kernel": jnp.array([[1.0, np.nan, 4.0]], jnp.bfloat16)},
        "b": {"kernel": jnp.array([[-np.inf, 3.0]], jnp.float32)},
    }
    masks = masks_lib.full(scores, scores)
    for total, kept in ((2, "00101"), (3, "10101"), (4, "10111")):
        new = at_init.prune(scores, masks, {"a": 1, "b": total - 1})
        flat = np.concatenate([np.ravel(new[k]["kernel"]) for k in "ab"])
        assert "".join("01"[int(x)] for x in flat) == kept


@pytest.mark.parametrize(
    ("n_active", "match"),
    [
        ({"a": 1, "b": 1}, "n_active lacks c, which has a mask"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "n_active names d, which has no mask"),
    ],
)
def test_prune_rejects(n_active, match):
    scores = tree_of({k: jnp.zeros(shape) for k, shape in SHAPES.items()})
    masks = tree_of({k: jnp.ones(shape, bool) for k, shape in SHAPES.items()})
    with pytest.raises(ValueError, match=match):
        at_init.prune(scores, masks, n_active)


# the schedule


@pytest.mark.parametrize(
    ("n_from", "n_to", "rounds", "expected"),
    [
        (1000, 1, 3, [100, 10, 1]),
        (16, 1, 4, [8, 4, 2, 1]),
        (100, 50, 2, [71, 50]),  # 70.71
        (100, 7, 1, [7]),
        (10, 10, 2, [10, 10]),
        (10, 0, 2, [0, 0]),
        (0, 0, 2, [0, 0]),
    ],
)
def test_exponential_schedule(n_from, n_to, rounds, expected):
    assert at_init.exponential_schedule(n_from, n_to, rounds) == expected


@given(st.integers(0, 10**9), st.floats(0, 1), st.integers(1, 50))
def test_an_exponential_schedule_falls_to_its_end(n_from, share, rounds):
    n_to = int(n_from * share)
    counts = at_init.exponential_schedule(n_from, n_to, rounds)
    assert len(counts) == rounds
    assert counts[-1] == n_to
    assert all(x >= y for x, y in itertools.pairwise([n_from, *counts]))


def test_exponential_schedule_rejects():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        at_init.exponential_schedule(10, 5, 0)
    with pytest.raises(ValueError, match="n_to=11 must be from 0 to the 10"):
        at_init.exponential_schedule(10, 11, 1)


# prune_at_init


def forward(params, images):
    """Layers without biases, relu between them."""
    x = images
    for i, layer in enumerate(params.values()):
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"]
    return x


def criterion(logits, batch):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, batch["label"][:, None], axis=1)[:, 0]


def ones(params):
    return forward(params, jnp.ones((1, params["a"]["kernel"].shape[0])))


NETWORK = Network(
    lambda params, batch: forward(params, batch["image"]), criterion, ones
)


def make_params(shapes):
    """He's normal distribution, for kernels a, b, c, ..."""
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": np.float32(rng.normal(size=s) * (2 / s[0]) ** 0.5)}
        for name, s in zip("abcdefgh", shapes, strict=False)
    }


PARAMS = make_params(SHAPES.values())
FULL = masks_lib.full(PARAMS, SHAPES)


def make_batch(n_inputs, n_classes, n=8):
    rng = np.random.default_rng(1)
    images = np.float32(rng.normal(size=(n, n_inputs)))
    return {"image": images, "label": np.int32(rng.integers(0, n_classes, n))}


def on(masks):
    return {k: int(n) for k, n in masks_lib.count(masks).items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_exactly_what_is_asked(name):
    """In each layer with scope 'layer', in all of them with scope 'global'."""
    n_active = {"a": 7, "b": 9, "c": 6}
    method = METHODS[name]._replace(rounds=min(METHODS[name].rounds, 3))
    assert method.name == name
    batches = [make_batch(3, 2)] if method.n_examples else []
    masks = at_init.prune_at_init(
        method,
        KEY,
        PARAMS,
        FULL,
        NETWORK,
        batches if method.n_examples else (),
        n_active,
    )
    masks_lib.check(masks, PARAMS)
    assert sum(on(masks).values()) == 22
    assert (on(masks) == n_active) == (method.scope == "layer")


@pytest.mark.parametrize(
    ("scope", "n_active", "counts"),
    [
        # 42 (11 / 42)^(1/2) = 21.49
        ("global", {"a": 3, "b": 5, "c": 3}, [21, 11]),
        # 12 -> 6 -> 3, 20 -> 7.75 -> 3, 10 -> 7.07 -> 5
        ("layer", {"a": 3, "b": 3, "c": 5}, [{"a": 6, "b": 8, "c": 7}, None]),
    ],
)
def test_rounds_score_the_masked_network_and_never_revive_a_weight(
    scope, n_active, counts
):
    """The counts after each round are those of the schedule."""
    seen, keys = [], []

    def score(key, params, masks, network, batches):
        seen.append(masks)
        keys.append(jax.random.key_data(key).tolist())
        for name, layer in masks.items():
            zeroed = np.where(layer["kernel"], PARAMS[name]["kernel"], 0)
            np.testing.assert_array_equal(params[name]["kernel"], zeroed)
        # What was pruned would come first, had it a chance.
        return jax.tree.map(
            lambda m, w: jnp.where(m, jnp.abs(w), jnp.inf), masks, params
        )

    method = PruneAtInit("seen", score, scope, rounds=2)
    masks = at_init.prune_at_init(method, KEY, PARAMS, FULL, NETWORK, (), n_active)
    after = [*seen[1:], masks]
    for mask, count in zip(after, counts, strict=True):
        found = on(mask)
        expected = n_active if count is None else count
        assert (sum(found.values()) if scope == "global" else found) == expected
    for earlier, later in itertools.pairwise([FULL, *after]):
        for name in SHAPES:
            assert not (later[name]["kernel"] & ~earlier[name]["kernel"]).any()
    assert keys[0] != keys[1]


def test_the_methods_of_one_round_keep_the_best_of_all_layers():
    """Magnitude against numpy; inverted, it keeps the smallest."""
    n_active = {"a": 3, "b": 5, "c": 3}
    sizes = joined({k: np.abs(PARAMS[k]["kernel"]) for k in SHAPES})
    for invert, sign in ((False, 1), (True, -1)):
        method = METHODS["magnitude"]._replace(invert=invert)
        masks = at_init.prune_at_init(method, KEY, PARAMS, FULL, NETWORK, (), n_active)
        expected = cut(best(sign * sizes, np.ones(42, bool), 11))
        for name in SHAPES:
            np.testing.assert_array_equal(masks[name]["kernel"], expected[name])


def test_pruning_goes_on_from_sparse_masks_and_leaves_other_layers_dense():
    params = {**PARAMS, "norm": {"scale": np.ones((4,), np.float32)}}
    start = masks_lib.random(KEY, params, {"a": 6, "b": 10})
    method = METHODS["random"]._replace(scope="global", rounds=2)
    masks = at_init.prune_at_init(
        method, KEY, params, start, NETWORK, (), {"a": 5, "b": 7}
    )
    assert masks["c"]["kernel"] is None
    assert masks["norm"]["scale"] is None
    assert sum(on(masks).values()) == 12
    for name in "ab":
        assert not (masks[name]["kernel"] & ~start[name]["kernel"]).any()


def test_without_masked_layers_there_is_nothing_to_prune():
    dense = masks_lib.dense(PARAMS)
    method = METHODS["magnitude"]
    assert at_init.prune_at_init(method, KEY, PARAMS, dense, NETWORK, (), {}) == dense


def test_prune_at_init_rejects():
    def run(n_active, masks=FULL, method=METHODS["magnitude"], params=PARAMS):
        at_init.prune_at_init(method, KEY, params, masks, NETWORK, (), n_active)

    n_active = {"a": 3, "b": 5, "c": 3}
    with pytest.raises(ValueError, match="n_active of b is 21, but the layer has 20"):
        run(n_active | {"b": 21})
    with pytest.raises(ValueError, match="n_active lacks c"):
        run({"a": 3, "b": 5})
    with pytest.raises(ValueError, match="batches is empty"):
        run(n_active, method=METHODS["snip"])
    with pytest.raises(ValueError, match="scope='tree' is unknown"):
        run(n_active, method=METHODS["magnitude"]._replace(scope="tree"))
    with pytest.raises(ValueError, match="masks do not fit the parameters"):
        run(n_active, masks={**FULL, "a": {"kernel": np.ones((3, 3), bool)}})
    for bad in (np.nan, np.inf):
        params = {**PARAMS, "b": {"kernel": np.full((4, 5), bad, np.float32)}}
        with pytest.raises(ValueError, match="magnitude are not finite in b;"):
            run(n_active, params=params)


def test_a_layer_whose_scores_are_all_zero_is_told_once():
    """Nothing comes through the last layer, so that no gradient reaches the others."""
    params = {**PARAMS, "c": {"kernel": np.zeros((5, 2), np.float32)}}
    n_active = {"a": 3, "b": 5, "c": 3}
    method = METHODS["snip_iterative"]._replace(rounds=2, scope="layer")
    batches = [make_batch(3, 2)]
    with pytest.warns(UserWarning, match="iterative are all zero in a, b, c,") as told:
        at_init.prune_at_init(method, KEY, params, FULL, NETWORK, batches, n_active)
    assert len(told) == 1


def test_single_shot_scores_empty_layers_where_synflow_does_not():
    """Seven layers, wide ones between narrow ones, of which 28 weights are left."""
    shapes = [(20, 20), (20, 20), (20, 60), (60, 60), (60, 20), (20, 20), (20, 5)]
    params = make_params(shapes)
    layers = masks_lib.layers(params)
    n_active = {k: 4 for k in layers}
    args = KEY, params, masks_lib.full(params, layers), NETWORK, [make_batch(20, 5)]
    for name in ("magnitude", "snip", "grasp"):
        with pytest.warns(UserWarning, match=f"{name} left no active weight in"):
            masks = at_init.prune_at_init(METHODS[name], *args, n_active)
        assert collapsed(masks)
        assert sum(on(masks).values()) == 28
    masks = at_init.prune_at_init(METHODS["synflow"], *args, n_active)
    assert collapsed(masks) == []
    assert sum(on(masks).values()) == 28
    single_shot = METHODS["synflow"]._replace(rounds=1)
    with pytest.warns(UserWarning, match="synflow left no active weight in"):
        at_init.prune_at_init(single_shot, *args, n_active)
