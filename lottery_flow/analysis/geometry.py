"""How far networks lie apart, and how far their masks agree.

    L2(a, b)     = ||a - b||
    cosine(a, b) = 1 - <a, b> / (||a|| ||b||)

of flattened parameters, whole and layer by layer. Inactive weights are zeros like any
other, so two masks put networks at a distance too. What two masks share is to be read
beside what chance gives: of masks with n_a and n_b active weights among N, drawn
uniformly and independently, the intersection I is hypergeometric,

    P(I = i) = C(n_a, i) C(N - n_a, n_b - i) / C(N, n_b)

Everything here is computed in float64 on the host, one leaf at a time.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.signal
from jaxtyping import Float, PyTree
from matplotlib.figure import Figure

from lottery_flow.analysis import figures
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

ALL = "all"  # the name of the whole network beside those of its layers


def matched(trees: Sequence[PyTree]) -> list[dict[str, Any]]:
    """The leaves of parameter trees by layer name, the same names in each.

    Raises:
      ValueError: names or shapes differ.
    """
    named = [masks_lib.named_leaves(tree) for tree in trees]
    shapes = [{k: np.shape(leaf) for k, leaf in leaves.items()} for leaves in named]
    for other in shapes[1:]:
        for name in sorted(shapes[0].keys() | other.keys()):
            if shapes[0].get(name) != other.get(name):
                raise ValueError(
                    f"the networks differ at {name}: shape {shapes[0].get(name)} "
                    f"against {other.get(name)}; compare networks of one model"
                )
    return named


def distances(a: Params, b: Params) -> pd.DataFrame:
    """L2 and cosine distance between two networks.

    Args:
      a: parameters.
      b: parameters of the same shapes.

    Returns:
      A row for each layer and one for the whole network, `all`: `layer`, `l2`, and
      `cosine`, 0 to 2, which is nan where one of the two is zero.

    Raises:
      ValueError: the networks differ in names or shapes.

    Guarantees:
      - Equals the formulas on the concatenated float64 leaves.
      - The cosine distance keeps its relative precision between close networks.
      - Both distances of a network to itself are exactly zero.
    """
    named, other = matched([a, b])
    sums = {name: _sums(leaf, other[name]) for name, leaf in named.items()}
    sums[ALL] = np.sum(list(sums.values()), axis=0)
    squares = np.stack(list(sums.values()))
    l2, cosine = np.sqrt(squares[:, 0]), _cosine(*squares.T)
    return pd.DataFrame({"layer": list(sums), "l2": l2, "cosine": cosine})


def trajectory(
    points: Iterable[tuple[int, Params]], solution: Params | None = None
) -> pd.DataFrame:
    """Distances along a training run, to its start and to a solution.

    Args:
      points: (step, parameters); the first is the start. A generator will do: only the
        start and one other are kept.
      solution: for instance the network that the masks were pruned from; None: only
        distances to the start.

    Returns:
      A row for each step, reference (`start` or `solution`) and layer: those, and `l2`
      and `cosine` as in `distances`.

    Raises:
      ValueError: there are no points, or they differ in shapes.

    Guarantees:
      - Each row is that of `distances`.
    """
    references, frames = {}, []
    for step, params in points:
        if not references:
            references = {"start": params}
            if solution is not None:
                references["solution"] = solution
        for name, reference in references.items():
            frame = distances(params, reference)
            frame.insert(0, "reference", name)
            frame.insert(0, "step", step)
            frames.append(frame)
    if not frames:
        raise ValueError("points is empty; give at least one (step, parameters)")
    return pd.concat(frames, ignore_index=True)


def mask_overlap(a: Masks, b: Masks) -> pd.DataFrame:
    """How far two masks agree, and how far random masks of the same counts would.

    Args:
      a: masks. Leaves that are dense (None) here or in `b` are left out.
      b: masks of the same shapes.

    Returns:
      A row for each layer masked in both, and one for all of them, `all`:
      `size`, `active_a`, `active_b`: weights;
      `intersection`: weights active in both;
      `iou`: intersection over union, 1 where both masks are empty;
      `hamming`, `hamming_fraction`: weights active in just one, and over the size;
      `random_intersection`, `random_intersection_std`, `random_iou`, `random_hamming`:
      expectations, and the standard deviation, for masks drawn independently and
      uniformly with the same counts in each layer.

    Raises:
      ValueError: no leaf is masked in both, or shapes differ.

    Guarantees:
      - The counts are exact.
      - The expectations are those over all pairs of masks of these counts.
      - `all` counts the layers together; its expectations draw each layer for itself.
    """
    other = masks_lib.named_leaves(b)
    shared = {
        name: (np.asarray(mask), np.asarray(other[name]))
        for name, mask in masks_lib.named_leaves(a).items()
        if mask is not None and other.get(name) is not None
    }
    if not shared:
        raise ValueError("no layer is masked in both; give masks of one model")
    counts = {}
    for name, (x, y) in shared.items():
        if x.shape != y.shape:
            raise ValueError(
                f"the masks differ at {name}: shape {x.shape} against {y.shape}; "
                "compare masks of one model"
            )
        counts[name] = [x.size, *(int(np.sum(m)) for m in (x, y, x & y))]
    rows = [_row(name, [count]) for name, count in counts.items()]
    return pd.DataFrame([*rows, _row(ALL, list(counts.values()))])


def hypergeometric(
    size: int, n_a: int, n_b: int
) -> tuple[int, Float[np.ndarray, " i"]]:
    """The distribution of the intersection of two random masks.

    Args:
      size: weights of the layer.
      n_a: active in one mask.
      n_b: active in the other.

    Returns:
      The smallest intersection that is listed, and the probabilities of it and those
      that follow. Listed is all that lies within 20 standard deviations and 40 of the
      mean: what is left out has a probability below 1e-25 (Bernstein's inequality).
    """
    mean, variance = _moments(size, n_a, n_b)
    reach = 20 * variance**0.5 + 40
    low = max(0, n_a + n_b - size, int(mean - reach))
    high = min(n_a, n_b, int(mean + reach) + 1)
    # The ratio of neighbours has no large factorials that would cancel.
    i = np.arange(low, high, dtype=np.float64)
    ratio = (n_a - i) * (n_b - i) / ((i + 1) * (size - n_a - n_b + i + 1))
    log_p = np.concatenate([[0.0], np.cumsum(np.log(ratio))])
    p = np.exp(log_p - np.max(log_p))
    return low, p / np.sum(p)


def plot_distances(frame: pd.DataFrame) -> Figure:
    """Bars for each layer."""
    fig, axes = figures.new(1, 2, sharey=True)
    for ax, column in zip(axes, ["l2", "cosine"], strict=True):
        ax.barh(frame["layer"], frame[column])
        ax.set(xlabel=f"{column} distance")
    axes[0].invert_yaxis()
    return fig


def plot_trajectory(frame: pd.DataFrame, layer: str = ALL) -> Figure:
    """The distances of one layer, or of the whole network, over the steps."""
    fig, axes = figures.new(1, 2)
    rows = frame[frame["layer"] == layer]
    for ax, column in zip(axes, ["l2", "cosine"], strict=True):
        for reference, part in rows.groupby("reference", sort=False):
            ax.plot(part["step"], part[column], label=f"to the {reference}")
        ax.set(xlabel="step", ylabel=f"{column} distance", ylim=(0, None))
    axes[0].legend()
    return fig


def plot_mask_overlap(frame: pd.DataFrame) -> Figure:
    """Intersection over union of each layer, beside that of random masks."""
    fig, ax = figures.new()
    ax.barh(frame["layer"], frame["iou"], label="these masks")
    ax.plot(frame["random_iou"], frame["layer"], "k|", ms=14, label="random masks")
    ax.set(xlabel="intersection over union", xlim=(0, 1))
    ax.invert_yaxis()
    ax.legend()
    return fig


def _sums(a, b) -> np.ndarray:
    """Squared norms of the difference and of both, which add up over leaves."""
    x, y = (np.ravel(np.asarray(leaf)).astype(np.float64) for leaf in (a, b))
    return np.array([np.sum(np.square(v)) for v in (x - y, x, y)])


def _cosine(difference, a, b):
    """1 - cos from squared norms, without the cancellation that 1 - cos has."""
    product = np.sqrt(a) * np.sqrt(b)
    lengths = np.square(np.sqrt(a) - np.sqrt(b))
    twice = np.maximum(difference - lengths, 0)
    # Zero has no direction.
    return np.divide(
        twice, 2 * product, out=np.full_like(product, np.nan), where=product > 0
    )


def _row(name: str, counts: list[list[int]]) -> dict[str, Any]:
    """The agreement of layers (size, active, active, intersection) taken together."""
    size, n_a, n_b, both = (sum(column) for column in zip(*counts, strict=True))
    moments = [_moments(*count[:3]) for count in counts]
    mean, variance = (sum(column) for column in zip(*moments, strict=True))
    return {
        "layer": name,
        "size": size,
        "active_a": n_a,
        "active_b": n_b,
        "intersection": both,
        "iou": float(_iou(n_a, n_b, both)),
        "hamming": n_a + n_b - 2 * both,
        "hamming_fraction": (n_a + n_b - 2 * both) / size,
        "random_intersection": mean,
        "random_intersection_std": variance**0.5,
        "random_iou": _random_iou(n_a, n_b, [count[:3] for count in counts]),
        "random_hamming": n_a + n_b - 2 * mean,
    }


def _iou(n_a: int, n_b: int, both):
    return both / (n_a + n_b - both) if n_a + n_b else np.ones_like(both, float)


def _random_iou(n_a: int, n_b: int, layers: list[list[int]]) -> float:
    """The mean over the distribution of the sum of the layers' intersections."""
    lows, p = zip(*(hypergeometric(*layer) for layer in layers), strict=True)
    total = functools.reduce(scipy.signal.fftconvolve, p)
    both = sum(lows) + np.arange(len(total))
    return float(np.sum(total * _iou(n_a, n_b, both)))


def _moments(size: int, n_a: int, n_b: int) -> tuple[float, float]:
    """Mean and variance of the hypergeometric distribution."""
    mean = n_a * n_b / size
    return mean, mean * (size - n_a) * (size - n_b) / (size * max(size - 1, 1))
