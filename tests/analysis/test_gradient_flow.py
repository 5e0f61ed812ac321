"""Gradient norms, decreases and gains against finite differences and by hand."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow import steps
from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import gradient_flow as lib
from lottery_flow.analysis import results
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import rules, schedules
from lottery_flow.sparsity.active import active_space
from lottery_flow.sparsity.transform import SparseState, sparsify
from lottery_flow.state import TrainState


@contextlib.contextmanager
def float64(norms="frozen"):
    """Promotion as usual for norms of the batch: flax wants float32 for theirs."""
    promotion = "standard" if norms == "batch" else "strict"
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        yield


@functools.cache  # and with it what is compiled for the loss
def make(norm=False, norms="frozen", *, seed=0):
    net = network(norm=norm, seed=seed)
    return net, net.objective(norms=norms)


@functools.cache
def finite_differences(*args, h=1e-5):
    """The active gradient of `make(*args)`, flat, and where its layers are."""
    net, loss = make(*args)
    space = active_space(net.params, net.masks)
    w, steps = np.asarray(space.flatten(net.params)), h * np.eye(space.n)
    values = jax.jit(jax.vmap(lambda v: loss(space.unflatten(v), net.data)))
    up, down = np.split(np.asarray(values(np.vstack([w + steps, w - steps]))), 2)
    return (up - down) / (2 * h), space.layers


@pytest.mark.parametrize("norms", [None, "frozen", "batch"])
def test_norms_are_those_of_finite_differences(norms):
    with float64(norms):
        args = () if norms is None else (True, norms)
        net, loss = make(*args)
        found = lib.gradient_norm(loss, net.params, net.masks, [net.data])
        g, layers = finite_differences(*args)
    assert found.layer.tolist() == ["all", *layers]
    wanted = [np.linalg.norm(g), *(np.linalg.norm(g[part]) for part in layers.values())]
    np.testing.assert_allclose(found.gradient_norm, wanted, rtol=1e-7, atol=1e-9)
    assert found.gradient_norm.dtype == np.float64
    zeros = ["conv/bias"] if norms == "batch" else []  # the norm takes it off again
    assert found.layer[found.gradient_norm < 1e-3].tolist() == zeros


def test_the_gradient_is_averaged_and_not_its_norm():
    with float64():
        net, loss = make(True, "frozen")

        def norm(batches):
            return lib.gradient_norm(loss, net.params, net.masks, batches).gradient_norm

        cut = batches_lib.split(net.data, 4)  # 4 + 4 + 3
        whole = norm([net.data])
        np.testing.assert_allclose(norm(cut), whole, rtol=1e-12)
        of_batches = np.mean([norm([b]) for b in cut], axis=0)
        assert of_batches[0] > 1.05 * whole[0]


def test_inactive_gradients_do_not_count_even_if_they_are_not_numbers():
    params = {"a": {"kernel": jnp.array([[4.0, 0.0], [1.0, 0.0]])}, "b": jnp.ones(2)}
    masks = {"a": {"kernel": jnp.array([[True, False], [False, False]])}, "b": None}

    def loss(params, batch):  # gradient 1 / (2 sqrt(w)): 1/4, inf, 1/2, inf
        sums = jnp.sum(jnp.sqrt(params["a"]["kernel"])) + 3.0 * jnp.sum(params["b"])
        return sums + 0.0 * jnp.sum(batch)

    found = lib.gradient_norm(loss, params, masks, [np.zeros(1, np.float32)])
    wanted = [(1 / 16 + 18) ** 0.5, 1 / 4, 18**0.5]
    assert found.layer.tolist() == ["all", "a", "b"]
    np.testing.assert_allclose(found.gradient_norm, wanted, rtol=1e-6)
    dense = lib.gradient_norm(loss, params, None, [np.zeros(1, np.float32)])
    assert np.isinf(dense.gradient_norm[0])
    grads = lib.dense_gradient(loss, params, [np.zeros(1, np.float32)])
    assert grads["a"]["kernel"][1, 0] == 0.5  # of an inactive weight
    assert grads["a"]["kernel"].dtype == jnp.float32


def test_it_is_the_gradient_norm_of_a_run():
    with float64("batch"):
        net, _ = make(True, "batch")
        mean, std = (0.4, 0.5), (0.2, 0.3)
        probe = steps.make_steps(net.model.apply, lambda knobs: None, mean, std).probe
        images = np.random.default_rng(0).integers(0, 256, net.data["image"].shape)
        batch = net.data | {"image": images.astype(np.uint8)}
        key = jax.random.key(0)
        sparse = SparseState(jnp.int32(0), key, net.masks, (), ())
        state = TrainState(jnp.int32(0), net.params, net.batch_stats, sparse, key)
        objective = net.objective(
            norms="batch", preprocess=lambda x: steps.normalize(x, mean, std)
        )
        found = lib.gradient_norm(objective, net.params, net.masks, [batch])
        wanted = jax.jit(probe)(state, batch)["gradient_norm"]
        np.testing.assert_allclose(found.gradient_norm[0], wanted, rtol=1e-6)


def test_the_decrease_of_a_gradient_step_is_first_order():
    with float64():
        net, loss = make()
        args = loss, net.params, net.masks, [net.data]
        norms = lib.gradient_norm(*args).gradient_norm

        def decrease(rate):
            return lib.loss_decrease(*args, learning_rate=rate)

        found = decrease(0.01)
        np.testing.assert_allclose(found.predicted, 0.01 * norms**2, rtol=1e-12)
        g, _ = finite_differences()
        space = active_space(net.params, net.masks)
        moved = space.unflatten(space.flatten(net.params) - 0.01 * g)
        wanted = loss(net.params, net.data) - loss(moved, net.data)
        np.testing.assert_allclose(found.measured, wanted, rtol=1e-7)
        errors = [
            float(d.measured - d.predicted[0]) for d in map(decrease, (0.01, 0.005))
        ]
    assert abs(errors[0]) > 1e-6
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_the_decrease_along_a_direction():
    with float64():
        net, loss = make(True, "frozen")
        args = loss, net.params, net.masks, [net.data]
        rng = np.random.default_rng(1)
        direction = jax.tree.map(
            lambda w: jnp.asarray(1e-3 * rng.normal(size=w.shape)), net.params
        )
        found = lib.loss_decrease(*args, direction=direction)
        g, layers = finite_differences(True, "frozen")
        d = np.asarray(active_space(net.params, net.masks).flatten(direction))
        wanted = [-g @ d, *(-g[part] @ d[part] for part in layers.values())]
        np.testing.assert_allclose(found.predicted, wanted, rtol=1e-6, atol=1e-12)
        assert found.measured == pytest.approx(found.predicted[0], rel=0.05)
        # Inactive weights do not move, whatever the direction says.
        wild = masks_lib.tree_map(
            lambda m, d: d if m is None else np.where(m, d, np.nan),
            net.masks,
            direction,
        )
        again = lib.loss_decrease(*args, direction=wild)
        np.testing.assert_array_equal(again.predicted, found.predicted)
        assert again.measured == found.measured


def half_square(params, batch):
    """Gradient w - target, of each weight by itself."""
    return jnp.mean(jnp.sum(0.5 * (params["w"][None] - batch) ** 2, axis=(1, 2)))


# One of two active weights goes: 0.1 at index 1. Then RigL grows index 2, where the
# gradient is -3, Inverted index 4, where it is -0.2.
WEIGHTS = {"w": jnp.array([[1.0, 0.1, 0.0], [0.0, 0.0, 0.0]])}
MASKS = {"w": jnp.array([[True, True, False], [False, False, False]])}
TARGET = jnp.array([[[1.5, 0.6, 3.0], [1.0, 0.2, 2.0]]])
BEFORE = (0.25 + 0.25) ** 0.5
HALF = schedules.every(1), schedules.constant(0.5)
RULES = {
    "rigl": rules.rigl(*HALF),
    "inverted": rules.rigl_inverted(*HALF),
    "static": rules.static(),
}


def test_rules_by_hand():
    key, grads = jax.random.key(0), lib.dense_gradient(half_square, WEIGHTS, [TARGET])
    args = half_square, WEIGHTS, MASKS, [TARGET], RULES
    frame = lib.compare_rules(*args, grads, key=key)
    assert list(frame) == ["rule", "layer", "before", "after", "gain"]
    assert frame["rule"].tolist() == [r for r in RULES for _ in range(2)]
    assert frame["layer"].tolist() == ["all", "w"] * 3
    after = np.repeat([(0.25 + 9) ** 0.5, (0.25 + 0.04) ** 0.5, BEFORE], 2)
    np.testing.assert_allclose(frame["before"], BEFORE, rtol=1e-6)
    np.testing.assert_allclose(frame["after"], after, rtol=1e-6)
    np.testing.assert_allclose(frame["gain"], after - BEFORE, rtol=1e-6, atol=1e-7)
    # Growth follows the gradients given, here with index 5 on top.
    grads = {"w": grads["w"].at[1, 2].set(-9.0)}
    frame = lib.compare_rules(*args, grads, key=key)
    np.testing.assert_allclose(frame["after"][0], (0.25 + 4) ** 0.5, rtol=1e-6)


def test_random_growth_depends_on_the_key_alone():
    rule, grads = rules.set_(*HALF), {"w": TARGET[0]}

    def grown(seed):
        key = jax.random.key(seed)
        params, masks = lib.rewire(rule, WEIGHTS, MASKS, grads, key=key)
        assert int(masks["w"].sum()) == 2
        assert masks["w"][0, 0]
        np.testing.assert_array_equal(params["w"], np.where(masks["w"], params["w"], 0))
        return int(np.flatnonzero(np.asarray(masks["w"]).ravel())[1])

    assert grown(3) == grown(3)
    assert {grown(seed) for seed in range(20)} == {1, 2, 3, 4, 5}


def test_a_rule_with_a_memory_has_seen_the_gradients():
    rule = rules.Rule(
        is_due=schedules.every(1),
        init=lambda masks, params: jax.tree.map(jnp.ones_like, params),
        observe=lambda state, grads: jax.tree.map(jnp.add, state, grads),
        propose=lambda step, key, masks, params, grads, state: (
            jax.tree.map(lambda s: s == 3, state),
            state,
        ),
    )
    grads = {"w": jnp.array([[1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])}
    params, masks = lib.rewire(rule, WEIGHTS, MASKS, grads, key=jax.random.key(0))
    np.testing.assert_array_equal(masks["w"], grads["w"] == 2)
    np.testing.assert_allclose(params["w"], [[0, 0.1, 0], [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("rule", [rules.set_, rules.rigl])
def test_a_rewire_is_that_of_training(rule):
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "dense": (9, 5), "bias": (5,)}
    params, grads = (
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(2)
    )
    masks = masks_lib.random(jax.random.key(0), params, {"conv": 40, "dense": 20})
    params = masks_lib.apply(masks, params)
    rule = rule(schedules.every(1), schedules.cosine(0.9, end=40))
    key = jax.random.key(4)
    tx = sparsify(optax.sgd(0.0), masks, rule, key=key)
    state = tx.init(params)._replace(step=jnp.int32(16))
    updates, state = jax.jit(lambda *args: tx.update(*args, rewire=True))(
        grads, state, params
    )
    wanted = optax.apply_updates(params, updates)
    found, found_masks = lib.rewire(rule, params, masks, grads, key=key, step=17)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    jax.tree.map(np.testing.assert_array_equal, found_masks, state.masks)
    assert jax.tree.structure(found_masks) == jax.tree.structure(masks)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), found_masks, masks)
    assert all(jax.tree.leaves(changed))


def test_the_gain_is_the_difference_of_the_norms():
    with float64():
        (net, loss), (other, _) = make(), make(seed=5)
        cut = batches_lib.split(net.data, 4)
        before, after = (net.params, net.masks), (other.params, other.masks)
        found = lib.rewire_gain(loss, before, after, cut)
        for pair, norms in ((before, found.before), (after, found.after)):
            wanted = lib.gradient_norm(loss, *pair, [net.data])
            np.testing.assert_allclose(norms, wanted.gradient_norm, rtol=1e-12)
            assert found.layer.tolist() == wanted.layer.tolist()
        np.testing.assert_array_equal(found.gain, found.after - found.before)
        assert np.abs(found.gain).min() > 1e-4


def test_a_trajectory_takes_networks_one_by_one_through_one_program():
    alive, traces = [], []

    def loss(params, batch):
        traces.append(1)
        return half_square({"w": params["w"]}, batch) + 0.0 * params["bias"]

    def networks():
        for step in (0, 10, 20):
            alive.append(step)
            mask = np.zeros((2, 3), bool)
            mask.flat[: 1 + step // 10] = True
            yield step, WEIGHTS | {"bias": jnp.float32(0)}, {"w": mask, "bias": None}

    frame = lib.trajectory(loss, networks(), [TARGET])
    assert alive == [0, 10, 20]
    assert len(traces) == 1
    assert list(frame) == ["step", "layer", "gradient_norm"]
    assert frame["step"].tolist() == [s for s in (0, 10, 20) for _ in range(3)]
    assert frame["layer"].tolist() == ["all", "bias", "w"] * 3
    wanted = np.repeat([0.5, 0.5**0.5, 9.5**0.5], 3)
    wanted[1::3] = 0
    np.testing.assert_allclose(frame["gradient_norm"], wanted, rtol=1e-6)


def test_a_trajectory_is_lazy():
    def networks():
        yield 0, WEIGHTS, MASKS
        raise RuntimeError("the second network")

    seen = []

    def loss(params, batch):
        seen.append(1)
        return half_square(params, batch)

    with pytest.raises(RuntimeError, match="the second network"):
        lib.trajectory(loss, networks(), [TARGET])
    assert seen


def test_wrong_inputs():
    args = half_square, WEIGHTS, MASKS, [TARGET]
    other = {"w": MASKS["w"][:1]}
    with pytest.raises(ValueError, match="exactly one of them"):
        lib.loss_decrease(*args)
    with pytest.raises(ValueError, match="exactly one of them"):
        lib.loss_decrease(*args, learning_rate=0.1, direction=WEIGHTS)
    with pytest.raises(ValueError, match="masks do not fit"):
        lib.gradient_norm(half_square, WEIGHTS, other, [TARGET])
    pair = {"w": WEIGHTS["w"][:1]}, other
    with pytest.raises(ValueError, match="masks do not fit"):
        lib.rewire_gain(half_square, (WEIGHTS, MASKS), pair, [TARGET])
    with pytest.raises(ValueError, match="masks do not fit"):
        lib.rewire(rules.static(), WEIGHTS, other, WEIGHTS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="batches is empty"):
        lib.gradient_norm(half_square, WEIGHTS, MASKS, [])
    with pytest.raises(ValueError, match="networks is empty"):
        lib.trajectory(half_square, [], [TARGET])


def heights(ax):
    return [[bar.get_height() for bar in group] for group in ax.containers]


def test_results_are_saved_and_shown(tmp_path):
    args = half_square, WEIGHTS, MASKS, [TARGET]
    norm = lib.gradient_norm(*args)
    step = lib.loss_decrease(*args, learning_rate=0.5)
    after = WEIGHTS, {"w": ~MASKS["w"]}
    gain = lib.rewire_gain(half_square, (WEIGHTS, MASKS), after, [TARGET])
    for result in (norm, step, gain):
        path = results.save(tmp_path / "result.npz", result)
        again = results.load(path, type(result))
        pd.testing.assert_frame_equal(again.frame(), result.frame())
    assert norm.frame()["gradient_norm"].tolist() == norm.gradient_norm.tolist()
    frame = step.frame()
    assert frame["layer"].tolist() == ["all", "w", "all"]
    assert frame["quantity"].tolist() == ["predicted", "predicted", "measured"]
    # 0.5 ||g||^2, and 1/2 ||g||^2 - 1/2 ||g/2||^2.
    np.testing.assert_allclose(frame["decrease"], [0.25, 0.25, 0.1875], rtol=1e-5)
    assert gain.frame()["gain"].tolist() == gain.gain.tolist()

    fig = lib.plot_gradient_norm(norm)
    assert isinstance(fig, Figure)
    assert heights(fig.axes[0]) == [norm.gradient_norm.tolist()]
    ax = lib.plot_loss_decrease(step).axes[0]
    assert heights(ax) == [step.predicted.tolist()]
    assert list(ax.lines[0].get_ydata()) == [step.measured] * 2
    ax = lib.plot_rewire_gain(gain).axes[0]
    assert heights(ax) == [gain.before.tolist(), gain.after.tolist()]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["all", "w"]

    rows = lib.trajectory(half_square, [(0, WEIGHTS, MASKS), (5, *after)], [TARGET])
    ax = lib.plot_trajectory(rows).axes[0]
    norms = rows.loc[rows["layer"] == "all", "gradient_norm"].to_list()
    assert list(ax.lines[0].get_xdata()) == [0, 5]
    assert list(ax.lines[0].get_ydata()) == norms

    grads = lib.dense_gradient(half_square, WEIGHTS, [TARGET])
    frame = lib.compare_rules(*args, RULES, grads, key=jax.random.key(0))
    ax = lib.plot_compare_rules(frame).axes[0]
    assert heights(ax) == [
        frame.loc[frame["rule"] == name, "gain"].to_list() for name in RULES
    ]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(RULES)
