"""The recipe of large trainings: parts of a batch, groups of norms, averages, crops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_cli
from populations import ROUNDING, alone, assert_same, leaves, started

from lottery_flow import augment, checkpoint, models, parts
from lottery_flow.data import arrays
from lottery_flow.errors import UserError
from lottery_flow.models.resnet import ResNet
from lottery_flow.models.vit import ViT
from lottery_flow.models.wide_resnet import WideResNet
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules
from lottery_flow.sparsity.transform import sparsify
from lottery_flow.state import create
from lottery_flow.steps import make_steps
from lottery_flow.train import train

MODEL = models.from_module(
    ResNet(5, n_blocks=(1, 1), bottleneck=False, first=4, small_images=True), (8, 8, 3)
)
MEAN, STD = (0.5,) * 3, (0.25,) * 3


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def setting():
    """(state, batch) of a small residual network with random masks."""
    variables = MODEL.init(jax.random.key(0))
    # All branches count, not only the shortcuts.
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape),
        variables["params"],
    )
    n_active = {k: w.size // 2 for k, w in masks_lib.layers(params).items()}
    masks = masks_lib.random(jax.random.key(1), params, n_active)
    tx = sparsify(optax.sgd(1.0), masks, rules.static(), key=jax.random.key(2))
    state = create(tx, params, variables["batch_stats"], jax.random.key(3))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    return state, {"image": images, "label": rng.integers(0, 5, 16).astype(np.int32)}


def one_step(state, batch, **options):
    """The gradient by a step of SGD with rate one, statistics and metrics."""
    steps = make_steps(
        MODEL.apply, lambda _: (optax.sgd(1.0), rules.static()), MEAN, STD, **options
    )
    new, measured = jax.jit(steps.train)(state, {}, batch, None)
    grads = jax.tree.map(jnp.subtract, state.params, new.params)
    return grads, new.batch_stats, measured


@jax.jit
def by_hand(state, batch):
    """Loss, sparse gradient and statistics of images that norms see together."""

    def loss(params):
        images = (batch["image"] / 255.0 - 0.5) / 0.25
        images = images.astype(jnp.float32)
        logits, stats = MODEL.apply(params, state.batch_stats, images, True)
        shares = jax.nn.log_softmax(logits)
        return -jnp.mean(shares[jnp.arange(len(images)), batch["label"]]), stats

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return value, masks_lib.apply(state.masks, grads), stats


def mean_over(found):
    return jax.tree.map(lambda *v: np.mean(np.stack(v), axis=0), *found)


def part(batch, rows):
    return {k: v[rows] for k, v in batch.items()}


def assert_close(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_norms_see_groups_of_images_as_replicas_do(setting):
    state, batch = setting
    groups = [by_hand(state, part(batch, np.s_[i : i + 4])) for i in (0, 4, 8, 12)]
    value, grads, stats = mean_over(groups)
    found_grads, found_stats, measured = one_step(state, batch, norm_examples=4)
    assert_close(found_grads, grads)
    assert_close(found_stats, stats)
    assert measured["loss"] == pytest.approx(value, rel=1e-5)
    whole, *_ = one_step(state, batch)
    change = optax.tree.norm(optax.tree.sub(whole, grads)) / optax.tree.norm(grads)
    assert change > 0.01  # far beyond rounding


def test_a_gradient_in_parts(setting):
    """Running statistics take in one part after another."""
    state, batch = setting
    found, own = [], state
    for i in range(2):
        found.append(by_hand(own, part(batch, np.s_[i::2])))
        own = own._replace(batch_stats=found[-1][2])
    value, grads, _ = mean_over(found)
    found_grads, found_stats, measured = one_step(state, batch, accumulate_steps=2)
    assert_close(found_grads, grads)
    assert_close(found_stats, own.batch_stats)
    assert measured["loss"] == pytest.approx(value, rel=1e-5)


def test_parts_of_groups(setting):
    state, batch = setting
    rows = [np.s_[i + 2 * j : i + 2 * j + 8 : 2] for i in (0, 1) for j in (0, 4)]
    expected = mean_over([by_hand(state, part(batch, r))[1] for r in rows])
    found, *_ = one_step(state, batch, accumulate_steps=2, norm_examples=4)
    assert_close(found, expected)


@pytest.mark.parametrize("grow_examples", [0, 30])
def test_without_norms_parts_give_the_gradient_of_the_batch(tmp_path, grow_examples):
    """Of steps, of growth batches and of probes."""
    fields = {"sparsity__rule": "rigl", "sparsity__grow_examples": grow_examples}
    fields |= {"train__seeds": (0, 1), "train__population": "together"}
    whole = train(started(tmp_path / "whole", **fields))
    cut = train(started(tmp_path / "parts", train__accumulate_steps=4, **fields))
    for a, b in zip(cut, whole, strict=True):
        assert_same(a, b, ROUNDING)


def test_a_probe_holds_no_more_images_at_once_than_a_part(setting):
    state, batch = setting
    seen = []

    def apply_fn(params, batch_stats, images, train, key):
        seen.append(len(images))
        return MODEL.apply(params, batch_stats, images, train, key)

    rest = lambda _: (optax.sgd(1.0), rules.static()), MEAN, STD
    steps = make_steps(apply_fn, *rest, accumulate_steps=3)
    jax.eval_shape(steps.probe, state, batch)
    assert seen == [4]  # of 16, which have no three equal parts


@pytest.mark.parametrize(
    ("n_examples", "at_least", "n"),
    [(1000, 1, 1), (1000, 32, 40), (128, 4, 4), (7, 2, 7), (3, 8, 3)],
)
def test_the_fewest_equal_parts(n_examples, at_least, n):
    assert parts.fewest(n_examples, at_least) == n


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__accumulate_steps": 3}, r"train\.accumulate_steps=3 does not divide"),
        ({"model__norm_examples": 5}, r"model\.norm_examples=5 does not divide the 16"),
        (
            {"model__norm_examples": 16, "train__accumulate_steps": 2},
            r"norm_examples=16 does not divide the 8 images",
        ),
        ({"data__augment": "cutmix"}, r"data\.augment='cutmix' is unknown"),
        (
            {
                "data__augment": "crop_flip",
                "data__name": "synthetic",
                "data__image_size": 8,
            },
            r"data\.augment='crop_flip': synthetic is decoded on the way",
        ),
        ({"train__ema_decay": 1.0}, r"train\.ema_decay=1\.0: give a fraction"),
        ({"model__remat": True}, r"model\.remat=True: mlp has no such choice"),
    ],
)
def test_what_makes_no_sense(fields, message):
    with pytest.raises(UserError, match=message):
        run_cli.small_job(**fields)


# Rematerialisation


def gradient_of_sum(model, n_images: int, size: int):
    """(function of the parameters that returns a number and statistics, parameters)."""
    images = jax.random.normal(jax.random.key(0), (n_images, size, size, 3))
    variables = model.init(jax.random.key(1))

    def loss(params):
        stats = variables.get("batch_stats", {})
        logits, new = model.apply(params, stats, images, True)
        return jnp.sum(jnp.tanh(logits)), new

    return loss, variables["params"]


SHALLOW = {
    "resnet": functools.partial(
        ResNet, n_blocks=(2, 2), bottleneck=False, first=4, small_images=True
    ),
    "wide_resnet": functools.partial(WideResNet, depth=10, widen=1, width=1 / 4),
    "vit": functools.partial(ViT, depth=2, width=1 / 32),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_less_is_kept_of_blocks_that_are_computed_again(name):
    """Before a compiler sees it: XLA's for CPUs finds that a block is computed twice
    and keeps what is inside all the same."""
    kept = []
    for remat in (False, True):
        model = models.from_module(SHALLOW[name](5, remat=remat), (16, 16, 3))
        loss, params = gradient_of_sum(model, 8, 16)
        function = functools.partial(jax.vjp, loss, has_aux=True)
        residuals = jax.tree.leaves(jax.eval_shape(function, params)[1])
        kept.append(sum(leaf.size for leaf in residuals))
    assert kept[1] < 0.75 * kept[0]


@pytest.mark.parametrize("norm", ["batch", "fixup"])
def test_blocks_that_are_computed_again_give_the_same(norm):
    found = []
    for remat in (False, True):
        options = {"n_blocks": (1, 1), "bottleneck": False, "first": 4, "norm": norm}
        module = ResNet(5, small_images=True, remat=remat, **options)
        loss, params = gradient_of_sum(models.from_module(module, (8, 8, 3)), 4, 8)
        found.append(jax.jit(jax.grad(loss, has_aux=True))(params))
    assert_close(found[1], found[0])


# The running average


def test_the_average_of_the_weights(tmp_path):
    fields = {"sparsity__rule": "rigl", "train__ema_decay": 0.75}
    fields |= {"train__total_steps": 6, "train__checkpoint_every_steps": 1}
    run = started(tmp_path, **fields)[0]
    result = train([run])[0]
    kept = [
        checkpoint.restore_network(run.paths.checkpoints, step)[1] for step in range(7)
    ]
    ema = kept[0].params
    for network in kept[1:]:
        ema = jax.tree.map(
            lambda e, w: np.float32(0.75) * e + np.float32(0.25) * w,
            ema,
            network.params,
        )
        ema = masks_lib.apply(network.masks, ema)
        assert_close(network.ema, ema)
        inactive = ~network.masks["fc1"]["kernel"]
        assert not np.any(network.ema["fc1"]["kernel"][inactive])
    assert_close(result.state.ema, ema)
    row = result.rows[-1]
    assert {"ema_test_loss", "ema_test_accuracy"} <= row.keys()
    dataset = run.job.load_data()
    images = (dataset.test_images / 255.0 - run.job.spec.mean) / run.job.spec.std
    images = jnp.asarray(images, jnp.float32)
    params = jax.tree.map(jnp.asarray, ema)
    logits, _ = run.job.model.apply(params, {}, images, False)
    hits = np.mean(np.argmax(np.asarray(logits), axis=-1) == dataset.test_labels)
    assert row["ema_test_accuracy"] == pytest.approx(hits, abs=1e-6)


def test_the_average_is_restored_with_its_bits(tmp_path):
    fields = {"train__ema_decay": 0.9, "train__population": "together"}
    fields |= {"train__seeds": (0, 1)}
    whole = train(started(tmp_path / "whole", **fields))
    cut = started(tmp_path / "cut", **fields)
    train([run._replace(job=run.job._replace(total_steps=6)) for run in cut])
    for a, b in zip(train(cut), whole, strict=True):
        assert_same(a, b)
        for x, y in zip(*(jax.tree.leaves(r.state.ema) for r in (a, b)), strict=True):
            np.testing.assert_array_equal(x, y)


# Augmentation in memory


def test_crops_and_flips_are_those_of_numpy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    data = {"image": images, "label": np.arange(5, dtype=np.int32)}
    draw = np.array([[4, 0, 4, 2], [0, 8, 4, 3], [8, 0, 4, 5], [0, 1, 0, 1]], np.int32)
    found = jax.jit(augment.take)(data, draw)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for i, (index, top, left, flip) in enumerate(draw.T):
        expected = padded[index, top : top + 6, left : left + 7]
        expected = expected[:, ::-1] if flip else expected
        np.testing.assert_array_equal(found["image"][i], expected)
    np.testing.assert_array_equal(found["label"], [4, 0, 4, 2])


def test_draws_are_even_and_of_the_step_alone():
    drawn = [augment.draws("crop_flip", 3, t, 1000, 100) for t in range(200)]
    for t in (0, 7):
        np.testing.assert_array_equal(
            drawn[t], augment.draws("crop_flip", 3, t, 1000, 100)
        )
        np.testing.assert_array_equal(
            drawn[t][0], arrays.batch_indices(3, t, 1000, 100)
        )
    indices, top, left, flip = np.concatenate(drawn, axis=1)
    assert len(set(map(tuple, np.stack(drawn)[:, 1]))) == 200
    for values, n in ((top, 9), (left, 9), (flip, 2)):
        counts = np.bincount(values, minlength=n)
        assert len(counts) == n
        expected = len(values) / n
        # Five standard deviations of a count.
        assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.04
    assert len(indices) == 20_000


def test_members_see_their_own_crops(tmp_path):
    fields = {"data__augment": "crop_flip", "train__seeds": (0, 1)}
    fields |= {"train__chunk_steps": 4}
    found = train(started(tmp_path / "two", train__population="together", **fields))
    expected = alone(tmp_path / "alone", **fields)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, ROUNDING)
    plain = alone(tmp_path / "plain", **fields | {"data__augment": ""})
    assert not np.array_equal(leaves(plain[0])[1], leaves(expected[0])[1])
