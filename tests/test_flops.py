"""The cost tables of configurations: published ones, and sums step by step."""

import math
import runpy

import jax
import numpy as np
import pandas as pd
import pytest
import run_cli

from lottery_flow import counting, flops, models
from lottery_flow.build import Layers, build, layers
from lottery_flow.sparsity import distributions, masks


def resnet50(counts):
    model = models.create("resnet50", (224, 224, 3), 1000)
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    shapes = {k: v.shape for k, v in masks.layers(params).items()}
    published = model.positions | flops.PUBLISHED_POSITIONS["resnet50"]
    return Layers(shapes, published, counts(shapes))


@pytest.mark.parametrize(
    ("counts", "total", "megabytes", "f", "rigl"),
    [
        (
            lambda shapes: distributions.erdos_renyi_kernel(shapes, 0.8),
            *(3.406320e9, 23.68364, 0.41529, 0.4172),
        ),
        (
            lambda shapes: distributions.uniform(shapes, 0.9, dense=("conv1",)),
            *(1.054234e9, 13.53196, 0.12853, 0.1314),
        ),
    ],
)
def test_resnet50_is_the_published_row(counts, total, megabytes, f, rigl):
    own = resnet50(counts)
    row = flops.by_layer(own).iloc[-1]
    assert row["layer"] == "all"
    assert row["flops"] == pytest.approx(total, rel=1e-4)
    assert row["dense_flops"] == 8_202_340_776
    assert row["megabytes"] == pytest.approx(megabytes, rel=1e-4)
    ratio = row["flops"] / row["dense_flops"]
    assert ratio == pytest.approx(f, rel=1e-4)
    config = config_of("rigl_lenet5")  # rewires every 100 steps, as published
    methods = flops.by_method(config, ratio).set_index("method")["ratio"]
    assert methods["RigL, every 100 steps"] == pytest.approx(rigl, abs=5e-5)


def config_of(name):
    return runpy.run_path(str(run_cli.ROOT / "configs" / f"{name}.py"))["get_config"]()


def test_the_row_of_all_layers_is_their_sum():
    own = layers(config_of("rigl_lenet5"))
    table = flops.by_layer(own).set_index("layer")
    for column in ("weights", "active", "flops", "dense_flops", "megabytes"):
        assert table[column]["all"] == pytest.approx(table[column][:-1].sum())
    assert list(table["active"]) == [8, 120, 1536, 504, 42, 2210]
    assert table["sparsity"]["conv1"] == 1 - 8 / 150


def test_pruning_costs_the_mean_over_its_steps():
    """Layer by layer with the weights that are there, one step after the other."""
    config = config_of("prune_lenet5")
    own = layers(config)
    job = build(config, 0)
    total, sizes = [], {k: math.prod(s) for k, s in own.shapes.items()}
    kept = dict(sizes)
    begin, end = config.sparsity.begin_steps, config.sparsity.end_steps
    for step in range(config.train.total_steps):
        costs = counting.inference_flops(own.shapes, own.positions, kept)
        total.append(sum(costs.values()))
        if begin <= step <= end and (step - begin) % 100 == 0:
            left = (1 - (step - begin) / (end - begin)) ** 3
            final = {k: own.n_active[k] / sizes[k] for k in sizes}
            kept = {k: n * (final[k] + (1 - final[k]) * left) for k, n in sizes.items()}
    assert job.rule.timing == "after"  # the gradient of a step comes first
    row = flops.by_layer(own).iloc[-1]
    f = row["flops"] / row["dense_flops"]
    methods = flops.by_method(config, f).set_index("method")["ratio"]
    expected = np.mean(total) / total[0]
    assert methods["gradual pruning"] == pytest.approx(expected, rel=1e-9)
    assert f < expected < methods["dense"] == 1
    n = config.train.total_steps
    snip = methods["SNIP (one dense gradient, then fixed)"]
    assert snip == pytest.approx(f + (1 - f) / n, rel=1e-9)


def test_the_command_prints_and_writes_the_table(tmp_path):
    config = f"--config={run_cli.ROOT}/configs/rigl_mlp.py"
    path = tmp_path / "layers.csv"
    done = run_cli.in_process(config, f"--csv={path}", module=flops)
    assert done.status == 0, done.stderr
    assert "fc1 784x300         1   235200" in done.stdout
    assert "RigL, every 500 steps" in done.stdout
    table = pd.read_csv(path, keep_default_na=False)
    pd.testing.assert_frame_equal(
        table, flops.by_layer(layers(config_of("rigl_mlp"))), check_dtype=False
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--config is missing"),
        (("--config=configs/rigl_mlp.py", "--as_published"), "mlp no table is known"),
        (
            ("--config=configs/rigl_mlp.py", "--config.model.wide=2"),
            "model.wide is",
        ),
        (("--config=configs/rigl_mlp.py", "--config.model.width=2"), "width=2.0: mlp"),
    ],
)
def test_mistakes(args, message, monkeypatch):
    monkeypatch.chdir(run_cli.ROOT)
    done = run_cli.in_process(*args, module=flops)
    assert done.status == 2
    assert message in done.errors[0]
