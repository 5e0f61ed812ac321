"""Counts by hand, and the published ResNet-50 and MobileNet tables."""

import math

import pytest
import resnet50_shapes

from lottery_flow.counting import (
    dense_training_flops,
    inference_flops,
    model_megabytes,
    training_flops,
)
from lottery_flow.sparsity import distributions
from lottery_flow.sparsity.distributions import erdos_renyi_kernel, solve_erdos_renyi

SHAPES = resnet50_shapes.shapes()
POSITIONS = resnet50_shapes.positions()
DENSE = 8_202_340_776


def fractional(shapes, sparsity):
    """Active weights as the published tables count them: not rounded."""
    return {name: math.prod(shapes[name]) * (1 - sparsity[name]) for name in shapes}


def uniform_sparsity(shapes, sparsity, dense=()):
    return {name: 0.0 if name in dense else sparsity for name in shapes}


def total_flops(shapes, positions, sparsity):
    return sum(
        inference_flops(shapes, positions, fractional(shapes, sparsity)).values()
    )


# --- Counting rules ------------------------------------------------------------------


def test_one_layer_by_the_rules_for_outputs_and_their_lengths():
    # v = 3 * 3 * 2 * (1 - 1/4) weights for each of 25 * 4 outputs: v multiplications
    # and v - 1 additions, one more addition for the bias, one multiplication for ReLU
    v, n_out = 13.5, 100
    expected = v * n_out + (v - 1) * n_out + n_out + n_out
    assert inference_flops({"a": (3, 3, 2, 4)}, {"a": 25}, {"a": 54}) == {"a": expected}


def test_a_depthwise_layer_has_one_vector_per_channel():
    # 8 channels of 3 x 3: v = 9 for each of 25 * 8 outputs
    assert inference_flops({"a": (3, 3, 1, 8)}, {"a": 25}) == {"a": 200 * (2 * 9 + 1)}


def test_bytes_by_hand():
    # sparse: 54 weights and 4 biases of 32 bits, 72 mask bits; dense: no mask bits
    assert model_megabytes({"a": (3, 3, 2, 4)}, {"a": 54}) == (58 * 32 + 72) / 8e6
    assert model_megabytes({"a": (3, 3, 2, 4)}, {"a": 72}) == 76 * 32 / 8e6
    assert model_megabytes({"a": (3, 3, 2, 4)}) == 76 * 32 / 8e6


def test_no_counts_means_dense():
    full = {name: math.prod(shape) for name, shape in SHAPES.items()}
    found = inference_flops(SHAPES, POSITIONS)
    assert found == inference_flops(SHAPES, POSITIONS, full)


# --- ResNet-50 -----------------------------------------------------------------------


def test_dense_resnet50():
    assert len(SHAPES) == 54
    assert sum(map(math.prod, SHAPES.values())) == 25_502_912
    assert sum(shape[-1] for shape in SHAPES.values()) == 27_560
    assert sum(inference_flops(SHAPES, POSITIONS).values()) == DENSE
    assert model_megabytes(SHAPES) == pytest.approx(102.12189, abs=5e-6)


def sparsity_of(distribution, sparsity):
    match distribution:
        case "uniform":
            return uniform_sparsity(SHAPES, sparsity, dense=["conv1"])
        case "all uniform":
            return uniform_sparsity(SHAPES, sparsity)
        case _:
            kernel = distribution != "ER"
            dense = ["conv1"] if distribution == "ERK, conv1 dense" else []
            return solve_erdos_renyi(
                SHAPES, sparsity, kernel=kernel, dense=dense
            ).sparsity


# Recomputed table of the published README. Not in it, as they contradict the rest: the
# size of uniform .80 (23.685 there, the value of plain ER) and ERK .965 (its size is
# that of conv1 dense, its FLOPs are not). Both are resolved below.
@pytest.mark.parametrize(
    ("distribution", "sparsity", "flops", "megabytes"),
    [
        ("ERK", 0.8, 3.406320e9, 23.68364),
        ("uniform", 0.8, 1.848468e9, 23.72936),
        ("ERK", 0.9, 1.994388e9, 13.49886),
        ("uniform", 0.9, 1.054234e9, 13.53196),
        ("uniform", 0.95, 6.571172e8, 8.43326),
        ("ERK, conv1 dense", 0.99, 4.493508e8, 4.35439),
        ("all uniform", 0.8, 1.649395e9, 23.70043),
        ("all uniform", 0.9, 8.302768e8, 13.49927),
    ],
)
def test_sparse_resnet50(distribution, sparsity, flops, megabytes):
    chosen = sparsity_of(distribution, sparsity)
    found = total_flops(SHAPES, POSITIONS, chosen)
    assert found == pytest.approx(flops, rel=1e-6)
    size = model_megabytes(SHAPES, fractional(SHAPES, chosen))
    assert size == pytest.approx(megabytes, rel=2e-6)


@pytest.mark.parametrize(
    ("sparsity", "flops"),
    [(0.8, 3.7287e9), (0.9, 2.1268e9), (0.95, 1.1900e9), (0.965, 9.0891e8)],
)
def test_resnet50_by_er_without_kernel(sparsity, flops):
    found = total_flops(SHAPES, POSITIONS, sparsity_of("ER", sparsity))
    assert found == pytest.approx(flops, rel=1e-4)


def test_resnet50_by_softened_erk():
    soft = solve_erdos_renyi(SHAPES, 0.8, kernel=True, power=0.2).sparsity
    found = total_flops(SHAPES, POSITIONS, soft)
    assert found == pytest.approx(1.9300e9, rel=1e-4)
    size = model_megabytes(SHAPES, fractional(SHAPES, soft))
    assert size == pytest.approx(23.701, rel=1e-4)


def test_the_two_cells_of_the_table_that_belong_to_other_rows():
    def row(distribution, sparsity):
        chosen = sparsity_of(distribution, sparsity)
        return (
            total_flops(SHAPES, POSITIONS, chosen) / DENSE,
            model_megabytes(SHAPES, fractional(SHAPES, chosen)),
        )

    assert row("ER", 0.8)[1] == pytest.approx(23.685, abs=5e-4)
    assert row("ERK, conv1 dense", 0.965) == pytest.approx((0.1125, 6.904), rel=1e-4)
    assert row("ERK", 0.965)[0] == pytest.approx(0.09, abs=5e-3)


def test_whole_counts_differ_from_fractional_ones_by_rounding_alone():
    counts = erdos_renyi_kernel(SHAPES, 0.8)
    flops = sum(inference_flops(SHAPES, POSITIONS, counts).values())
    assert flops == pytest.approx(3.406320e9, rel=1e-4)


@pytest.mark.parametrize(
    ("width", "flops", "megabytes"),
    [
        (0.465, 1.8190e9, 24.124),
        (0.34, 9.9187e8, 13.654),
        (0.26, 5.9266e8, 8.470),
        (0.231, 4.7172e8, 6.904),
    ],
)
def test_small_dense_resnet50(width, flops, megabytes):
    shapes = resnet50_shapes.shapes(width)
    found = sum(inference_flops(shapes, POSITIONS).values())
    assert found == pytest.approx(flops, rel=1e-4)
    assert model_megabytes(shapes) == pytest.approx(megabytes, rel=1e-4)


# --- Training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "sparsity", "length", "cost"),
    [
        ("ERK", 0.8, 5.0, 2.0861),
        ("ERK", 0.8, 1.0, 0.4172),
        ("uniform", 0.8, 5.0, 1.1396),
        ("uniform", 0.8, 1.0, 0.2279),
        ("ERK", 0.9, 5.0, 1.2282),
        ("ERK", 0.9, 1.0, 0.2456),
        ("uniform", 0.9, 5.0, 0.6570),
        ("uniform", 0.9, 1.0, 0.1314),
        ("uniform", 0.95, 5.0, 0.4157),
        ("ERK, conv1 dense", 0.99, 5.0, 0.2895),
        ("ERK, conv1 dense", 0.99, 10.0, 0.5790),
        ("ERK, conv1 dense", 0.99, 40.0, 2.3161),
        ("ERK, conv1 dense", 0.99, 100.0, 5.7903),
    ],
)
def test_rigl_training_cost(distribution, sparsity, length, cost):
    ratio = total_flops(SHAPES, POSITIONS, sparsity_of(distribution, sparsity)) / DENSE
    found = training_flops(ratio, interval=100, length_multiplier=length)
    # half a unit of the last printed digit, where that is wider than 1e-4
    assert found == pytest.approx(cost, rel=1e-4, abs=5e-5)


def test_dense_training():
    total = dense_training_flops(float(DENSE), n_steps=32_000, batch_size=4096)
    assert total == pytest.approx(3.225e18, rel=1e-4)
    assert training_flops(1.0) == training_flops(1.0, interval=100) == 1.0


def test_fixed_masks_cost_their_ratio():
    assert training_flops(0.25, length_multiplier=4.0) == 1.0
    # ... and RigL with rare rewires tends to it
    assert training_flops(0.25, interval=10**9) == pytest.approx(0.25)


def test_gradual_pruning_costs_the_mean_over_its_schedule():
    # 0 to 80 % between steps 10,000 and 25,000, cubic; conv1 dense. The published
    # program holds fc at 80 % throughout and divides by its own first value.
    flops = []
    for step in range(0, 32_001, 1000):
        progress = min(max((step - 10_000) / 15_000, 0), 1)
        sparsity = uniform_sparsity(SHAPES, 0.8 * (1 - (1 - progress) ** 3), ["conv1"])
        flops.append(total_flops(SHAPES, POSITIONS, sparsity | {"fc": 0.8}))
    assert sum(flops) / len(flops) == pytest.approx(4.59398e9, rel=1e-6)
    ratios = [value / flops[0] for value in flops]
    assert training_flops(ratios) == pytest.approx(0.5603, abs=5e-5)


# --- MobileNet-v1, stored outputs of the published program ---------------------------


def mobilenet():
    """Shapes and positions; as published, a depthwise layer has one bias in all."""
    yield "conv1", (3, 3, 3, 32), 113
    channels, side = 32, 112
    outs = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for block, out in enumerate(outs, start=1):
        halved = block in (2, 4, 6, 12)
        side //= 1 + halved
        yield f"conv_dw_{block}", (3, 3, channels, 1), side + halved
        yield f"conv_pw_{block}", (1, 1, channels, out), side
        channels = out
    yield "conv_preds", (1, 1, channels, 1000), 1


@pytest.mark.parametrize(
    ("sparsity", "erk", "uniform"),
    [
        (0.75, (599.144, 4.888), (330.769, 4.894)),
        (0.85, (439.152, 3.224), (222.666, 3.229)),
        (0.9, (334.134, 2.392), (168.614, 2.396)),
        (0.95, (205.281, 1.560), (114.563, 1.563)),
    ],
)
def test_mobilenet(sparsity, erk, uniform, monkeypatch):
    shapes = {name: shape for name, shape, _ in mobilenet()}
    positions = {name: side**2 for name, _, side in mobilenet()}
    depthwise = [name for name in shapes if "dw" in name]

    def row(layer_sparsity):
        size = model_megabytes(shapes, fractional(shapes, layer_sparsity))
        return total_flops(shapes, positions, layer_sparsity) / 1e6, size

    def close(values):
        return pytest.approx(values, abs=5e-4)  # all printed digits

    assert row(uniform_sparsity(shapes, 0.0)) == close((1141.544, 16.864))
    assert row(uniform_sparsity(shapes, sparsity, ["conv1", *depthwise])) == close(
        uniform
    )
    # these outputs are older than the code, which rounds zeros down, not up
    monkeypatch.setattr(
        distributions, "n_zeros", lambda n, s: math.ceil(round(n * s, 6))
    )
    solved = solve_erdos_renyi(shapes, sparsity, kernel=True, dense=depthwise)
    assert row(solved.sparsity) == close(erk)


# --- Errors --------------------------------------------------------------------------


def test_layers_without_positions_or_counts():
    shapes = {"a": (2, 3), "b": (3, 4)}
    with pytest.raises(ValueError, match=r"^positions lacks layers \['b'\]"):
        inference_flops(shapes, {"a": 1})
    with pytest.raises(ValueError, match=r"^n_active lacks .* unknown layers \['c'\]"):
        model_megabytes(shapes, {"a": 1, "b": 1, "c": 1})


@pytest.mark.parametrize("count", [-1, 7, math.nan])
def test_counts_outside_the_layer(count):
    with pytest.raises(ValueError, match=rf"^n_active\['a'\]={count} must lie in"):
        model_megabytes({"a": (2, 3)}, {"a": count})


@pytest.mark.parametrize("ratio", [-0.1, math.nan, math.inf, []])
def test_ratios_that_are_none(ratio):
    with pytest.raises(ValueError, match=r"^f="):
        training_flops(ratio)


def test_interval_and_length_out_of_range():
    with pytest.raises(ValueError, match=r"^interval=0 must be at least 1 step"):
        training_flops(0.5, interval=0)
    with pytest.raises(ValueError, match=r"^length_multiplier=0.0 must be positive"):
        training_flops(0.5, length_multiplier=0.0)
