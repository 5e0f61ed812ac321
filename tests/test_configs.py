"""Every file of configs/: the paper's numbers, built whole, run in smoke."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import run_cli

from lottery_flow import checkpoint, data, metrics
from lottery_flow.build import build
from lottery_flow.errors import UserError
from lottery_flow.sparsity import masks as masks_lib

FILES = sorted(run_cli.ROOT.glob("configs/*.py"))
NAMES = [path.stem for path in FILES]
N_WEIGHTS = {"lenet5": 44_190, "mlp": 266_200}
# Kernels' active weights of each pruned network at its last step.
N_ACTIVE = {"lenet5": 2_210, "mlp": 5_324}
RULES = ("rigl_inverted", "rigl", "set")
METHODS = ("dense", "small_dense", "scratch", "lottery", "prune", *RULES)
# Those of the paper; tests/test_methods.py has the others.
NETWORKS = ("lenet5", "mlp", "resnet50", "vgg16", "wrn22_2", "resnet20")
OWN = [f"{m}_{n}" for m in METHODS for n in NETWORKS if f"{m}_{n}" in NAMES]
PAPER = [name for name in OWN if re.search("lenet5$|mlp$", name)]


@pytest.fixture(autouse=True)
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def get_config(name: str, *args: str):
    spec = importlib.util.spec_from_file_location(
        name, run_cli.ROOT / "configs" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


def test_there_is_a_config_for_each_method_and_network():
    wanted = {f"{m}_{n}" for m in METHODS for n in ("lenet5", "mlp")}
    assert wanted == set(PAPER)
    for network in ("resnet50", "vgg16", "wrn22_2", "resnet20"):
        assert {f"{m}_{network}" for m in (*METHODS, "snip")} <= set(NAMES)
    assert "quickstart" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_that_of_the_file_and_fields_are_locked(name):
    config = get_config(name)
    assert config.name == name
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 0.1


@pytest.mark.parametrize("name", PAPER)
def test_hyper_parameters_of_the_paper(name):
    config, mlp = get_config(name), name.endswith("mlp")
    assert config.data.name == "mnist"
    assert config.train.total_steps == 11_719
    assert config.train.batch_size == 128
    assert config.train.probe_examples == 1000
    optim = config.optim
    assert (optim.name, optim.momentum) == ("keras_momentum", 0.9)
    assert (optim.nesterov, optim.warmup_steps) == (False, 0)
    assert (optim.learning_rate, optim.schedule) == (0.2 if mlp else 0.05, "cosine")
    assert optim.weight_decay == (2e-4 if mlp else 1e-3)
    sparsity = config.sparsity
    if "dense" in name:
        assert (sparsity.rule, sparsity.sparsity) == ("static", 0.0)
        return
    assert sparsity.sparsity == (0.98 if mlp else 0.95)
    assert (sparsity.distribution, sparsity.dense_layers) == ("uniform", "")
    if name.startswith("prune"):
        steps = sparsity.begin_steps, sparsity.end_steps, sparsity.interval_steps
        assert (sparsity.rule, *steps) == ("gradual_pruning", 3000, 7000, 100)
    if name.startswith(RULES):
        assert name.startswith(sparsity.rule)
        assert sparsity.interval_steps == (500 if mlp else 100)
        assert (sparsity.begin_steps, sparsity.end_steps) == (0, -1)
        assert (sparsity.drop_fraction, sparsity.drop_schedule) == (
            0.3,
            "learning_rate",
        )
        assert (sparsity.timing, sparsity.grow_examples) == ("after", 1000)
    if name.startswith(("lottery", "scratch")):
        assert sparsity.rule == "static"


IMAGENET = [name for name in OWN if re.search("resnet50$|vgg16$", name)]


@pytest.mark.parametrize("name", IMAGENET)
def test_hyper_parameters_for_imagenet(name):
    config, vgg = get_config(name), name.endswith("vgg16")
    size = config.train.total_steps, config.train.batch_size
    assert size == ((128_000, 1024) if vgg else (32_000, 4096))
    optim, sparsity = config.optim, config.sparsity
    assert (optim.name, optim.nesterov, optim.momentum) == ("momentum", True, 0.9)
    assert optim.weight_decay == 1e-4
    assert config.loss.label_smoothing == 0.1
    epoch = 1_281_167 / config.train.batch_size
    for step, at in zip(optim.milestone_steps, (30, 70, 90), strict=True):
        assert step == pytest.approx(at * epoch, abs=1)
    assert optim.learning_rate == pytest.approx(0.1 * config.train.batch_size / 256)
    factor = 4 if vgg else 1
    if name.startswith(RULES):
        assert (sparsity.begin_steps, sparsity.end_steps) == (0, factor * 25_000)
        assert (sparsity.interval_steps, sparsity.drop_fraction) == (100, 0.3)
    if name.startswith("prune"):
        steps = sparsity.begin_steps, sparsity.end_steps, sparsity.interval_steps
        assert steps == (factor * 10_000, factor * 25_000, factor * 1000)
        ticket = get_config(name.replace("prune", "lottery"))
        assert ticket.sparsity.weights_step % config.train.checkpoint_every_steps == 0
        assert config.train.keep_checkpoints == 0  # so that it is there
    if "dense" not in name:
        assert sparsity.sparsity == 0.8
        assert sparsity.dense_layers == ("" if vgg else "conv1")


CIFAR = [name for name in OWN if re.search("wrn22_2$|resnet20$", name)]


@pytest.mark.parametrize("name", CIFAR)
def test_hyper_parameters_for_cifar(name):
    config, wide = get_config(name), name.endswith("wrn22_2")
    optim, sparsity = config.optim, config.sparsity
    assert (config.data.name, config.data.augment) == ("cifar10", "crop_flip")
    assert (config.train.batch_size, optim.learning_rate) == (128, 0.1)
    assert (optim.name, optim.momentum, optim.nesterov) == ("momentum", 0.9, wide)
    found = config.train.total_steps, optim.milestone_steps, optim.decay_factor
    assert found == (
        (97_656, (30_000, 60_000, 90_000), 0.2)
        if wide
        else (64_000, (32_000, 48_000), 0.1)
    )
    assert optim.weight_decay == (5e-4 if wide else 1e-4)
    if name.startswith(RULES):
        assert (sparsity.begin_steps, sparsity.interval_steps) == (0, 100)
        assert sparsity.end_steps == (75_000 if wide else 48_000)
    if name.startswith("prune"):
        ticket = get_config(name.replace("prune", "lottery"))
        assert ticket.sparsity.weights_step % config.train.checkpoint_every_steps == 0
    if "dense" not in name:
        assert (sparsity.sparsity, sparsity.dense_layers) == (0.9, "conv1")


def test_the_rate_falls_at_the_milestones():
    rate = build(get_config("rigl_resnet50"), 0).learning_rate
    for step, before, after in ((9383, 1.6, 0.16), (21_894, 0.16, 0.016)):
        found = [float(rate(step + i)) for i in (-1, 0, 1)]
        np.testing.assert_allclose(found, [before, after, after], rtol=1e-6)


def test_arguments_of_a_config():
    config = get_config("rigl_resnet50", "sparsity=0.9,distribution=uniform,length=5")
    assert (config.sparsity.sparsity, config.sparsity.distribution) == (0.9, "uniform")
    assert config.train.total_steps == 160_000
    assert config.optim.milestone_steps == (46_915, 109_470, 140_750)
    assert (config.sparsity.end_steps, config.sparsity.interval_steps) == (125_000, 100)
    pruned = get_config("prune_lenet5", "length=2")
    assert (pruned.sparsity.begin_steps, pruned.sparsity.end_steps) == (6000, 14_000)
    both = get_config("rigl_resnet50", "smoke,length=5")
    assert both.train.total_steps == 12
    for wrong in ("small", "sparsity=much", "length=0", "sparsity", "length=nan"):
        with pytest.raises(UserError, match=f"'{wrong}' after the colon is unknown"):
            get_config("rigl_lenet5", wrong)


@pytest.mark.parametrize("network", ["lenet5", "mlp"])
def test_the_ticket_takes_masks_of_the_end_and_weights_of_the_start(network):
    config = get_config(f"lottery_{network}")
    config.sparsity.masks_from = "there"
    resolved = config.copy_and_resolve_references().sparsity
    assert (resolved.masks_from, resolved.weights_from) == ("there", "there")
    assert (resolved.masks_step, resolved.weights_step) == (-1, 0)


def abstract_run(job):
    """The state after one step and the metrics, from shapes alone."""
    height, width, channels = job.spec.image_shape
    images = np.zeros((job.batch_size, height, width, channels), np.uint8)
    batch = {"image": images, "label": np.zeros(job.batch_size, np.int32)}
    grow = batch if job.grow_examples else None

    def everything():
        network = job.make_network()
        state = job.create(network, job.rewire_key, job.step_key, job.knobs)
        steps = job.make_steps()
        data, grow_batch = jax.tree.map(jax.numpy.asarray, (batch, grow))
        args = job.knobs, data, jax.numpy.arange(job.batch_size)
        return steps.rewire(steps.train(state, *args)[0], *args, grow_batch)

    return jax.eval_shape(everything)


# Others of the large networks differ from these as those of the small ones do.
BUILT = {"rigl_resnet50", "prune_vgg16", "small_dense_vgg16"}
BUILT |= {"rigl_wrn22_2", "small_dense_wrn22_2", "small_dense_resnet20"}


@pytest.mark.parametrize("name", sorted(BUILT.union(PAPER, ["quickstart"])))
def test_the_full_size_builds_without_data(name):
    job = build(get_config(name), 0)
    state, measured, before = abstract_run(job)
    assert jax.tree.map(lambda leaf: leaf.shape, before.params) == jax.tree.map(
        lambda leaf: leaf.shape, state.params
    )
    small = {
        "small_dense_lenet5": 2_399,
        "small_dense_mlp": 6_442,
        "small_dense_vgg16": 3_040_100 + 1000,
        # A tenth of the kernels but the first, of 1,079,642 and 272,474.
        "small_dense_wrn22_2": 110_262,
        "small_dense_resnet20": 29_154,
    }
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    whole = {"lenet5": 44_426, "mlp": 266_610, "quickstart": 44_426}
    whole |= {"resnet50": 25_557_032, "vgg16": 15_223_464, "wrn22_2": 1_079_642}
    network = re.sub(".*(dense|prune|lottery|scratch|set|rigl|inverted)_", "", name)
    assert n_parameters == (small.get(name) or whole[network])
    assert measured["loss"].shape == ()
    n_masks = len(jax.tree.leaves(state.opt_state.masks))
    assert (n_masks == 0) == ("dense" in name)


def smoke(name: str, workdir: Path, **fields: object) -> tuple[Path, str]:
    fields = {"train__figure": False} | fields
    args = run_cli.flag_list(f"{name}:smoke", workdir, **fields)
    outcome = run_cli.in_process(*args)
    assert outcome.status == 0
    assert not outcome.errors
    return run_cli.run_directory(workdir), outcome.stdout


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """name -> (run directory, stdout) of its smoke run; each is run once."""
    root, done = tmp_path_factory.mktemp("smoke"), {}

    def get(name):
        if name not in done:
            done[name] = smoke(name, root / name)
        return done[name]

    return get


# The methods left out of one of the small networks run on the other; the large ones
# take minutes to compile.
LEFT_OUT = (
    "(dense|small|set|rigl_inv).*lenet5|(prune|lottery|scratch)_mlp|.*(50|vgg16)$"
    "|.*(wrn22_2|resnet20|imagenette)$"
)
SMOKED = [name for name in (*OWN, "quickstart") if not re.match(LEFT_OUT, name)]


@pytest.mark.parametrize("name", SMOKED)
def test_smoke_runs_to_its_end(smoked, name):
    run, stdout = smoked(name)
    assert (run / "DONE").exists()
    assert (run / "summary.txt").read_text() in stdout
    assert checkpoint.steps_in(run / "checkpoints") == [0, 6, 12]
    _, network = checkpoint.restore_network(run / "checkpoints")
    counts = masks_lib.counts(network.masks, network.params)
    model = name.split("_")[-1]
    if "dense" in name:
        assert not jax.tree.leaves(network.masks)
    elif model in N_ACTIVE:
        assert sum(counts.values()) == N_ACTIVE[model]
        assert (
            sum(v.size for v in masks_lib.layers(network.params).values())
            == (N_WEIGHTS[model])
        )


def test_smoke_of_pruning_starts_dense(smoked):
    run, _ = smoked("prune_lenet5")
    _, first = checkpoint.restore_network(run / "checkpoints", 0)
    counts = masks_lib.counts(first.masks, first.params)
    assert sum(counts.values()) == N_WEIGHTS["lenet5"]


def test_a_ticket_is_the_first_weights_under_the_last_masks(smoked, tmp_path):
    pruned, _ = smoked("prune_lenet5")
    ticket, _ = smoke("lottery_lenet5", tmp_path, sparsity__masks_from=pruned)
    last = checkpoint.restore_network(pruned / "checkpoints")[1]
    rewound = checkpoint.restore_network(pruned / "checkpoints", 0)[1]
    start = checkpoint.restore_network(ticket / "checkpoints", 0)[1]
    end = checkpoint.restore_network(ticket / "checkpoints")[1]
    masks = masks_lib.named_leaves(last.masks)
    expected = masks_lib.named_leaves(rewound.params)
    for name, found in masks_lib.named_leaves(start.params).items():
        kept = True if masks[name] is None else masks[name]
        wanted = np.where(kept, expected[name], 0).astype(expected[name].dtype)
        np.testing.assert_array_equal(found, wanted)
    for masks_then in (start.masks, end.masks):
        for name, mask in masks_lib.named_leaves(masks_then).items():
            np.testing.assert_array_equal(mask, masks[name])


@pytest.mark.parametrize("init", ["masked_dense", "module"])
def test_scratch_with_the_seed_of_the_pruning_run_is_no_ticket(smoked, init):
    pruned, _ = smoked("prune_lenet5")
    config = get_config("scratch_lenet5", "smoke")
    config.sparsity.masks_from = str(pruned)
    config.model.init = init
    scratch = build(config, 0).make_network()
    ticket = checkpoint.restore_network(pruned / "checkpoints", 0)[1]
    weights = masks_lib.named_leaves(ticket.params)
    for name, mask in masks_lib.named_leaves(scratch.masks).items():
        if mask is not None:
            fresh = np.asarray(masks_lib.named_leaves(scratch.params)[name])
            assert not np.any(fresh[mask] == weights[name][mask])


def test_fields_from_the_command_line(tmp_path):
    fields = {"optim__learning_rate": 0.125, "train__seeds": "(3, 4)"}
    args = run_cli.flag_list("dense_mlp:smoke", tmp_path, **fields)
    assert run_cli.in_process(*args).status == 0
    for seed in (3, 4):
        run = run_cli.run_directory(tmp_path, seed)
        record = json.loads((run / "config.json").read_text())
        assert record["optim.learning_rate"] == 0.125
        assert record["seed"] == seed
        assert metrics.read(run / "metrics.jsonl")[0]["learning_rate"] == 0.125
        assert (run / "figure.png").stat().st_size > 10_000


def test_the_specs_of_the_data_are_those_of_the_paper():
    spec = data.DATASETS["mnist"].spec
    assert (spec.mean, spec.std, spec.n_train) == ((0.0,), (1.0,), 60_000)
