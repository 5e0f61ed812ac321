"""Curves against their formulas, steps taken apart, valleys by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.optimize
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow.analysis import batches, curves, interpolation, results
from lottery_flow.analysis.curves import Curve
from lottery_flow.sparsity import masks as masks_lib

KEY = jax.random.key(0)
DENSE = {"space": "dense"}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def nodes(n, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        {"a": jnp.asarray(rng.standard_normal((2, 3))), "b": jnp.asarray(rng.random(4))}
        for _ in range(n)
    )


def vector(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def vectors(curve, ts):
    return np.array([vector(curves.point(curve, t)) for t in ts])


def flipped(net):
    """Another network of the model, without the time to initialise one."""
    trees = {k: getattr(net, k) for k in ("params", "batch_stats", "masks")}
    return net._replace(**jax.tree.map(lambda leaf: np.flip(np.asarray(leaf)), trees))


@functools.cache
def two_networks():
    first = network()
    return first, flipped(first)


@functools.cache
def frozen():
    return two_networks()[0].objective()


# A valley: minima at (-1, 0) and (1, 0), and the way of least loss is y = 1 - x^2.
LEFT, RIGHT = {"w": np.array([-1.0, 0.0])}, {"w": np.array([1.0, 0.0])}
NOTHING = [{"x": np.zeros(1)}]


def valley(params, batch):
    x, y = params["w"]
    return (x**2 - 1) ** 2 + 2 * (y - (1 - x**2)) ** 2


# Points


def test_a_bezier_curve_with_one_bend_is_that_of_garipov_et_al():
    curve = Curve(nodes(3), "bezier")
    a, b, c = map(vector, curve.nodes)
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        wanted = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
        np.testing.assert_allclose(vector(curves.point(curve, t)), wanted, atol=1e-14)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_a_bezier_curve_is_what_de_casteljau_makes_of_its_nodes(n):
    curve = Curve(nodes(n), "bezier")
    for t in (0.0, 0.3, 0.8, 1.0):
        rows = np.array([vector(node) for node in curve.nodes])
        while len(rows) > 1:
            rows = (1 - t) * rows[:-1] + t * rows[1:]
        np.testing.assert_allclose(vector(curves.point(curve, t)), rows[0], atol=1e-14)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_polygon_goes_straight_from_node_to_node(n):
    curve = Curve(nodes(n), "polygon")
    ts = np.linspace(0, 1, 13)
    rows = np.array([vector(node) for node in curve.nodes])
    wanted = np.stack([np.interp(ts, np.linspace(0, 1, n), row) for row in rows.T], 1)
    np.testing.assert_allclose(vectors(curve, ts), wanted, atol=1e-14)


@pytest.mark.parametrize("kind", curves.KINDS)
@pytest.mark.parametrize("n_bends", [1, 3])
def test_a_curve_starts_as_the_straight_line_at_equal_speed(kind, n_bends):
    start, end = nodes(2)
    curve = curves.straight(start, end, kind=kind, n_bends=n_bends)
    assert len(curve.nodes) == n_bends + 2
    ts = np.linspace(0, 1, 8)
    wanted = np.outer(1 - ts, vector(start)) + np.outer(ts, vector(end))
    np.testing.assert_allclose(vectors(curve, ts), wanted, atol=1e-14)


@pytest.mark.parametrize("kind", curves.KINDS)
def test_a_curve_ends_at_its_ends_to_the_bit(kind):
    curve = Curve(nodes(4), kind)
    np.testing.assert_array_equal(vectors(curve, [0.0, 1.0])[0], vector(curve.nodes[0]))
    np.testing.assert_array_equal(
        vectors(curve, [0.0, 1.0])[1], vector(curve.nodes[-1])
    )


# Lengths


def test_the_length_of_a_polygon_is_the_sum_of_its_pieces():
    points = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0], [0.0, 1.0]])
    curve = Curve(tuple({"w": jnp.array(p)} for p in points), "polygon")
    lengths = curves.arc_length(curve, np.array([0.0, 1 / 6, 1 / 3, 2 / 3, 1.0]))
    np.testing.assert_allclose(lengths, [0, 2.5, 5, 6, 11], atol=1e-12)


def test_lengths_are_as_exact_far_from_the_origin():
    points = np.array([[3e7, 1.0], [3e7, 1.25], [3e7, 2.0]])
    curve = Curve(tuple({"w": jnp.array(p)} for p in points), "polygon")
    lengths = curves.arc_length(curve, np.array([0.5, 1.0]))
    np.testing.assert_allclose(lengths, [0.25, 1.0], rtol=1e-12)


def test_the_length_of_a_bezier_curve_is_the_integral_of_its_speed():
    curve = Curve(nodes(4), "bezier")
    rows = [vector(node) for node in curve.nodes]
    a, b, c = (3 * (rows[i + 1] - rows[i]) for i in range(3))

    def speed(t):
        return np.linalg.norm((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c)

    for t in (0.25, 0.613, 1.0):
        wanted, _ = scipy.integrate.quad(speed, 0, t)
        found = curves.arc_length(curve, np.array([t]))
        np.testing.assert_allclose(found, [wanted], rtol=1e-5)


# Training


def halves():
    """Masks of `nodes` that differ, and their ends."""
    rng = np.random.default_rng(3)
    start_masks, end_masks = (
        {"a": jnp.asarray(rng.random((2, 3)) < 0.4), "b": None} for _ in range(2)
    )
    start, end = nodes(2)
    ends = masks_lib.apply(start_masks, start), masks_lib.apply(end_masks, end)
    return ends, {"start_masks": start_masks, "end_masks": end_masks}


def distance(params, batch):
    return jnp.mean((params["a"] - batch["x"][0]) ** 2) + jnp.sum(params["b"] ** 2)


@pytest.mark.parametrize("kind", curves.KINDS)
@pytest.mark.parametrize("space", ["sparse", "dense"])
def test_each_step_is_the_gradient_at_its_point(kind, space):
    (start, end), masks = halves()
    cut = [{"x": np.array([1.0])}, {"x": np.array([-2.0, 5.0])}]
    key = jax.random.key(5)
    found, training = curves.fit(
        distance, start, end, cut, optax.sgd(0.1), key=key, n_steps=5, kind=kind,
        n_bends=2, space=space, **masks,
    )  # fmt: skip

    either = np.asarray(masks["start_masks"]["a"]) | np.asarray(masks["end_masks"]["a"])
    assert 0 < either.sum() < either.size
    active = np.concatenate([either.ravel(), np.ones(4, bool)])
    if space == "dense":
        active = np.ones(10, bool)
    first, last = vector(start), vector(end)
    rows = [first, (2 * first + last) / 3, (first + 2 * last) / 3, last]
    for step in range(5):
        t = float(jax.random.uniform(jax.random.fold_in(key, step)))
        if kind == "bezier":
            c = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
        else:
            c = [max(0, 1 - abs(3 * t - k)) for k in range(4)]
        phi = sum(w * row for w, row in zip(c, rows, strict=True))
        x = cut[step % 2]["x"][0]
        loss = np.mean((phi[:6] - x) ** 2) + np.sum(phi[6:] ** 2)
        np.testing.assert_allclose(training.t[step], t)
        np.testing.assert_allclose(training.loss[step], loss, rtol=1e-12)
        grad = np.concatenate([(phi[:6] - x) / 3, 2 * phi[6:]]) * active
        for k in (1, 2):
            rows[k] = rows[k] - 0.1 * c[k] * grad
    assert training.step.tolist() == [0, 1, 2, 3, 4]
    for node, row in zip(found.nodes, rows, strict=True):
        np.testing.assert_allclose(vector(node), row, atol=1e-13)


def test_an_objective_acts_with_its_penalty_at_the_point():
    a, b = two_networks()
    objective = a.objective(weight_decay=0.5)
    cut = batches.split(a.data, 6)
    curve, training = curves.fit(
        objective, a.params, b.params, cut, optax.sgd(1.0), key=KEY, n_steps=1, **DENSE
    )
    t = training.t[0]
    middle = 0.5 * vector(a.params) + 0.5 * vector(b.params)
    phi = curves.point(curves.straight(a.params, b.params), t)
    plain = jax.jit(jax.grad(frozen()))(phi, cut[0])
    decay = jax.tree.map(lambda w: 0.5 * w if w.ndim > 1 else 0 * w, phi)
    wanted = middle - 2 * t * (1 - t) * (vector(plain) + vector(decay))
    np.testing.assert_allclose(vector(curve.nodes[1]), wanted, atol=1e-12)


def unruly():
    """An optimizer that moves whatever the gradient is."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u + 0.1, updates), state

    return optax.GradientTransformation(lambda params: (), update)


def test_inactive_weights_are_zero_on_the_whole_sparse_curve_and_only_there():
    (start, end), masks = halves()
    either = np.asarray(masks["start_masks"]["a"]) | np.asarray(masks["end_masks"]["a"])
    for space, zeros in (("sparse", ~either), ("dense", np.zeros((2, 3), bool))):
        curve, _ = curves.fit(
            distance, start, end, NOTHING, unruly(), key=KEY, n_steps=4, n_bends=2,
            space=space, **masks,
        )  # fmt: skip
        for t in (0.1, 0.5, 0.7):
            params = curves.point(curve, t)
            np.testing.assert_array_equal(np.asarray(params["a"]) == 0, zeros)


def test_what_an_optimizer_makes_of_a_whole_leaf_is_that_of_active_weights():
    start, end = {"w": jnp.zeros(2)}, {"w": jnp.zeros(2)}
    masks = {"w": jnp.array([True, False])}
    curve, _ = curves.fit(
        lambda params, batch: jnp.sum(params["w"]), start, end, NOTHING,
        optax.chain(optax.clip_by_global_norm(1e-6), optax.sgd(1.0)),
        key=KEY, n_steps=1, start_masks=masks, end_masks=masks,
    )  # fmt: skip
    np.testing.assert_allclose(curve.nodes[1]["w"], [-1e-6, 0.0])


def test_the_ends_keep_their_bits_and_the_key_decides():
    (start, end), _ = halves()
    fit = functools.partial(
        curves.fit, distance, start, end, NOTHING, optax.sgd(0.1), n_steps=3, **DENSE
    )
    curve, _ = fit(key=KEY)
    again, _ = fit(key=KEY)
    other, _ = fit(key=jax.random.key(1))
    assert curve.nodes[0] is start
    assert curve.nodes[-1] is end
    jax.tree.map(np.testing.assert_array_equal, curve, again)
    assert np.all(curve.nodes[1]["b"] != other.nodes[1]["b"])


def test_a_step_is_compiled_once():
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return valley(params, batch)

    optimizer = optax.sgd(0.1)
    for key in (KEY, jax.random.key(1)):
        curves.fit(
            loss_fn, LEFT, RIGHT, NOTHING, optimizer, key=key, n_steps=3, **DENSE
        )
    assert len(traces) == 1


@pytest.mark.parametrize("kind", curves.KINDS)
def test_training_comes_near_the_least_mean_loss(kind):
    def mean_loss(bends):
        points = np.array([[-1.0, 0.0], *np.reshape(bends, (2, 2)), [1.0, 0.0]])
        ts = (np.arange(300) + 0.5) / 300
        xy = [np.interp(ts, np.linspace(0, 1, 4), column) for column in points.T]
        if kind == "bezier":
            basis = [(1 - ts) ** 3, 3 * ts * (1 - ts) ** 2, 3 * ts**2 * (1 - ts), ts**3]
            xy = points.T @ basis
        return np.mean(valley({"w": xy}, None))

    line = np.array([-1 / 3, 0.0, 1 / 3, 0.0])
    above = line + np.array([0.0, 0.1, 0.0, 0.1])
    least = scipy.optimize.minimize(mean_loss, above).fun
    assert mean_loss(line) > 3 * least
    curve, _ = curves.fit(
        valley, LEFT, RIGHT, NOTHING, optax.sgd(0.03), key=KEY, n_steps=500,
        kind=kind, n_bends=2, **DENSE,
    )  # fmt: skip
    bends = np.concatenate([vector(bend) for bend in curve.nodes[1:-1]])
    assert mean_loss(bends) < 1.1 * least
    barriers = [
        interpolation.barrier(curves.evaluate(valley, c, NOTHING))
        for c in (curves.straight(LEFT, RIGHT), curve)
    ]
    np.testing.assert_allclose(barriers[0], 3.0)
    assert barriers[1] < 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "space='sparse' needs start_masks"),
        ({"start_masks": {"w": None}}, "space='sparse' needs end_masks"),
        ({"space": "odd"}, "space='odd' is unknown"),
        ({**DENSE, "kind": "spline"}, "kind='spline' is unknown"),
        ({**DENSE, "n_bends": 0}, "n_bends=0"),
    ],
)
def test_a_wrong_choice_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        curves.fit(
            valley, LEFT, RIGHT, NOTHING, optax.sgd(0.1), key=KEY, n_steps=1, **options
        )


def test_ends_outside_their_masks_are_refused():
    masks = {"w": jnp.array([False, True])}
    with pytest.raises(
        ValueError, match="the start has weights outside the masks, in w"
    ):
        curves.check_ends(LEFT, RIGHT, masks)
    with pytest.raises(ValueError, match="the end has weights"):
        curves.check_ends({"w": jnp.array([0.0, 1.0])}, RIGHT, masks)
    curves.check_ends(LEFT, RIGHT, {"w": jnp.array([True, False])})
    with pytest.raises(ValueError, match="the start has weights"):
        curves.fit(
            valley, LEFT, RIGHT, NOTHING, optax.sgd(0.1), key=KEY, n_steps=1,
            start_masks=masks, end_masks=masks,
        )  # fmt: skip
    with pytest.raises(ValueError, match="batches is empty"):
        curves.fit(valley, LEFT, RIGHT, [], optax.sgd(0.1), key=KEY, n_steps=1, **DENSE)


def test_a_union_is_active_where_either_is_and_dense_where_either_is_dense():
    a = {"x": jnp.array([True, True, False, False]), "y": None, "z": jnp.ones(2, bool)}
    b = {"x": jnp.array([True, False, True, False]), "y": jnp.ones(2, bool), "z": None}
    found = curves.union(a, b)
    assert found["x"].tolist() == [True, True, True, False]
    assert found["y"] is None
    assert found["z"] is None


# Evaluation


def test_a_curve_is_evaluated_where_it_is():
    a, b = two_networks()
    bend = jax.tree.map(lambda w: 0.3 - np.asarray(w), a.params)
    curve = Curve((a.params, bend, b.params), "bezier")
    ts = np.array([0.0, 0.4, 1.0])
    objective = frozen()
    path = curves.evaluate(objective, curve, batches.split(a.data, 4), ts=ts, block=2)
    np.testing.assert_array_equal(path.alpha, ts)
    for t, loss, accuracy in zip(*path, strict=True):
        params = jax.tree.map(
            lambda u, v, w, t=t: (1 - t) ** 2 * u + 2 * t * (1 - t) * v + t**2 * w,
            *curve.nodes,
        )
        logits = np.asarray(objective.logits(params, a.data))
        np.testing.assert_allclose(loss, objective(params, a.data), rtol=1e-12)
        right = logits.argmax(1) == a.data["label"]
        np.testing.assert_allclose(accuracy, np.mean(right), rtol=1e-12)


def test_the_abscissa_can_be_the_length():
    points = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]])
    curve = Curve(tuple({"w": jnp.array(p)} for p in points), "polygon")

    def height(params, batch):
        return params["w"][1] + params["w"][0]

    ts = np.array([0.25, 0.5, 0.75])
    path = curves.evaluate(height, curve, NOTHING, ts=ts, abscissa="length")
    np.testing.assert_allclose(path.alpha, [1.5 / 4, 3 / 4, 3.5 / 4])
    np.testing.assert_allclose(path.loss, [1.5, 3.0, 3.5])
    whole = [
        interpolation.barrier(curves.evaluate(height, curve, NOTHING, abscissa=what))
        for what in ("t", "length")
    ]
    # At the corner the loss is 3, the line between the ends 2 by t and 3 by length.
    np.testing.assert_allclose(whole, [1.0, 0.0], atol=1e-9)


def test_61_points_by_default():
    path = curves.evaluate(valley, curves.straight(LEFT, RIGHT), NOTHING)
    np.testing.assert_allclose(path.alpha, np.arange(61) / 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abscissa": "time"}, "abscissa='time' is unknown"),
        ({"ts": np.array([0.0, 1.1])}, "stay within 0 and 1"),
        ({"ts": np.array([-0.1, 1.0])}, "stay within 0 and 1"),
        ({"ts": np.array([])}, "alphas is empty"),
    ],
)
def test_a_wrong_evaluation_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        curves.evaluate(valley, curves.straight(LEFT, RIGHT), NOTHING, **options)


# Results


def test_the_training_can_be_saved_tabulated_and_plotted(tmp_path):
    training = curves.Training(np.arange(3), np.array([0.1, 0.9, 0.4]), np.ones(3))
    path = results.save(tmp_path / "training.npz", training)
    for x, y in zip(results.load(path, curves.Training), training, strict=True):
        np.testing.assert_array_equal(x, y)
    assert training.frame()["t"].tolist() == [0.1, 0.9, 0.4]
    figure = curves.plot_training(training)
    assert isinstance(figure, Figure)
    dots = figure.axes[0].collections[0]
    np.testing.assert_array_equal(
        dots.get_offsets(), np.stack([training.step, training.loss], 1)
    )
    np.testing.assert_array_equal(dots.get_array(), training.t)
