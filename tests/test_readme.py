"""The README's own code runs."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli

from lottery_flow import build, export, main
from lottery_flow.sparsity import masks

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    """Its code in Python: a run, analysis, a loop, a method, an exported network."""
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(found) == 5
    return found


def test_the_run_of_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        exec(blocks()[0], scope)
    assert (scope["directory"] / "DONE").exists()
    n_active = {k: int(n) for k, n in masks.count(scope["network"].masks).items()}
    assert n_active == {"fc1": 4704, "fc2": 600, "fc3": 20}  # 98 % of each are zero
    # What is finished is not trained again.
    monkeypatch.setattr("lottery_flow.main.train_all", pytest.fail)
    assert main.run(scope["config"], "runs") == [scope["directory"]]


def test_the_loop_of_the_readme_trains_a_sparse_network():
    code = blocks()[2]
    kernel = jax.random.normal(jax.random.key(0), (20, 10))
    scope = {
        "params": {"dense": {"kernel": kernel, "bias": jnp.zeros(10)}},
        "loss_fn": lambda p, x: jnp.mean(
            (x @ p["dense"]["kernel"] + p["dense"]["bias"][None] - 1.0) ** 2
        ),
    }
    batch = jax.random.normal(jax.random.key(3), (32, 20))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int and float
        exec(code, scope)
        params, state = scope["params"], scope["state"]
        first = scope["loss_fn"](params, batch)
        for _ in range(101):
            params, state = scope["step"](params, state, batch)
    assert scope["loss_fn"](params, batch) < first
    mask = state.masks["dense"]["kernel"]
    assert int(jnp.sum(mask)) == 20  # 90 % of 200 weights are inactive
    assert not jnp.any(jnp.where(mask, 0.0, params["dense"]["kernel"]))


def test_the_analysis_of_the_readme_runs():
    code = blocks()[1]
    x = jax.random.normal(jax.random.key(0), (120, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 10))
    mask = kernel > 0
    scope = {
        "jax": jax,
        "examples": x,
        "params": {"kernel": jnp.where(mask, kernel, 0.0)},
        "masks": {"kernel": mask},
        "loss_fn": lambda p, x: jnp.mean(jnp.sum(jnp.tanh(x @ p["kernel"]), axis=1)),
    }
    exec(code, scope)
    n = int(jnp.sum(mask))
    assert len(scope["everything"].frame()) == n == scope["density"].n
    top = scope["everything"].eigenvalues[::-1][:5]
    assert jnp.allclose(scope["top"].values, top, atol=1e-3 * top[0])


def test_the_exported_network_of_the_readme_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run_cli.small_config()
    job = build.build(config, 0)
    network = job.make_network()
    about = {"model": json.dumps(build.description(config))}
    export.save("rigl.model", network.params, network.masks, about=about)
    scope = {"images": np.full((16, 28, 28, 1), 100, np.uint8)}
    exec(blocks()[4], scope)
    assert scope["logits"].shape == (16, 10)
