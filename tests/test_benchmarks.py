"""The benchmarks run, compare what they say, and time the same work."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import run_cli

from benchmarks import cases, measure, networks, pipeline, sparse_layers
from lottery_flow.data import images


def test_ratios_are_of_the_same_rounds(monkeypatch):
    now = iter(np.cumsum([0.0, *[0.25] * 1000]))
    monkeypatch.setattr(measure, "clock", lambda: next(now))
    calls = {"a": 0, "b": 0}

    def way(name):
        def run(n):
            calls[name] += n

        return run

    ways = {"a": way("a"), "b": way("b")}
    (found,) = measure.compare(
        ways, "a", targets={"b": 0.5}, rounds=5, seconds=1.0, units={"b": 4}
    )
    # Every turn takes one tick, whatever is done; b does four units in each.
    assert (found.ratio, found.target) == (0.25, 0.5)
    assert calls["a"] == calls["b"] == 2 + 5 * 4


def test_one_case_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "topk_1e5"]
    out = tmp_path / "table.csv"
    done = subprocess.run(
        [*command, f"--out={out}"], cwd=run_cli.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "top-k of 1e+05" in done.stdout
    lines = out.read_text().splitlines()
    assert lines[0].startswith("# ")
    header, row = (line.split(",") for line in lines if not line.startswith("#"))
    assert header == list(measure.Ratio._fields)
    assert 0 < float(row[header.index("ratio")]) < 1


def test_an_unknown_case_is_one_sentence():
    command = [sys.executable, "-m", "benchmarks.run", "speed"]
    done = subprocess.run(command, cwd=run_cli.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown: speed; mlp, lenet5" in done.stderr


def test_the_plain_lenet5_is_the_same_network():
    setting = networks.SETTINGS["lenet5"]
    ours = networks.create_model(setting)
    plain = networks.create_model(setting._replace(name="plain_lenet5"))
    variables = jax.jit(ours.init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 28, 28, 1))
    found = [
        jax.jit(m.apply, static_argnums=3)(variables["params"], {}, images, True)[0]
        for m in (ours, plain)
    ]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


def test_the_dense_step_is_the_sparse_one_with_everything_active():
    """What is compared differs in sparsity alone."""
    setting = networks.SETTINGS["mlp"]._replace(batch_size=4)
    model = networks.create_model(setting)
    data, indices = networks.data(setting, 8), jax.numpy.arange(4)
    state, steps = networks.sparse_steps(setting, model)
    dense, step = networks.dense_step(setting, model)
    masked = jax.tree.map(np.asarray, state.params)
    (params, *_), (loss, _) = jax.jit(step)((masked, *dense[1:]), data, indices)
    new, measured = jax.jit(steps.train)(state, {}, data, indices)
    assert float(loss) == pytest.approx(float(measured["loss"]), rel=1e-5)
    mask = np.asarray(new.masks["fc1"]["kernel"])
    found, expected = (np.asarray(p["fc1"]["kernel"]) for p in (new.params, params))
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-6)
    assert not found[~mask].any()
    assert expected[~mask].any()


def test_every_case_is_described():
    text = (run_cli.ROOT / "benchmarks" / "README.md").read_text()
    for name in cases.CASES:
        stem = name.split("_")[0]
        assert f"`{name}`" in text or f"`{stem}_...`" in text, name


def test_written_images_are_a_data_set(tmp_path):
    for name in ("a", "b"):
        pipeline.write_images(tmp_path / name, n=2)
    first, again = (images.open_folder(str(tmp_path / d), 16) for d in ("a", "b"))
    assert (len(first.train), len(first.test)) == (2, 2)
    assert images.decode(first.train[1]["image"]).size == (500, 375)
    assert first.train[1] == again.train[1]
    assert first.train[0]["image"] != first.train[1]["image"]


def test_rates_are_of_the_longer_stream_alone(monkeypatch, tmp_path):
    """What starting costs, here 7 s, drops out: 6 images in 3 s."""
    pipeline.write_images(tmp_path, n=2)
    dataset = images.open_folder(str(tmp_path), 16)
    now = iter([0.0, 7.0 + 1.0, 20.0, 20.0 + 7.0 + 4.0])
    monkeypatch.setattr(pipeline, "_processor_seconds", lambda: next(now))
    found = pipeline.images_per_second(dataset, 0, batch_size=2, n_batches=3)
    assert found == 2.0


def test_curves_of_layers_compare_the_same_products(monkeypatch):
    panels = [
        sparse_layers._dense(8, 6, 4),
        sparse_layers._conv(3, 2, 3, 5, 2),
        sparse_layers._conv(1, 2, 3, 5, 2, "patches"),
    ]
    monkeypatch.setattr(sparse_layers, "PANELS", panels)
    monkeypatch.setattr(sparse_layers, "SPARSITIES", (0.5,))
    results = {}

    def compare(ways, reference, **_):
        results.update({k: np.asarray(way(1)) for k, way in ways.items()})
        return [measure.Ratio(k, reference, 1.0, 1.0, 1.0, 1.0, 1.0) for k in ways]

    def once(compiled, *args):
        return lambda n: sum(leaf.size for leaf in jax.tree.leaves(compiled(*args)))

    monkeypatch.setattr(sparse_layers, "compare", compare)
    monkeypatch.setattr(sparse_layers, "again", once)
    rows = list(sparse_layers.curves(1))
    assert len(rows) == 3 * (2 + 3)
    for title, *_ in panels:  # as many numbers, whatever the way
        own = {k: int(n) for k, n in results.items() if k.startswith(title)}
        for group in (sparse_layers.FORWARD, sparse_layers.BOTH):
            assert len({n for k, n in own.items() if f": {group}, " in k}) == 1
    assert len(sparse_layers.plot(rows).axes) == 3
