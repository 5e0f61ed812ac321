"""Exported networks: the same bits again, sizes as counted, damage and mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cli
from numpy.testing import assert_array_equal
from safetensors import safe_open
from safetensors.numpy import save as serialize

from lottery_flow import counting, export, inference, models
from lottery_flow.build import build, flat_fields
from lottery_flow.loop import Run
from lottery_flow.runs import RunPaths
from lottery_flow.sparsity import distributions, masks
from lottery_flow.steps import normalize
from lottery_flow.train import train


def network(dtype=jnp.float32):
    """Odd sizes, a dense leaf, special values among the active weights."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 5), "block": {"fc": (7, 3), "out": (3, 2)}}
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    params = jax.tree.map(
        lambda s: {
            "kernel": jnp.asarray(rng.normal(size=s), dtype),
            "bias": jnp.asarray(rng.normal(size=s[-1:]), jnp.float32),
        },
        shapes,
        **is_shape,
    )
    own = jax.tree.map(
        lambda s: {"kernel": jnp.asarray(rng.random(s) < 0.3), "bias": None},
        shapes,
        **is_shape,
    )
    own["block"]["out"]["kernel"] = None
    # A weight that was just grown, and bits that a comparison of values would miss.
    kernel = np.asarray(params["conv"]["kernel"]).copy()
    active = np.flatnonzero(own["conv"]["kernel"])
    kernel.flat[active[:3]] = np.array([0.0, -0.0, np.nan])
    params["conv"]["kernel"] = jnp.asarray(kernel)
    stats = {"norm": {"mean": jnp.ones(5), "var": jnp.full(5, 2.0)}}
    return masks.apply(own, params), own, stats


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_network_comes_back_with_the_same_bits(tmp_path, dtype):
    params, own, stats = network(dtype)
    path = tmp_path / "net.safetensors"
    size = export.save(path, params, own, stats, {"run": "a run"})
    assert path.stat().st_size == size
    found = export.load(path)
    jax.tree.map(same_bits, found.params, params)
    jax.tree.map(same_bits, found.batch_stats, stats)
    none = {"is_leaf": lambda x: x is None}
    assert jax.tree.structure(found.masks, **none) == jax.tree.structure(own, **none)
    jax.tree.map(same_bits, found.masks, own)
    assert found.about == {"run": "a run"}
    assert list(tmp_path.iterdir()) == [path]


def test_other_programs_read_it(tmp_path):
    """By the names and shapes that the module's docstring promises."""
    params, own, stats = network()
    export.save(tmp_path / "net", params, own, stats)
    with safe_open(tmp_path / "net", framework="np") as file:
        kernel, mask = params["conv"]["kernel"], own["conv"]["kernel"]
        same_bits(file.get_tensor("params/conv/kernel.values"), kernel[mask])
        bits = file.get_tensor("params/conv/kernel.mask")
        assert_array_equal(np.unpackbits(bits)[:90], np.asarray(mask).ravel())
        assert len(bits) == 12  # 90 bits
        same_bits(file.get_tensor("params/conv/bias"), params["conv"]["bias"])
        assert "batch_stats/norm/mean" in file.keys()


def test_resnet50_takes_the_counted_megabytes(tmp_path):
    model = models.create("resnet50", (224, 224, 3), 1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes["params"])
    layers = {k: v.shape for k, v in masks.layers(params).items()}
    n_active = distributions.erdos_renyi_kernel(layers, 0.8)
    named = {}
    for name, leaf in masks.layers(params).items():
        named[name] = np.arange(leaf.size).reshape(leaf.shape) < n_active[name]
        leaf[named[name]] = 1.5
    own = masks.from_named(named, params)
    path = tmp_path / "resnet50"
    size = export.save(path, params, own) / 1e6
    counted = counting.model_megabytes(layers, n_active)
    assert counted == pytest.approx(23.68364, rel=1e-4)
    assert size == pytest.approx(counted, rel=0.01)
    # With the running statistics as well: two numbers for each of 26,560 channels.
    stats = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes["batch_stats"])
    whole = export.save(path, params, own, stats) / 1e6
    assert whole == pytest.approx(size + 2 * 26_560 * 4 / 1e6, rel=1e-3)
    found = export.load(path)
    jax.tree.map(same_bits, found.params, params)


def test_matrices_have_the_active_weights_as_entries():
    params, own, _ = network()
    kernel = jnp.nan_to_num(params["conv"]["kernel"], nan=7.0)
    mask = own["conv"]["kernel"]
    matrix = export.csr(kernel, mask)
    assert matrix.nnz == int(mask.sum()) > np.count_nonzero(kernel)
    dense = np.asarray(kernel).reshape(-1, 5).T
    assert_array_equal(matrix.toarray(), dense)
    assert_array_equal(export.bcsr(kernel, mask).todense(), dense)
    patch = np.random.default_rng(1).normal(size=18)
    by_hand = np.einsum("hwi,hwio->o", patch.reshape(3, 3, 2), np.float64(kernel))
    np.testing.assert_allclose(matrix.astype(float) @ patch, by_hand, rtol=1e-6)


@pytest.mark.parametrize("place", [0, 3, 30, 700, -200, -1])
def test_damage_is_found(tmp_path, place):
    params, own, stats = network()
    path = tmp_path / "net"
    export.save(path, params, own, stats)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        export.load(path)


@pytest.mark.parametrize("content", [b"", b"no file of ours at all", b"\0" * 100])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "net").write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or no network"):
        export.load(tmp_path / "net")


def test_what_would_be_lost_is_refused(tmp_path):
    params, own, _ = network()
    params["block"]["fc"]["kernel"] = params["block"]["fc"]["kernel"] + 1.0
    with pytest.raises(ValueError, match=r"block/fc/kernel: \d+ inactive weights"):
        export.save(tmp_path / "net", params, own)
    with pytest.raises(ValueError, match="a/b: names are texts without a slash"):
        export.save(tmp_path / "net", {"a/b": jnp.ones(3)}, {"a/b": None})
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_checkpoint(tmp_path):
    config = run_cli.small_config()
    job, record = build(config, 0), {"seed": 0, **flat_fields(config)}
    paths = RunPaths(tmp_path / "some_run" / "seed_0")
    with jax.numpy_dtype_promotion("standard"):
        (result,) = train([Run(job, paths, record)])
    out = tmp_path / "net.safetensors"
    done = run_cli.in_process(f"--run={paths.root}", f"--out={out}", module=export)
    assert done.status == 0, done.stderr
    assert f"{out.stat().st_size / 1e6:.3f} MB; counted are " in done.stdout
    found = export.load(out)
    jax.tree.map(same_bits, found.params, result.state.params)
    jax.tree.map(same_bits, found.masks, result.state.masks)
    assert found.about.keys() == {"run", "step", "model"}
    assert found.about["run"] == "some_run"
    assert found.about["step"] == str(job.total_steps)
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    own = normalize(jnp.asarray(images), job.spec.mean, job.spec.std)
    logits, _ = job.model.apply(result.state.params, {}, own, False)
    for execution in inference.EXECUTIONS:
        net = inference.load(out, batch_size=4, execution=execution)
        np.testing.assert_allclose(net.apply(net.variables, images), logits, atol=1e-5)
    missing = tmp_path / "nowhere" / "net"
    done = run_cli.in_process(f"--run={paths.root}", f"--out={missing}", module=export)
    assert done.status == 2
    assert "No such file" in done.errors[0]


def test_mistakes(tmp_path):
    for args, message in (
        ((), "--run is missing"),
        ((f"--run={tmp_path}",), "--out is missing"),
        ((f"--run={tmp_path}", "--out=x"), "has no checkpoints"),
        (("run",), "unknown argument 'run'"),
    ):
        done = run_cli.in_process(*args, module=export)
        assert done.status == 2
        assert message in done.errors[0]


# --- Exported networks that were made to do harm -------------------------------------


def made(tensors, shapes) -> bytes:
    """A file with a right checksum."""
    arrays = {k: np.asarray(v) for k, v in tensors.items()}
    about = {"shapes": json.dumps(shapes), "sha256": export._sha256(arrays)}
    return serialize(arrays, metadata=about)


VALUES, BITS = np.ones(3, np.float32), np.array([0b11100000], np.uint8)


def own(**changes):
    return {"params/w.values": VALUES, "params/w.mask": BITS} | changes


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        (own(), {"w": [2**40]}),  # terabytes
        (own(), {"w": [-3]}),
        (own(), {"w": [10**30]}),
        (own(), {"w": "3"}),
        (own(), {"w": [2]}),
        (own(), {"v": [3]}),
        (own(), ["w"]),
        (own(**{"params/w.mask": BITS.astype(np.float32)}), {"w": [3]}),
        (own(**{"other/w": VALUES}), {"w": [3]}),
        (own(**{"params/w/x": VALUES}), {"w": [3]}),  # a leaf in a leaf
    ],
)
def test_an_exported_network_that_does_not_fit_itself(tmp_path, tensors, shapes):
    path = tmp_path / "network"
    path.write_bytes(made(tensors, shapes))
    with pytest.raises(ValueError, match="is damaged, or no network"):
        export.load(path)


def test_names_in_an_exported_network_are_keys_and_no_paths(tmp_path):
    path = tmp_path / "folder" / "network"
    path.parent.mkdir()
    names = ("../../w", "/etc/w", "a\0b")
    path.write_bytes(made({f"params/{n}": VALUES for n in names}, {}))
    found = export.load(path)
    assert found.params[".."][".."]["w"].tolist() == [1, 1, 1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "network"]
    path.write_bytes(made(own(), {"w": [3]}))
    assert export.load(path).params["w"].tolist() == [1, 1, 1]
