"""Oracles by hand and from the ResNet-50 tables; every guarantee as a property."""

import math
import re

import pytest
import resnet50_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery_flow.sparsity.distributions import (
    DISTRIBUTIONS,
    erdos_renyi,
    erdos_renyi_kernel,
    n_zeros,
    parse_layer_map,
    solve_erdos_renyi,
    uniform,
)

LENET5 = {
    "conv1": (5, 5, 1, 6),
    "conv2": (5, 5, 6, 16),
    "fc1": (256, 120),
    "fc2": (120, 84),
    "fc3": (84, 10),
}
MLP = {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}

dims = st.integers(1, 40)
kernels = st.one_of(st.tuples(dims, dims), st.tuples(*[st.integers(1, 12)] * 4))
networks = st.dictionaries(st.sampled_from("abcdefg"), kernels, min_size=1)
# decimals as they are written in configs, and any other float
sparsities = st.one_of(
    st.integers(0, 999).map(lambda n: n / 1000),
    st.floats(0, 1, exclude_max=True),
)
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
quick = settings(deadline=None, max_examples=60)


def sizes(shapes):
    return {name: math.prod(shape) for name, shape in shapes.items()}


# --- Uniform -------------------------------------------------------------------------


def test_uniform_keeps_the_published_counts():
    assert list(uniform(LENET5, 0.95).values()) == [8, 120, 1536, 504, 42]
    assert list(uniform(MLP, 0.98).values()) == [4704, 600, 20]


def test_uniform_leaves_dense_and_custom_layers_out():
    counts = uniform(MLP, 0.98, dense=["fc3"], layer_sparsity={"fc2": 0.5})
    assert counts == {"fc1": 4704, "fc2": 15000, "fc3": 1000}


# --- Erdos-Renyi by hand -------------------------------------------------------------


def test_erk_without_a_dense_layer():
    # conv: N = 72, sum 12, p = 1/6; fc: N = 80, sum 18, p = 9/40. At s = 3/4 the budget
    # is 18 + 20 = 38 and the divisor 12 + 18 = 30, so eps = 38/30. The counts are
    # eps * sum = 15.2 and 22.8, rounded up because zeros are rounded down.
    shapes = {"conv": (3, 3, 2, 4), "fc": (8, 10)}
    solved = solve_erdos_renyi(shapes, 0.75, kernel=True)
    assert solved.eps == pytest.approx(38 / 30, rel=1e-15)
    assert solved.sparsity["conv"] == pytest.approx(1 - 38 / 180, rel=1e-15)
    assert solved.dense == ()
    assert solved.n_active == {"conv": 16, "fc": 23}


def test_er_uses_the_last_two_dimensions_only():
    # conv: p = (2 + 4) / 8 = 3/4, p N = 54; fc: p N = 18. eps = 38/72; the counts are
    # 54 eps = 28.5 and 18 eps = 9.5.
    shapes = {"conv": (3, 3, 2, 4), "fc": (8, 10)}
    solved = solve_erdos_renyi(shapes, 0.75, kernel=False)
    assert solved.eps == pytest.approx(38 / 72, rel=1e-15)
    assert solved.n_active == {"conv": 29, "fc": 10}


def test_a_layer_whose_probability_exceeds_one_becomes_dense():
    # a: N = 16, p = 1/2; b: N = 128, p = 3/16. At s = 1/2 the budget is 8 + 64 = 72 and
    # the divisor 8 + 24 = 32: eps = 9/4, eps p_a = 9/8 > 1. With a dense, the rest is
    # 64 - 8 = 56 and eps = 56/24 = 7/3, so that b keeps 24 * 7/3 = 56 of 128.
    solved = solve_erdos_renyi({"a": (4, 4), "b": (8, 16)}, 0.5, kernel=True)
    assert solved.eps == pytest.approx(7 / 3, rel=1e-15)
    assert solved.dense == ("a",)
    assert solved.sparsity == {"a": 0.0, "b": 0.5625}
    assert solved.n_active == {"a": 16, "b": 56}


def test_all_layers_with_the_largest_probability_become_dense_together():
    shapes = {"a": (4, 4), "twin": (4, 4), "b": (8, 16)}
    # the budget is 16 + 64 = 80, the divisor 40: eps p = 1. It takes a little more.
    assert solve_erdos_renyi(shapes, 0.5, kernel=True).dense == ()
    assert solve_erdos_renyi(shapes, 0.48, kernel=True).dense == ("a", "twin")


def test_a_lower_power_is_softer_and_zero_is_uniform():
    flat, soft, hard = (
        erdos_renyi_kernel(MLP, 0.9, power=power) for power in (0.0, 0.5, 1.0)
    )
    assert flat == uniform(MLP, 0.9)
    assert flat["fc1"] > soft["fc1"] > hard["fc1"]


def test_custom_and_dense_layers_stand_outside_the_budget():
    alone = erdos_renyi_kernel({"fc1": MLP["fc1"], "fc2": MLP["fc2"]}, 0.9)
    counts = erdos_renyi_kernel(MLP, 0.9, dense=["fc3"])
    assert counts == {**alone, "fc3": 1000}
    counts = erdos_renyi_kernel(MLP, 0.9, layer_sparsity={"fc3": 0.25})
    assert counts == {**alone, "fc3": 750}
    assert solve_erdos_renyi(MLP, 0.9, kernel=True, dense=["fc3"]).dense == ()


# --- Erdos-Renyi, published values ---------------------------------------------------


def test_erk_of_resnet50_at_80_percent():
    shapes = resnet50_shapes.shapes()
    solved = solve_erdos_renyi(shapes, 0.8, kernel=True)
    assert solved.eps == pytest.approx(99.562, abs=5e-4)
    assert set(solved.dense) == {
        "res2a_branch1",
        *(f"res2{block}_branch2{conv}" for block in "abc" for conv in "ac"),
        "res3a_branch2a",
    }
    assert solved.sparsity["conv1"] == pytest.approx(0.14280, abs=5e-6)
    assert solved.sparsity["fc"] == pytest.approx(0.85182, abs=5e-6)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.99])
def test_the_loop_finds_the_water_level(kernel, sparsity):
    """Another way to eps: bisect it in sum min(N, eps p N) = budget."""
    shapes = resnet50_shapes.shapes()
    size = sizes(shapes)
    used = {name: shape if kernel else shape[-2:] for name, shape in shapes.items()}
    terms = {n: sum(dims) / math.prod(dims) * size[n] for n, dims in used.items()}
    budget = sum(uniform(shapes, sparsity).values())
    low, high = 0.0, 1e6
    for _ in range(100):
        eps = (low + high) / 2
        kept = sum(min(size[name], eps * terms[name]) for name in shapes)
        low, high = (eps, high) if kept < budget else (low, eps)
    solved = solve_erdos_renyi(shapes, sparsity, kernel=kernel)
    assert solved.eps == pytest.approx(low, rel=1e-9)


# --- Guarantees ----------------------------------------------------------------------


@quick
@given(
    size=st.integers(1, 10**9),
    thousandths=st.integers(0, 999),
    places=st.sampled_from([1, 10, 100, 1000]),
)
def test_whole_products_lose_nothing_to_binary_rounding(size, thousandths, places):
    exact = thousandths * size // (1000 * places)
    assert n_zeros(size, thousandths / (1000 * places)) == exact
    assert (math.floor(0.29 * 100), n_zeros(100, 0.29)) == (28, 29)


@quick
@given(size=st.integers(1, 10**12), sparsity=sparsities)
def test_one_weight_of_a_layer_always_stays(size, sparsity):
    assert 0 <= n_zeros(size, sparsity) < size


@every_distribution
@quick
@given(shapes=networks, sparsity=sparsities)
def test_every_layer_keeps_between_one_and_all(name, shapes, sparsity):
    counts = DISTRIBUTIONS[name](shapes, sparsity)
    assert counts.keys() == shapes.keys()
    for layer, size in sizes(shapes).items():
        assert 1 <= counts[layer] <= size


@every_distribution
@quick
@given(shapes=networks, sparsity=sparsities, own=sparsities)
def test_dense_and_custom_layers_get_what_they_ask(name, shapes, sparsity, own):
    shapes = {**shapes, "dense": (3, 7), "own": (2, 5, 11), "free": (6, 6)}
    counts = DISTRIBUTIONS[name](
        shapes, sparsity, dense=["dense"], layer_sparsity={"own": own}
    )
    assert counts["dense"] == 21
    assert counts["own"] == 110 - n_zeros(110, own)


@pytest.mark.parametrize("fn", [erdos_renyi, erdos_renyi_kernel])
@quick
@given(shapes=networks, sparsity=sparsities)
def test_the_total_is_that_of_uniform_up_to_a_weight_per_layer(fn, shapes, sparsity):
    budget = sum(uniform(shapes, sparsity).values())
    total = sum(fn(shapes, sparsity).values())
    assert budget <= total < budget + len(shapes)


@every_distribution
@quick
@given(shapes=networks, pair=st.tuples(sparsities, sparsities))
def test_a_higher_sparsity_leaves_no_layer_with_more(name, shapes, pair):
    low, high = (DISTRIBUTIONS[name](shapes, sparsity) for sparsity in sorted(pair))
    assert all(high[layer] <= low[layer] for layer in shapes)


@every_distribution
@quick
@given(shapes=networks, sparsity=sparsities, data=st.data())
def test_the_order_of_the_layers_does_not_matter(name, shapes, sparsity, data):
    shuffled = dict(data.draw(st.permutations(list(shapes.items()))))
    counts = DISTRIBUTIONS[name](shuffled, sparsity)
    assert counts == DISTRIBUTIONS[name](shapes, sparsity)
    assert list(counts) == list(shuffled)


@quick
@given(
    layers=st.dictionaries(
        st.text("abz_/019", min_size=1), st.floats(0, 1, exclude_max=True)
    )
)
def test_a_layer_map_written_out_is_read_back(layers):
    text = ",".join(f"{name}={sparsity}" for name, sparsity in layers.items())
    assert parse_layer_map(text) == layers


def test_layer_map_ignores_blanks_and_may_be_empty():
    assert parse_layer_map(" conv1 = 0, fc3=0.5 ,") == {"conv1": 0.0, "fc3": 0.5}
    assert parse_layer_map("") == {}


# --- Errors --------------------------------------------------------------------------


@every_distribution
@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, math.nan, math.inf])
def test_sparsity_outside_its_range(name, sparsity):
    with pytest.raises(ValueError, match=rf"^sparsity is {sparsity} but must lie in"):
        DISTRIBUTIONS[name](MLP, sparsity)
    with pytest.raises(ValueError, match=r"^layer_sparsity of 'fc1' is"):
        DISTRIBUTIONS[name](MLP, 0.5, layer_sparsity={"fc1": sparsity})


@every_distribution
def test_unknown_layers(name):
    known = re.escape("unknown layers ['conv9']: choose from ['fc1', 'fc2', 'fc3']")
    with pytest.raises(ValueError, match=known):
        DISTRIBUTIONS[name](MLP, 0.5, dense=["conv9"])
    with pytest.raises(ValueError, match=known):
        DISTRIBUTIONS[name](MLP, 0.5, layer_sparsity={"conv9": 0.5})


@every_distribution
def test_a_layer_cannot_be_dense_and_sparse(name):
    with pytest.raises(ValueError, match="'fc1' is named in dense but has"):
        DISTRIBUTIONS[name](MLP, 0.5, dense=["fc1"], layer_sparsity={"fc1": 0.5})
    both = DISTRIBUTIONS[name](MLP, 0.5, dense=["fc1"], layer_sparsity={"fc1": 0.0})
    assert both["fc1"] == 235_200


@every_distribution
@pytest.mark.parametrize("shape", [(0, 5), (5,), ()])
def test_a_layer_that_is_empty_or_no_kernel(name, shape):
    with pytest.raises(ValueError, match=r"layer 'bad' of shape .* would keep nothing"):
        DISTRIBUTIONS[name]({**MLP, "bad": shape}, 0.5)


@every_distribution
def test_no_layer_left_to_carry_the_sparsity(name):
    fn = DISTRIBUTIONS[name]
    with pytest.raises(ValueError, match=r"^sparsity=0.5 has no layer left"):
        fn(MLP, 0.5, dense=["fc1", "fc2"], layer_sparsity={"fc3": 0.5})
    with pytest.raises(ValueError, match="no layer left"):
        fn({}, 0.5)
    # a complete map is fine where no other sparsity is asked for
    counts = fn(MLP, 0.0, dense=["fc1", "fc2"], layer_sparsity={"fc3": 0.5})
    assert counts == {"fc1": 235_200, "fc2": 30_000, "fc3": 500}


def test_power_outside_its_range():
    for power in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^power={power} must be finite"):
            erdos_renyi(MLP, 0.5, power=power)
    with pytest.raises(ValueError, match="'fc1' of 235200 weights would keep nothing"):
        erdos_renyi_kernel(MLP, 0.5, power=1000.0)


def test_layer_maps_that_cannot_be_read():
    for text in ("conv1", "=0.5", "conv1=0,conv1=0.5", "0.5,"):
        with pytest.raises(ValueError, match=r"^layer map item .* must be name=spars"):
            parse_layer_map(text)
    for text in ("conv1=much", "conv1=1", "conv1=nan", "conv1="):
        with pytest.raises(ValueError, match=r"^layer map sparsity of 'conv1' is"):
            parse_layer_map(text)
