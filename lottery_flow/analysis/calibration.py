"""How good the probabilities of a classifier are.

    ECE = sum_b n_b / n |accuracy_b - confidence_b|     over bins b of the confidence
    MCE = max_b |accuracy_b - confidence_b|             (Guo et al. 2017, sec. 2)

    Brier = 1/n sum_i sum_k (p_ik - [y_i = k])^2        0 to 2 (Brier 1950)
    NLL   = -1/n sum_i log p_{i, y_i}                   in nats

The confidence is the largest probability, p = softmax(logits). Temperature scaling,
p = softmax(logits / T), changes confidences and no prediction; T minimises the NLL of
held-out examples (Guo et al. 2017, sec. 4.2). Everything is computed in float64 with
numpy, from stored logits.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize
from jaxtyping import Array, Float, Integer
from matplotlib.figure import Figure

from lottery_flow.analysis import figures

Logits = Float[np.ndarray | Array, "n c"]
Labels = Integer[np.ndarray | Array, " examples"]  # one for each row of logits

T_RANGE = (0.01, 100.0)


class Reliability(NamedTuple):
    """A reliability diagram.

    Attributes:
      lower: float64 [b], confidences of a bin are above this (of equal-mass bins: the
        smallest one, nan in an empty bin).
      upper: float64 [b], and at most this (the largest one).
      count: int64 [b], examples.
      confidence: float64 [b], mean; nan in an empty bin.
      accuracy: float64 [b], fraction of examples that are right; nan in an empty bin.
      ece: expected calibration error.
      mce: maximum calibration error, over bins that are not empty.
    """

    lower: np.ndarray
    upper: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    mce: float

    def frame(self) -> pd.DataFrame:
        """A row for each bin."""
        bins = {k: v for k, v in self._asdict().items() if k not in ("ece", "mce")}
        return pd.DataFrame(bins)


class Scores(NamedTuple):
    """Scores of one classifier on one set of examples.

    Attributes:
      accuracy: fraction of examples that are right.
      nll: mean negative log-likelihood, nats.
      brier: mean squared error of all probabilities, 0 to 2.
      ece: expected calibration error, bins of equal width.
      ece_mass: the same with bins of equal mass.
      mce: maximum calibration error, bins of equal width.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    ece_mass: float
    mce: float

    def frame(self) -> pd.DataFrame:
        """A row for each score."""
        values = [float(v) for v in self]
        return pd.DataFrame({"score": self._fields, "value": values})


class Temperature(NamedTuple):
    """A fitted temperature, and what it does on the examples that it was fitted to.

    Attributes:
      temperature: what to divide logits by: above 1 for overconfident classifiers.
      nll_before: of the logits as they are.
      nll_after: of the logits over the temperature.
      ece_before: bins of equal width.
      ece_after: the same.
    """

    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    def frame(self) -> pd.DataFrame:
        """A row before and one after."""
        return pd.DataFrame(
            {
                "temperature": [1.0, float(self.temperature)],
                "nll": [float(self.nll_before), float(self.nll_after)],
                "ece": [float(self.ece_before), float(self.ece_after)],
            }
        )


def log_softmax(logits: Float[np.ndarray | Array, "... c"]) -> np.ndarray:
    """Log-probabilities in float64, for logits of any size; at most 0."""
    z = np.asarray(logits).astype(np.float64)
    z = z - np.max(z, axis=-1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def accuracy(logits: Logits, labels: Labels) -> float:
    """The fraction of examples whose largest logit, the first of equals, is right."""
    logits, labels = checked(logits, labels)
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def nll(logits: Logits, labels: Labels) -> float:
    """The mean negative log-likelihood (cross-entropy) in nats."""
    logits, labels = checked(logits, labels)
    return float(-np.mean(log_softmax(logits)[np.arange(len(labels)), labels]))


def brier(logits: Logits, labels: Labels) -> float:
    """The mean over examples of the squared errors of all their probabilities."""
    logits, labels = checked(logits, labels)
    errors = np.exp(log_softmax(logits))
    errors[np.arange(len(labels)), labels] -= 1
    return float(np.mean(np.sum(np.square(errors), axis=1)))


def reliability(
    logits: Logits,
    labels: Labels,
    *,
    n_bins: int = 15,
    bins: str = "width",
) -> Reliability:
    """Accuracy against confidence.

    Args:
      logits: of a held-out set.
      labels: the right classes.
      n_bins: at least 1.
      bins: "width": the intervals ((b - 1) / n_bins, b / n_bins] (Guo et al. 2017);
        "mass": examples sorted by confidence and cut into parts whose counts differ by
        one at most (Nguyen & O'Connor 2015), equal confidences in their order.

    Raises:
      ValueError: logits and labels do not fit, or an option is unknown.

    Guarantees:
      - Every example is in just one bin.
      - The error with bins of equal width does not depend on the order of examples.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins} must be at least 1")
    logits, labels = checked(logits, labels)
    confidence = np.exp(np.max(log_softmax(logits), axis=1))
    right = np.argmax(logits, axis=1) == labels
    if bins == "width":
        edges = np.linspace(0, 1, n_bins + 1)
        which = np.searchsorted(edges, confidence, side="left") - 1
        members = [np.flatnonzero(which == b) for b in range(n_bins)]
        lower, upper = edges[:-1], edges[1:]
    elif bins == "mass":
        members = np.array_split(np.argsort(confidence, kind="stable"), n_bins)
        ends = [confidence[m][[0, -1]] if len(m) else [np.nan] * 2 for m in members]
        lower, upper = np.array(ends).T
    else:
        raise ValueError(f"bins={bins!r} is unknown; write 'width' or 'mass'")
    count = np.array([len(m) for m in members])
    mean_confidence, mean_right = (
        np.array([np.mean(x[m]) if len(m) else np.nan for m in members])
        for x in (confidence, right)
    )
    gap = np.abs(mean_right - mean_confidence)[count > 0]
    ece = np.sum(count[count > 0] * gap) / len(labels)
    return Reliability(
        lower, upper, count, mean_confidence, mean_right, float(ece), float(np.max(gap))
    )


def scores(logits: Logits, labels: Labels, *, n_bins: int = 15) -> Scores:
    """All scores of a classifier; `n_bins` for the calibration errors."""
    width = reliability(logits, labels, n_bins=n_bins)
    mass = reliability(logits, labels, n_bins=n_bins, bins="mass")
    return Scores(
        accuracy(logits, labels),
        nll(logits, labels),
        brier(logits, labels),
        width.ece,
        mass.ece,
        width.mce,
    )


def fit_temperature(logits: Logits, labels: Labels, *, n_bins: int = 15) -> Temperature:
    """The temperature that minimises the negative log-likelihood.

    The NLL is convex in 1 / T; this finds the root of its derivative.

    Args:
      logits: of held-out examples, which the network was not trained on.
      labels: the right classes.
      n_bins: for the calibration errors.

    Returns:
      What it does on these examples. A temperature of 0.01 or 100 is an end of the
      range that is searched, without a minimum between: 0.01 where all predictions are
      right, 100 where the logits tell no more than chance.

    Guarantees:
      - The NLL is not larger than before.
      - Scaling the logits scales the temperature.
    """
    logits, labels = checked(logits, labels)
    z = logits.astype(np.float64)
    z = z - np.max(z, axis=1, keepdims=True)
    of_label = np.mean(z[np.arange(len(labels)), labels])

    def slope(log_t):
        """The derivative of the NLL by 1 / T."""
        p = np.exp(log_softmax(z / np.exp(log_t)))
        return np.mean(np.sum(p * z, axis=1)) - of_label

    low, high = np.log(T_RANGE)
    if slope(high) >= 0:
        temperature = T_RANGE[1]
    elif slope(low) <= 0:
        temperature = T_RANGE[0]
    else:
        temperature = float(np.exp(scipy.optimize.brentq(slope, low, high, xtol=1e-12)))
    after = z / temperature
    return Temperature(
        temperature,
        nll(z, labels),
        nll(after, labels),
        reliability(z, labels, n_bins=n_bins).ece,
        reliability(after, labels, n_bins=n_bins).ece,
    )


def plot_reliability(result: Reliability) -> Figure:
    """Accuracy over confidence, and how many examples each bin has."""
    fig, (top, bottom) = figures.new(2, 1, sharex=True)
    some = result.count > 0
    top.plot([0, 1], [0, 1], "--", color="0.6")
    top.plot(result.confidence[some], result.accuracy[some], "o-")
    title = f"ECE {float(result.ece):.3f}, MCE {float(result.mce):.3f}"
    top.set(ylabel="accuracy", title=title)
    bottom.bar(result.confidence[some], result.count[some], width=0.02)
    bottom.set(xlabel="confidence", ylabel="examples", xlim=(0, 1))
    return fig


def plot_scores(result: Scores) -> Figure:
    """A bar for each score."""
    fig, ax = figures.new()
    ax.bar(result._fields, [float(v) for v in result])
    return fig


def plot_temperature(result: Temperature) -> Figure:
    """Negative log-likelihood and calibration error before and after."""
    fig, axes = figures.new(1, 2)
    frame = result.frame()
    names = ["before", f"T = {float(result.temperature):.3g}"]
    for ax, column in zip(axes, ["nll", "ece"], strict=True):
        ax.bar(names, frame[column])
        ax.set(ylabel=column)
    return fig


def checked(logits: Logits, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Both as numpy arrays.

    Raises:
      ValueError: they do not fit, there are none, or logits are not finite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    n, c = logits.shape
    if len(labels) != n or not n:
        raise ValueError(
            f"logits are of {n} examples, labels of {len(labels)}; give the same ones, "
            "at least one"
        )
    if np.min(labels) < 0 or np.max(labels) >= c:
        raise ValueError(
            f"labels go from {np.min(labels)} to {np.max(labels)}; logits have {c} "
            f"classes, so give labels from 0 to {c - 1}"
        )
    if not np.all(np.isfinite(logits)):
        raise ValueError("logits are not finite; leave out a network that diverged")
    return logits, labels
