"""Chains on potentials whose saddles are known, and their steps in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_networks import network

from lottery_flow.analysis import autoneb, batches, curves, interpolation, results
from lottery_flow.sparsity import masks as masks_lib

NOTHING = [{"x": np.zeros(1)}]
LEFT, RIGHT = {"w": np.array([-1.0, 0.0])}, {"w": np.array([1.0, 0.0])}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def valley(params, batch):
    """Minima 0 at (-1, 0) and (1, 0), a saddle 1 at (0, 1); 3 halfway between."""
    x, y = params["w"]
    return (x**2 - 1) ** 2 + 2 * (y - (1 - x**2)) ** 2


def mueller_brown(params, batch):
    """The potential of Mueller & Brown 1979, in hundreds."""
    x, y = params["w"]
    terms = (
        (-200, -1, 0, -10, 1, 0),
        (-100, -1, 0, -10, 0, 0.5),
        (-170, -6.5, 11, -6.5, -0.5, 1.5),
        (15, 0.7, 0.6, 0.7, -1, 1),
    )
    total = sum(
        scale * jnp.exp(a * (x - u) ** 2 + b * (x - u) * (y - v) + c * (y - v) ** 2)
        for scale, a, b, c, u, v in terms
    )
    return total / 100


# Potentials


def test_a_chain_finds_the_saddle_of_a_valley():
    curve, cycles = autoneb.connect(
        valley, LEFT, RIGHT, NOTHING, cycles=((100, 0.03), (100, 0.03), (100, 0.01))
    )
    np.testing.assert_allclose(cycles.saddle[0], 3.0)
    assert 1.0 - 1e-6 < cycles.saddle.min() < 1.02
    path = curves.evaluate(valley, curve, NOTHING, ts=np.linspace(0, 1, 201))
    np.testing.assert_allclose(path.loss.max(), 1.0, atol=0.02)
    # The way is one of steepest descent: the gradient points along the chain.
    chain = np.array([node["w"] for node in curve.nodes])
    losses, grads = jax.jit(
        jax.vmap(jax.value_and_grad(lambda w: valley({"w": w}, None)))
    )(chain)
    for i in range(1, len(chain) - 1):
        tangent = numpy_tangent(*chain[i - 1 : i + 2], losses[i - 1 : i + 2])
        across = grads[i] - (grads[i] @ tangent) * tangent
        assert np.linalg.norm(across) < 0.1


def test_a_chain_finds_the_published_saddles_of_the_mueller_brown_potential():
    # Minima -146.70 and -108.17, with -80.77 between; the higher saddle is -40.66.
    ends = ({"w": np.array([-0.558, 1.442])}, {"w": np.array([0.623, 0.028])})
    np.testing.assert_allclose(
        [mueller_brown(end, None) for end in ends], [-1.467, -1.0817], atol=1e-3
    )
    curve, cycles = autoneb.connect(
        mueller_brown, *ends, NOTHING, cycles=((150, 0.01),) * 5 + ((150, 0.002),)
    )
    assert cycles.saddle[0] > 0
    np.testing.assert_allclose(cycles.saddle.min(), -0.4066, atol=0.02)
    ts = np.linspace(0, 1, 301)
    path = curves.evaluate(mueller_brown, curve, NOTHING, ts=ts)
    highest = curves.point(curve, ts[path.loss.argmax()])
    np.testing.assert_allclose(highest["w"], [-0.822, 0.624], atol=0.1)
    # The intermediate minimum lies on the way.
    points = np.array([curves.point(curve, t)["w"] for t in ts])
    assert np.min(np.linalg.norm(points - [-0.050, 0.467], axis=1)) < 0.1
    assert cycles.n_pivots[-1] > 3


# Steps


def numpy_tangent(before, here, after, losses):
    """Henkelman & Jonsson 2000, eqs. 8-11."""
    low, mid, high = losses
    plus, minus = after - here, here - before
    if high > mid > low:
        tangent = plus
    elif high < mid < low:
        tangent = minus
    else:
        most = max(abs(high - mid), abs(low - mid))
        least = min(abs(high - mid), abs(low - mid))
        if high > low:
            tangent = plus * most + minus * least
        else:
            tangent = plus * least + minus * most
    return tangent / np.linalg.norm(tangent)


@pytest.mark.parametrize(
    "losses", [(1, 2, 4), (4, 2, 1), (1, 4, 2), (2, 4, 1), (4, 1, 2), (2, 1, 4),
               (1, 1, 3), (3, 1, 1), (1, 3, 3), (3, 3, 1), (1, 4, 1)],
)  # fmt: skip
def test_tangents_are_those_of_henkelman_and_jonsson(losses):
    chain = np.array([[0.0, 0.0, 1.0], [1.0, 2.0, 0.5], [4.0, 2.0, 3.0]])
    found = autoneb._tangents(jnp.array(chain), jnp.array(losses, float))
    np.testing.assert_allclose(found, [numpy_tangent(*chain, losses)], atol=1e-14)


def test_a_tangent_exists_where_nothing_rises_or_moves():
    chain = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    found = autoneb._tangents(chain, jnp.zeros(3))
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]])
    still = autoneb._tangents(jnp.zeros((3, 2)), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(still, [[0.0, 0.0]])


def test_pivots_stand_at_fractions_of_the_length():
    chain = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0], [0.0, 1.0]])  # 0, 5, 6, 11
    places = np.array([0.0, 0.5, 0.9, 1.0])
    found = autoneb._respace(jnp.array(chain), jnp.array(places))
    at = [0, 5, 6, 11]
    wanted = [np.interp(11 * places, at, column) for column in chain.T]
    np.testing.assert_allclose(found, np.transpose(wanted), atol=1e-14)
    np.testing.assert_array_equal(found[jnp.array([0, 3])], chain[[0, 3]])


def test_pivots_that_coincide_are_put_apart():
    chain = jnp.array([[0.0], [0.0], [0.0], [4.0]])
    found = autoneb._respace(chain, jnp.array([0.0, 0.25, 0.5, 1.0]))
    np.testing.assert_allclose(found, [[0.0], [1.0], [2.0], [4.0]])
    still = autoneb._respace(jnp.ones((3, 2)), jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(still, np.ones((3, 2)))


def test_a_cycle_is_momentum_on_projected_gradients_over_the_batches_in_turn():
    cut = [{"x": np.array([1.0])}, {"x": np.array([3.0])}]

    def loss_fn(params, batch):
        x, y = params["w"]
        return jnp.sin(2 * x) + (y - batch["x"][0]) ** 2 + x * y

    def loss_and_gradient(w, target):
        x, y = w
        loss = np.sin(2 * x) + (y - target) ** 2 + x * y
        return loss, np.array([2 * np.cos(2 * x) + y, 2 * (y - target) + x])

    # The best chain comes back: here, by this objective, always the last.
    seen = []

    def measured(params, batch):
        return -jnp.sum(params["w"] ** 2)

    curve, cycles = autoneb.connect(
        loss_fn, LEFT, RIGHT, cut, cycles=((3, 0.05),), momentum=0.8, n_pivots=2,
        measured=measured,
    )  # fmt: skip
    chain = np.array([[-1.0, 0.0], [-1 / 3, 0.0], [1 / 3, 0.0], [1.0, 0.0]])
    velocity = np.zeros((2, 2))
    for step in range(3):
        target = cut[step % 2]["x"][0]
        losses, grads = zip(*(loss_and_gradient(w, target) for w in chain), strict=True)
        for i in (1, 2):
            tangent = numpy_tangent(*chain[i - 1 : i + 2], losses[i - 1 : i + 2])
            across = grads[i] - (grads[i] @ tangent) * tangent
            velocity[i - 1] = 0.8 * velocity[i - 1] + across
        chain[1:-1] -= 0.05 * velocity
        pieces = np.linalg.norm(np.diff(chain, axis=0), axis=1)
        at = np.append(0, np.cumsum(pieces))
        places = np.arange(4) / 3 * at[-1]
        chain = np.stack([np.interp(places, at, c) for c in chain.T], 1)
        seen.append(chain)
    found = np.array([node["w"] for node in curve.nodes])
    np.testing.assert_allclose(found, chain, atol=1e-12)
    assert cycles.saddle[1] < cycles.saddle[0]


def test_pivots_are_inserted_in_the_highest_gaps():
    # Three gaps with two points inside; pivots 0, 1, 3, 0: the range is 3.
    losses = np.array([0, 1.0, 1.5, 1, 1, 2, 3, 3.5, 1, 0])

    # Above the lines 1/3, 2/3; 5/3, 7/3; 2, 1, by
    # 2/3, 5/6; -2/3, -1/3; 3/2, 0.
    def found(n, threshold):
        gaps, fractions = autoneb._insertions(losses, 2, n, threshold)
        return gaps.tolist(), fractions.tolist()

    third, two_thirds = 1 / 3, 2 / 3
    assert found(2, 0.1) == ([0, 2], [two_thirds, third])
    assert found(3, 0.1) == ([0, 2], [two_thirds, third])
    assert found(1, 0.1) == ([2], [third])
    # 5/6 is 0.278 of the range.
    assert found(2, 0.27) == ([0, 2], [two_thirds, third])
    assert found(2, 0.29) == ([2], [third])
    assert found(2, 0.6) == ([], [])


def test_an_inserted_pivot_divides_its_gap():
    chain = jnp.array([[0.0, 0.0], [1.0, 2.0], [3.0, 2.0], [4.0, 4.0]])
    places = np.array([0.0, 0.2, 0.6, 1.0])
    new, at = autoneb._insert(chain, places, np.array([0, 2]), np.array([0.5, 0.25]))
    np.testing.assert_allclose(
        new, [[0, 0], [0.5, 1], [1, 2], [3, 2], [3.25, 2.5], [4, 4]]
    )
    np.testing.assert_allclose(at, [0, 0.1, 0.2, 0.6, 0.7, 1.0])
    same, places = autoneb._insert(chain, places, np.array([], int), np.array([]))
    assert same is chain
    assert len(places) == 4


def test_a_step_is_compiled_once_for_each_number_of_pivots():
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return valley(params, batch)

    _, cycles = autoneb.connect(
        loss_fn, LEFT, RIGHT, NOTHING, cycles=((4, 0.01), (4, 0.01)), threshold=9.0,
        measured=valley,
    )  # fmt: skip
    assert cycles.n_pivots.tolist() == [3, 3, 3]
    assert len(traces) == 2  # the inner pivots with gradients, the ends without


# What comes back


def test_the_straight_line_comes_back_if_nothing_is_better():
    curve, cycles = autoneb.connect(
        valley, LEFT, RIGHT, NOTHING, cycles=((3, 5.0), (3, 5.0))
    )
    assert np.all(~(cycles.saddle[1:] < 3.0))
    found = np.array([node["w"] for node in curve.nodes])
    np.testing.assert_allclose(found, np.array([np.linspace(-1, 1, 5), np.zeros(5)]).T)


@functools.cache
def small():
    """Two trained networks of one mask, and a chain between them."""
    a = network()
    data = jax.tree.map(lambda x: x[:10], a.data)
    cut = batches.split(data, 5)
    objective = a.objective()

    @jax.jit
    def descend(params):
        grads = masks_lib.apply(a.masks, jax.grad(objective)(params, data))
        return jax.tree.map(lambda w, g: w - 0.3 * g, params, grads)

    flipped = jax.tree.map(lambda w: np.flip(np.asarray(w)), a.params)
    start, end = a.params, masks_lib.apply(a.masks, flipped)
    for _ in range(200):
        start, end = descend(start), descend(end)
    found = autoneb.connect(
        objective, start, end, cut, masks=a.masks, cycles=((20, 0.1), (20, 0.1)),
        threshold=9.0, block=8,
    )  # fmt: skip
    return a.masks, start, end, cut, objective, *found


def test_a_chain_between_networks_is_lower_than_the_line():
    _, start, end, cut, objective, curve, cycles = small()
    line = interpolation.linear(
        objective, start, end, cut, mask="none", alphas=np.linspace(0, 1, 41), block=8
    )
    np.testing.assert_allclose(cycles.saddle[0], line.loss.max(), rtol=1e-12)
    assert interpolation.barrier(line) > 0.1
    n = 10 * (len(curve.nodes) - 1) + 1
    path = curves.evaluate(objective, curve, cut, ts=np.linspace(0, 1, n), block=8)
    np.testing.assert_allclose(path.loss.max(), cycles.saddle.min(), rtol=1e-12)
    assert path.loss.max() < line.loss.max()


def test_inactive_weights_are_zero_and_the_ends_keep_their_bits():
    masks, start, end, _, _, curve, _ = small()
    assert curve.nodes[0] is start
    assert curve.nodes[-1] is end
    for node in curve.nodes:
        jax.tree.map(np.testing.assert_array_equal, node, masks_lib.apply(masks, node))
    # Biases, which have no mask, move too.
    line = 0.5 * (start["hidden"]["bias"] + end["hidden"]["bias"])
    assert np.all(curve.nodes[len(curve.nodes) // 2]["hidden"]["bias"] != line)


def test_the_chain_comes_back_where_an_end_is_the_highest_point():
    high = {"w": np.array([0.0, -2.0])}
    curve, cycles = autoneb.connect(
        valley, LEFT, high, NOTHING, cycles=((20, 0.01), (20, 0.01)), threshold=9.0
    )
    assert len({*cycles.saddle.tolist()}) == 1
    line = np.linspace([-1.0, 0.0], [0.0, -2.0], 5)
    found = np.array([node["w"] for node in curve.nodes])
    assert np.all(np.linalg.norm(found - line, axis=1)[1:-1] > 0.05)


def test_without_masks_the_chain_leaves_their_space():
    masks = {"w": np.array([True, False])}
    inside, _ = autoneb.connect(
        valley, LEFT, RIGHT, NOTHING, masks=masks, cycles=((20, 0.03),)
    )
    outside, _ = autoneb.connect(valley, LEFT, RIGHT, NOTHING, cycles=((20, 0.03),))
    assert all(node["w"][1] == 0 for node in inside.nodes)
    assert all(node["w"][1] > 0.1 for node in outside.nodes[1:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pivots": 0}, "n_pivots=0"),
        ({"n_between": 0}, "n_between=0"),
        ({"masks": {"w": np.array([False, True])}}, "the start has weights outside"),
    ],
)
def test_a_wrong_choice_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        autoneb.connect(valley, LEFT, RIGHT, NOTHING, **options)


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        autoneb.connect(valley, LEFT, RIGHT, [])


def test_the_default_cycles_are_a_tenth_of_the_paper():
    assert len(autoneb.PAPER_CYCLES) == len(autoneb.CYCLES) == 14
    assert sum(n for n, _ in autoneb.PAPER_CYCLES) == 16000
    assert sum(n for n, _ in autoneb.CYCLES) == 1600
    assert [rate for _, rate in autoneb.CYCLES] == [0.1] * 6 + [0.01] * 4 + [0.001] * 4


def test_cycles_can_be_saved_tabulated_and_plotted(tmp_path):
    cycles = autoneb.Cycles(
        np.arange(3),
        np.array([0, 5, 5]),
        np.array([3, 3, 4]),
        np.array([3.0, 2.0, 1.0]),
    )
    path = results.save(tmp_path / "cycles.npz", cycles)
    for x, y in zip(results.load(path, autoneb.Cycles), cycles, strict=True):
        np.testing.assert_array_equal(x, y)
    assert cycles.frame()["saddle"].tolist() == [3.0, 2.0, 1.0]
    figure = autoneb.plot_cycles(cycles)
    assert isinstance(figure, Figure)
    saddle, pivots = (ax.lines[0] for ax in figure.axes)
    np.testing.assert_array_equal(saddle.get_xdata(), cycles.cycle)
    np.testing.assert_array_equal(saddle.get_ydata(), cycles.saddle)
    np.testing.assert_array_equal(pivots.get_ydata(), cycles.n_pivots)
