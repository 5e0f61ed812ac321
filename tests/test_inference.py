"""Exported networks as functions of images: the masked network's logits."""

import json

import jax
import jax.numpy as jnp
import layer_kinds
import numpy as np
import pytest

from lottery_flow import export, inference
from lottery_flow.sparsity import execution_choice
from lottery_flow.steps import normalize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
OWN = {"image_shape": layer_kinds.IMAGE, "mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def network():
    return layer_kinds.network()


def make(network, **options):
    model, variables, masks = network
    stats = jax.tree.map(lambda s: s + 0.3, variables["batch_stats"])
    return inference.make(model, variables["params"], masks, stats, **OWN, **options)


def images(n):
    shape = n, *layer_kinds.IMAGE
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("execution", ["dense", "compressed"])
def test_logits_are_those_of_the_masked_network(network, execution):
    model, variables, _ = network
    net = make(network, execution=execution)
    stats = jax.tree.map(lambda s: s + 0.3, variables["batch_stats"])
    for n in (1, 5):  # any number, whatever it was measured for
        own = normalize(jnp.asarray(images(n)), MEAN, STD)
        expected, _ = model.apply(variables["params"], stats, own, False)
        found = net.apply(net.variables, images(n))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    program = net.apply.lower(net.variables, images(1)).as_text()
    assert ("cpu_csr_sparse_dense" in program) == (execution == "compressed")


def test_compressed_kernels_are_all_that_is_kept(network):
    net = make(network, execution="compressed")
    assert net.compressed == layer_kinds.PLANNED
    left = {"".join(map(str, k)) for k, _ in jax.tree.leaves_with_path(net.variables)}
    kernels = {k for k in left if k.startswith("['params']") and "kernel" in k}
    assert kernels == {"['params']['groups']['kernel']"}
    for name, kernel in net.variables["compressed"].items():
        n = int(np.prod(network[0].layers[name].kernel_shape)) // 4
        assert kernel.values.shape == kernel.inputs.shape == (n,)


def test_auto_compresses_what_pays_alone_and_together(network, monkeypatch):
    layers = network[0].layers
    times = {layers["strided"]: (1.0, 0.9), layers["fc"]: (1.0, 0.4)}
    whole = {}
    monkeypatch.setattr(
        execution_choice,
        "measure_forward",
        lambda layer, n, batch: times.get(layer, (1.0, 0.99)),
    )
    monkeypatch.setattr(
        execution_choice, "least", lambda passes: list(whole.values())[: len(passes)]
    )
    for names, *own in (
        (["strided", "fc"], 1.0, 0.5, 0.6),
        (["fc"], 1.0, 0.7, 0.6),
        ([], 1.0, 0.98, 0.99),
    ):
        whole.update(zip(("dense", "all", "clear"), own, strict=True))
        assert make(network).compressed == names


def test_mistakes(network, tmp_path):
    with pytest.raises(ValueError, match=r"execution='fast': choose one of auto, "):
        make(network, execution="fast")
    _, variables, masks = network
    whole = {
        "name": "mlp",
        "options": {},
        "image_shape": [28, 28, 1],
        "n_classes": 10,
        "mean": [0.0],
        "std": [1.0],
    }
    for changed in (
        *({}, [], "[" * 100_000, whole | {"options": 3}, whole | {"name": "os.system"}),
        *(whole | {"n_classes": "10"}, whole | {"options": {"widths": [-3]}}),
        whole | {"image_shape": 5},
    ):
        text = changed if isinstance(changed, str) else json.dumps(changed)
        about = {"model": text}
        export.save(tmp_path / "net", variables["params"], masks, about=about)
        with pytest.raises(ValueError, match="does not say what network it holds"):
            inference.load(tmp_path / "net")
    about = {"model": json.dumps(whole)}
    export.save(tmp_path / "net", variables["params"], masks, about=about)
    with pytest.raises(ValueError, match=r"fc1 has the shape \(784, 300\)"):
        inference.load(tmp_path / "net")
