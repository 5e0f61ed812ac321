"""Linear paths against numpy, barriers by hand, statistics of norms layer by layer."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import IMAGE, network

from lottery_flow import models
from lottery_flow.analysis import batches, interpolation, results
from lottery_flow.analysis.interpolation import Path
from lottery_flow.analysis.objective import classification
from lottery_flow.sparsity import masks as masks_lib

NONE = {"mask": "none"}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def flax_training():
    """Flax's norms mix float64 and float32 in training."""
    return jax.numpy_dtype_promotion("standard")


def flipped(net):
    """Another network of the model, without the time to initialise one."""
    trees = {k: getattr(net, k) for k in ("params", "batch_stats", "masks")}
    return net._replace(**jax.tree.map(lambda leaf: np.flip(np.asarray(leaf)), trees))


@functools.cache  # for what is compiled for them, which is most of the time
def two_networks(norm=False):
    first = network(norm=norm)
    return first, flipped(first)


@functools.cache
def frozen(norm=False):
    """The objective of the first of them."""
    return two_networks(norm)[0].objective()


def numpy_network(params, images, stats=None):
    """Logits of `small_networks.Small`, and the statistics of the batch.

    `stats` are those of the norm; None takes those of the batch.
    """
    p = jax.tree.map(np.asarray, params)
    kernel = p["conv"]["kernel"]
    x = np.zeros((len(images), 2, 2, kernel.shape[-1]))
    for i in range(2):
        for j in range(2):
            window = images[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            x[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel) + p["conv"]["bias"]
    found = None
    if "norm" in p:
        found = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        mean, var = (jnp.asarray((stats or found)[k]) for k in ("mean", "var"))
        x = (x - np.asarray(mean)) / np.sqrt(np.asarray(var) + 1e-5)
        x = x * p["norm"]["scale"] + p["norm"]["bias"]
    x = np.tanh(x).reshape(len(x), -1)
    x = np.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    return x @ p["logits"]["kernel"] + p["logits"]["bias"], found


def loss_and_accuracy(logits, labels):
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -log_p[np.arange(len(labels)), labels].mean()
    return loss, np.mean(logits.argmax(1) == labels)


def numpy_line(start, end, alpha):
    return jax.tree.map(
        lambda a, b: (1 - alpha) * np.asarray(a) + alpha * np.asarray(b), start, end
    )


def masked(masks, params):
    """In numpy."""
    return masks_lib.tree_map(
        lambda m, w: np.asarray(w) if m is None else np.where(m, w, 0.0), masks, params
    )


def check_line(path, start, end, data, stats_at=lambda alpha, params: None):
    for alpha, loss, accuracy in zip(*path, strict=True):
        params = numpy_line(start, end, alpha)
        logits, _ = numpy_network(params, data["image"], stats_at(alpha, params))
        wanted = loss_and_accuracy(logits, data["label"])
        np.testing.assert_allclose((loss, accuracy), wanted, rtol=1e-12)


# The line


@pytest.mark.parametrize("block", [1, 3, 50])
def test_losses_and_accuracies_are_those_of_numpy(block):
    a, b = two_networks()
    alphas = np.array([-0.2, 0.0, 0.3, 1.0, 1.2])
    path = interpolation.linear(
        frozen(), a.params, b.params, batches.split(a.data, 4), **NONE,
        alphas=alphas, block=block,
    )  # fmt: skip
    assert path.loss.shape == path.accuracy.shape == (5,)
    np.testing.assert_array_equal(path.alpha, alphas)
    check_line(path, a.params, b.params, a.data)
    assert len(set(path.accuracy)) > 1


def test_the_default_points_are_29_from_minus_a_fifth_with_both_ends():
    np.testing.assert_allclose(interpolation.ALPHAS, np.linspace(-4, 24, 29) / 20)
    np.testing.assert_allclose(interpolation.FINE_ALPHAS, np.linspace(-10, 60, 71) / 50)
    for alphas in (interpolation.ALPHAS, interpolation.FINE_ALPHAS):
        assert {0.0, 1.0} <= {*alphas.tolist()}


def test_a_loss_function_gives_no_accuracy_and_the_penalty_counts():
    a, b = two_networks()
    objective = a.objective(weight_decay=0.1)
    cut = batches.split(a.data, 4)
    path = interpolation.linear(
        lambda p, batch: objective(p, batch),
        *(a.params, b.params, cut),
        **NONE,
        alphas=np.array([0.4]),
    )
    assert np.all(np.isnan(path.accuracy))
    params = numpy_line(a.params, b.params, 0.4)
    loss, _ = loss_and_accuracy(
        numpy_network(params, a.data["image"])[0], a.data["label"]
    )
    kernels = [layer["kernel"] for layer in params.values()]
    loss += 0.05 * sum(np.sum(w**2) for w in kernels)
    np.testing.assert_allclose(path.loss, [loss], rtol=1e-12)
    same = interpolation.linear(
        objective, a.params, b.params, cut, **NONE, alphas=np.array([0.4])
    )
    np.testing.assert_allclose(same.loss, [loss], rtol=1e-12)


def test_accuracy_is_nan_without_labels():
    a, b = two_networks()
    objective = dataclasses.replace(
        frozen(), criterion=lambda logits, batch: logits[:, 0]
    )
    path = interpolation.linear(
        objective, a.params, b.params, [{"image": a.data["image"]}], **NONE
    )
    assert np.all(np.isnan(path.accuracy))
    assert np.all(np.isfinite(path.loss))


def test_at_the_ends_the_parameters_are_those_of_the_ends_to_the_bit():
    a, b = two_networks()
    seen = []

    def objective(params, batch):
        jax.debug.callback(lambda p: seen.append(p), params)
        return jnp.zeros(())

    interpolation.linear(
        objective, a.params, b.params, [a.data], **NONE, alphas=np.array([0.0, 1.0])
    )
    jax.effects_barrier()
    for found, end in zip(seen, (a.params, b.params), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, end)


def test_all_points_share_one_program():
    a, b = two_networks()
    traces = []

    def objective(params, batch):
        traces.append(1)
        return jnp.sum(params["logits"]["bias"])

    for block in (1, 3):  # 29 is no multiple
        interpolation.linear(
            objective, a.params, b.params, [a.data], **NONE, block=block
        )
    again = interpolation.linear(objective, b.params, a.params, [a.data], **NONE)
    assert len(traces) == 2
    assert len(again.loss) == 29


def test_float32_stays_float32():
    a, b = two_networks()
    params = [jax.tree.map(lambda w: w.astype(jnp.float32), n.params) for n in (a, b)]
    with jax.enable_x64(False):

        def objective(p, batch):
            assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(p))
            return jnp.sum(p["logits"]["bias"])

        path = interpolation.linear(objective, *params, [a.data], **NONE)
    assert path.loss.dtype == np.float32


# Masks


@pytest.mark.parametrize("mask", ["start", "end", "own", "none"])
def test_each_convention_masks_the_ends_as_it_says(mask):
    a, b = two_networks()
    # Dense ends, so that each mask does something to each.
    dense = [jax.tree.map(lambda w: w + 0.1, n.params) for n in (a, b)]
    which = {"start": (a, a), "end": (b, b), "own": (a, b), "none": (None, None)}[mask]
    wanted = [
        params if n is None else masked(n.masks, params)
        for params, n in zip(dense, which, strict=True)
    ]
    path = interpolation.linear(
        frozen(), *dense, [a.data], mask=mask, start_masks=a.masks,
        end_masks=b.masks, alphas=np.array([0.0, 0.5, 1.0]),
    )  # fmt: skip
    check_line(path, *wanted, a.data)
    ends = interpolation.masked_ends(
        *dense, mask=mask, start_masks=a.masks, end_masks=b.masks
    )
    for found, end in zip(ends, wanted, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, end)


def test_the_mask_of_the_start_is_the_default_and_needs_no_other():
    a, b = two_networks()
    found = interpolation.masked_ends(a.params, b.params, start_masks=a.masks)[1]
    jax.tree.map(np.testing.assert_array_equal, found, masked(a.masks, b.params))


def test_with_their_own_masks_the_middle_is_as_dense_as_the_union():
    a, b = two_networks()
    middle = numpy_line(
        *interpolation.masked_ends(
            a.params, b.params, mask="own", start_masks=a.masks, end_masks=b.masks
        ),
        0.5,
    )
    for layer in ("conv", "hidden", "logits"):
        either = np.asarray(a.masks[layer]["kernel"] | b.masks[layer]["kernel"])
        np.testing.assert_array_equal(middle[layer]["kernel"] != 0, either)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mask='start' needs start_masks"),
        ({"mask": "end"}, "mask='end' needs end_masks"),
        ({"mask": "both"}, "mask='both' is unknown"),
        ({**NONE, "alphas": np.array([])}, "alphas is empty"),
        ({**NONE, "block": 0}, "block=0"),
    ],
)
def test_a_wrong_choice_is_named(options, message):
    a, b = two_networks()
    with pytest.raises(ValueError, match=message):
        interpolation.linear(frozen(), a.params, b.params, [a.data], **options)


def test_ends_of_two_models_are_refused():
    a, b = two_networks()
    other = b.params | {"logits": {"bias": b.params["logits"]["bias"]}}
    with pytest.raises(ValueError, match="the networks differ at logits"):
        interpolation.linear(frozen(), a.params, other, [a.data], **NONE)
    with pytest.raises(ValueError, match="mask"):
        interpolation.masked_ends(other, other, start_masks=a.masks)


# Norms


def test_statistics_are_kept_where_the_objective_has_them():
    a, b = two_networks(True)
    path = interpolation.linear(
        frozen(True), a.params, b.params, batches.split(a.data, 4), **NONE,
        alphas=np.array([0.0, 0.7, 1.0]),
    )  # fmt: skip
    stats = a.batch_stats["norm"]
    check_line(path, a.params, b.params, a.data, lambda alpha, params: stats)


@functools.cache
def path_objectives(norm=True):
    a, b = two_networks(norm)

    def objective_at(stats):
        return classification(a.model.apply, stats)

    return (
        interpolation.interpolated_norms(objective_at, a.batch_stats, b.batch_stats),
        interpolation.recomputed_norms(objective_at, a.model.apply, a.batch_stats),
    )


@pytest.mark.parametrize("block", [1, 2])
def test_statistics_are_interpolated(block):
    a, b = two_networks(True)
    objective, _ = path_objectives()
    path = interpolation.linear(
        objective, a.params, b.params, batches.split(a.data, 4), **NONE,
        alphas=np.array([0.0, 0.7, 1.0]), block=block,
    )  # fmt: skip
    ends = a.batch_stats["norm"], b.batch_stats["norm"]
    check_line(
        path, a.params, b.params, a.data, lambda alpha, _: numpy_line(*ends, alpha)
    )


@pytest.mark.parametrize("block", [1, 2])
def test_statistics_are_recomputed_at_each_point(block):
    a, b = two_networks(True)
    _, objective = path_objectives()
    cut = batches.split(a.data, 4)  # of 4, 4 and 3
    with flax_training():
        path = interpolation.linear(
            objective, a.params, b.params, cut, **NONE,
            alphas=np.array([0.0, 0.7, 1.0]), block=block,
        )  # fmt: skip

    def stats_at(alpha, params):
        found = [numpy_network(params, batch["image"])[1] for batch in cut]
        return {
            k: np.average([f[k] for f in found], axis=0, weights=[4, 4, 3])
            for k in ("mean", "var")
        }

    check_line(path, a.params, b.params, a.data, stats_at)


class Deep(nn.Module):
    """Two norms of different momentum, one behind the other."""

    frozen: bool = False

    @nn.compact
    def __call__(self, images, train):
        options = {"param_dtype": jnp.float64, "dtype": jnp.float64}
        norm = functools.partial(
            nn.BatchNorm, force_float32_reductions=False, **options
        )
        x = images.reshape(len(images), -1)
        x = norm(not train, momentum=0.5, name="first")(x)
        x = nn.tanh(nn.Dense(4, name="hidden", **options)(x))
        x = norm(not train or self.frozen, momentum=0.99, name="second")(x)
        return nn.Dense(3, name="logits", **options)(x)


@functools.cache
def deep(**options):
    with flax_training():
        model = models.from_module(Deep(**options), IMAGE)
        variables = jax.jit(model.init)(jax.random.key(0))
    stats = jax.tree.map(lambda leaf: leaf + 3.0, variables["batch_stats"])
    return model, variables["params"], stats


def test_statistics_are_the_weighted_means_of_those_of_the_batches_layer_by_layer():
    model, params, stats = deep()
    data = two_networks()[0].data
    cut = batches.split(data, 4)
    found = interpolation.recompute_statistics(
        model.apply, params, stats, cut, preprocess=lambda x: 2.0 * x + 1.0
    )
    first, second = [], []
    for batch in cut:
        x = 2.0 * batch["image"].reshape(len(batch["image"]), -1) + 1.0
        first.append((x.mean(0), x.var(0)))
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        kernel, bias = (np.asarray(params["hidden"][k]) for k in ("kernel", "bias"))
        x = np.tanh(x @ kernel + bias)
        second.append((x.mean(0), x.var(0)))
    for name, parts in (("first", first), ("second", second)):
        mean, var = np.average(parts, axis=0, weights=[4, 4, 3])
        np.testing.assert_allclose(found[name]["mean"], mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[name]["var"], var, rtol=1e-11)
    # Not those of all examples at once, which vary more.
    whole = interpolation.recompute_statistics(model.apply, params, stats, [data])
    assert np.all(4.0 * whole["first"]["var"] > found["first"]["var"])


def test_with_the_statistics_of_one_batch_evaluation_is_training():
    model, params, stats = deep()
    data = two_networks()[0].data
    found = interpolation.recompute_statistics(model.apply, params, stats, [data])
    evaluated, _ = model.apply(params, found, data["image"], False)
    trained, _ = model.apply(params, stats, data["image"], True)
    np.testing.assert_allclose(evaluated, trained, rtol=1e-10)


def test_recomputing_does_not_depend_on_the_running_statistics():
    model, params, stats = deep()
    cut = batches.split(two_networks()[0].data, 4)
    found = [
        interpolation.recompute_statistics(model.apply, params, running, cut)
        for running in (stats, jax.tree.map(lambda s: 1e6 * s, stats))
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_norm_that_training_leaves_alone_is_refused():
    model, params, stats = deep(frozen=True)
    with pytest.raises(ValueError, match="second/mean does not change"):
        interpolation.recompute_statistics(
            model.apply, params, stats, [two_networks()[0].data]
        )


def test_without_norms_there_is_nothing_to_recompute():
    a, b = two_networks()
    _, objective = path_objectives(False)
    path = interpolation.linear(
        objective, a.params, b.params, [a.data], **NONE, alphas=np.array([0.5])
    )
    check_line(path, a.params, b.params, a.data)


# Barriers


def path_of(alpha, loss, accuracy=None):
    accuracy = [np.nan] * len(alpha) if accuracy is None else accuracy
    return Path(*(np.array(x, np.float64) for x in (alpha, loss, accuracy)))


def test_a_barrier_is_what_rises_above_the_line_between_the_ends():
    # The line is 1, 2, 3; the loss is 1.5 above it at 0.5. Outside is not looked at.
    path = path_of([-1, 0, 0.5, 1, 2], [9, 1, 3.5, 3, 9])
    assert interpolation.barrier(path) == 1.5
    # Higher at 0.25 than at 0.75 only by comparison with the line.
    path = path_of([0, 0.25, 0.75, 1], [0, 3, 4, 4])
    assert interpolation.barrier(path) == 2.0


def test_there_is_no_barrier_below_the_line():
    assert interpolation.barrier(path_of([0, 0.5, 1], [1, 1.9, 3])) == 0.0


def test_a_barrier_does_not_depend_on_the_order_of_the_points():
    assert interpolation.barrier(path_of([1, 0.5, 0], [3, 3.5, 1])) == 1.5


def test_instability_is_the_highest_error_above_the_mean_of_the_ends():
    path = path_of([-1, 0, 0.5, 1], [0] * 4, [0.0, 0.9, 0.5, 0.7])
    np.testing.assert_allclose(interpolation.instability(path), 0.3)
    path = path_of([0, 0.5, 1], [0] * 3, [0.9, 0.95, 0.7])
    np.testing.assert_allclose(interpolation.instability(path), 0.1)


@pytest.mark.parametrize("alpha", [[0, 0.5], [0.1, 1], [-1, 2], [0.3, 0.5]])
def test_a_path_without_its_ends_has_no_barrier(alpha):
    with pytest.raises(ValueError, match="lacks its ends"):
        interpolation.barrier(path_of(alpha, [1, 2]))


def test_instability_needs_accuracies():
    with pytest.raises(ValueError, match="no accuracy"):
        interpolation.instability(path_of([0, 1], [1, 2]))


# Results


def test_a_path_can_be_saved_read_and_tabulated(tmp_path):
    path = path_of([0, 0.5, 1], [1, 2, 3], [0.1, 0.2, 0.3])
    found = results.load(results.save(tmp_path / "path.npz", path), Path)
    for x, y in zip(found, path, strict=True):
        np.testing.assert_array_equal(x, y)
    frame = path.frame()
    assert list(frame.columns) == ["alpha", "loss", "accuracy"]
    assert frame["loss"].tolist() == [1, 2, 3]


def test_plots_show_the_paths():
    path = path_of([0, 0.5, 1], [1, 2, 3], [0.1, 0.2, 0.3])
    other = path_of([0, 1], [5, 6])
    figure = interpolation.plot_paths({"a": path, "b": other})
    assert isinstance(figure, Figure)
    loss, accuracy = figure.axes
    for line, shown in zip(loss.lines, (path, other), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), shown.alpha)
        np.testing.assert_array_equal(line.get_ydata(), shown.loss)
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), path.accuracy)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "b"]
    assert len(interpolation.plot_paths(other).axes) == 1
