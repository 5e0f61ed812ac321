"""Networks that predict together, and how far they differ.

    disagreement(i, j) = fraction of examples with argmax z_i != argmax z_j
    KL(i || j)         = mean over examples of sum_k p_ik log(p_ik / p_jk)
    JS(i, j)           = KL(i || m) / 2 + KL(j || m) / 2,  m = (p_i + p_j) / 2

in nats, p = softmax(z) (Fort et al. 2019; Evci et al. 2022). A ticket that learns the
function of the network that it was pruned from disagrees little with it, and tickets
that do so add little to one another. With errors e_i and e_j,

    |e_i - e_j| <= disagreement(i, j) <= e_i + e_j

Logits are stored once (`logits_of`); the rest is numpy in float64, 8 bytes a logit.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import calibration, figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.calibration import Labels, log_softmax
from lottery_flow.analysis.objective import Objective
from lottery_flow.sparsity.masks import Params

Stack = Float[np.ndarray | Array, "m n c"]  # the logits of m models
References = Float[np.ndarray | Array, "r _ _"]  # of r others, on the same examples


class Comparison(NamedTuple):
    """How far models differ from references, each from each.

    Attributes:
      disagreement: float64 [m r], fraction of examples.
      normalised: float64 [m r], the same over the error of the model, 1 - its accuracy:
        about 1 for a reference that has nothing in common with the model's mistakes
        (Fort et al. 2019); nan or inf for a model without errors. Not symmetric.
      kl: float64 [m r], KL(model || reference), nats. Not symmetric.
      js: float64 [m r], Jensen-Shannon divergence, nats, at most log 2.
    """

    disagreement: np.ndarray
    normalised: np.ndarray
    kl: np.ndarray
    js: np.ndarray

    def frame(self) -> pd.DataFrame:
        """A row for each model and reference, by number."""
        model, reference = np.indices(self.disagreement.shape)
        columns = {"model": model, "reference": reference, **self._asdict()}
        return pd.DataFrame({k: np.ravel(v) for k, v in columns.items()})


class Summary(NamedTuple):
    """An ensemble, its members, and the network that they come from.

    Attributes:
      accuracy: float64 [m], of each member.
      loss: float64 [m], negative log-likelihood of each member, nats.
      ensemble_accuracy: of the members together.
      ensemble_loss: nats.
      disagreement: float64 [m (m - 1) / 2], of each pair of members.
      reference_accuracy: of the reference, nan without one.
      reference_disagreement: float64 [m], of each member with the reference.
    """

    accuracy: np.ndarray
    loss: np.ndarray
    ensemble_accuracy: float
    ensemble_loss: float
    disagreement: np.ndarray
    reference_accuracy: float
    reference_disagreement: np.ndarray

    def frame(self) -> pd.DataFrame:
        """One row, with means and standard deviations (n - 1; nan for one value).

        `gain` is the accuracy of the ensemble less the mean one of its members. The
        pairs share members, so their standard deviation is not that of independent
        values.
        """
        row = {}
        for name, value in self._asdict().items():
            if np.ndim(value):
                some = len(value) > 0
                row[f"{name}_mean"] = np.mean(value) if some else np.nan
                row[f"{name}_std"] = np.std(value, ddof=1) if len(value) > 1 else np.nan
            else:
                row[name] = float(value)
        row["gain"] = row["ensemble_accuracy"] - row["accuracy_mean"]
        return pd.DataFrame([row])


def logits_of(objective: Objective, params: Params, batches: Batches) -> np.ndarray:
    """The logits [n c] of all examples, in the order of the batches.

    Compiled once for an objective and a size of batch, so networks of one model, with
    running statistics in common or without norms, share a program.

    Raises:
      ValueError: there is no batch.
    """
    batches_lib.total(batches)  # says so if there are none
    logits = [_logits(objective.logits, params, batch) for batch in batches]
    return np.concatenate([np.asarray(part) for part in logits])


def compare(
    logits: Stack, labels: Labels, references: References | None = None
) -> Comparison:
    """How far models differ.

    Args:
      logits: of m models.
      labels: the right classes.
      references: logits of the r models to compare with, for instance
        `pruned[None]`; None: the models themselves, all pairs.

    Raises:
      ValueError: examples or classes are not the same, or logits are not finite.

    Guarantees:
      - Disagreement lies between the difference of the two errors and their sum.
      - Divergences are never negative, and zero between equal predictions, up to
        rounding.
    """
    models, labels = _checked(logits, labels)
    others = models if references is None else _same(references, models)
    shape = (len(models), len(others))
    disagreement, kl, js = (np.zeros(shape) for _ in range(3))
    log_p, log_q = log_softmax(models), log_softmax(others)
    choices, other_choices = np.argmax(models, axis=2), np.argmax(others, axis=2)
    for i, j in np.ndindex(*shape):
        disagreement[i, j] = np.mean(choices[i] != other_choices[j])
        kl[i, j] = _kl(log_p[i], log_q[j])
        middle = np.logaddexp(log_p[i], log_q[j]) - np.log(2)
        js[i, j] = (_kl(log_p[i], middle) + _kl(log_q[j], middle)) / 2
    error = np.mean(choices != labels, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        normalised = disagreement / error[:, None]
    return Comparison(disagreement, normalised, kl, js)


def over_pairs(matrix: Float[np.ndarray, "m k"]) -> np.ndarray:
    """The entries of a symmetric matrix above its diagonal: one for each pair."""
    return matrix[np.triu_indices(len(matrix), 1)]


def combine(logits: Stack, *, by: str = "probability") -> Float[np.ndarray, "n c"]:
    """Log-probabilities of the members together, which serve as logits.

    Args:
      logits: of m models.
      by: "probability": the mean of the probabilities; "logit": the mean of the logits,
        which is the normalised geometric mean of the probabilities.

    Raises:
      ValueError: `by` is unknown.

    Guarantees:
      - The loss is at most the mean loss of the members.
      - Members that are alike change nothing.
    """
    if by == "probability":
        summed = np.logaddexp.reduce(log_softmax(logits), axis=0)
        return summed - np.log(len(logits))
    if by == "logit":
        return log_softmax(np.mean(np.asarray(logits).astype(np.float64), axis=0))
    raise ValueError(f"by={by!r} is unknown; write 'probability' or 'logit'")


def summary(
    logits: Stack,
    labels: Labels,
    reference: Float[np.ndarray | Array, "_ _"] | None = None,
    *,
    by: str = "probability",
) -> Summary:
    """What the table of ensembles says of one kind of network.

    Args:
      logits: of m members.
      labels: the right classes.
      reference: logits of the network that they are compared with, for instance the
        pruning solution that tickets come from.
      by: how they are combined, see `combine`.

    Raises:
      ValueError: as `compare` and `combine`.

    Guarantees:
      - Members that are alike have no gain, up to rounding, and do not disagree.
    """
    models, labels = _checked(logits, labels)
    together = combine(models, by=by)
    choices = np.argmax(models, axis=2)
    pairs = zip(*np.triu_indices(len(models), 1), strict=True)
    reference_accuracy, apart = float("nan"), np.full(len(models), np.nan)
    if reference is not None:
        (other,) = _same(np.asarray(reference)[None], models)
        reference_accuracy = calibration.accuracy(other, labels)
        apart = np.mean(choices != np.argmax(other, axis=1), axis=1)
    return Summary(
        np.array([calibration.accuracy(z, labels) for z in models]),
        np.array([calibration.nll(z, labels) for z in models]),
        calibration.accuracy(together, labels),
        calibration.nll(together, labels),
        np.array([np.mean(choices[i] != choices[j]) for i, j in pairs]),
        reference_accuracy,
        apart,
    )


def table(summaries: Mapping[str, Summary]) -> pd.DataFrame:
    """The table of ensembles: a row for each kind of network, named in `method`."""
    frames = {name: value.frame() for name, value in summaries.items()}
    rows = pd.concat(frames, names=["method", None])
    return rows.reset_index("method").reset_index(drop=True)


def plot_comparison(result: Comparison) -> Figure:
    """The four matrices as images."""
    fig, axes = figures.new(1, 4)
    for ax, (name, matrix) in zip(axes, result._asdict().items(), strict=True):
        image = ax.imshow(np.ma.masked_invalid(matrix))
        fig.colorbar(image, ax=ax)
        ax.set(title=name, xlabel="reference", ylabel="model")
    return fig


def plot_table(rows: pd.DataFrame) -> Figure:
    """Accuracy of members and ensembles, and their disagreements, of each method."""
    fig, (left, right) = figures.new(1, 2, sharey=True)
    for ax, name, label in [
        (left, "accuracy", "members"),
        (right, "disagreement", "pairs of members"),
        (right, "reference_disagreement", "with the reference"),
    ]:
        mean, std = rows[f"{name}_mean"], rows[f"{name}_std"]
        ax.errorbar(mean, rows["method"], xerr=std.fillna(0), fmt="o", label=label)
    left.plot(rows["ensemble_accuracy"], rows["method"], "D", label="ensemble")
    left.set(xlabel="accuracy")
    right.set(xlabel="disagreement")
    left.invert_yaxis()
    for ax in (left, right):
        ax.legend(fontsize="small")
    return fig


@functools.partial(jax.jit, static_argnums=0)
def _logits(logits_fn, params, batch):
    return logits_fn(params, batch)


def _kl(log_p, log_q) -> np.floating:
    """The mean over examples of the divergence, from log-probabilities."""
    return np.maximum(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)), 0.0)


def _checked(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    """Both as numpy arrays, each model checked."""
    for model in logits:
        calibration.checked(model, labels)
    return np.asarray(logits), np.asarray(labels)


def _same(references, models) -> np.ndarray:
    """The references as a numpy array, checked to be of the models' examples."""
    references = np.asarray(references)
    if references.shape[1:] != models.shape[1:]:
        raise ValueError(
            f"logits of references have shape {references.shape[1:]}, those of models "
            f"{models.shape[1:]}; give the same examples and classes"
        )
    if not np.all(np.isfinite(references)):
        raise ValueError("logits of references are not finite; give other references")
    return references
