"""What of the Gauss-Newton matrix comes from classes (Papyan 2020).

    G = mean over i of sum over c' of p_ic' g_ic' g_ic'^T
    g_ic' = J_i^T (p_i - e_c')
    g_cc' = weighted mean of g_ic' over the examples i of class c
    g_c   = weighted mean of g_cc' over c' != c
    G = G_class + G_cross + G_within + G_same

G_class is the second moment of the g_c, G_cross the covariance of the g_cc' around
them, G_within that of the g_ic' around the g_cc' (all of c' != c), and G_same what the
examples' own labels add (c' = c). p are the predicted probabilities, J the Jacobian of
the logits over the active parameters, the criterion is the cross-entropy. The large
outliers of the spectrum are, in trained networks, those of G_class (Papyan 2020,
"Traces of class/cross-class structure pervade deep learning spectra", sec. 3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.curvature import precise
from lottery_flow.analysis.objective import Objective
from lottery_flow.sparsity.active import active_space
from lottery_flow.sparsity.masks import Masks, Params


class ClassStructure(NamedTuple):
    """The parts of the Gauss-Newton matrix, as vectors.

    Attributes:
      means: float64 [C C n], g_cc' in the space of active parameters; zero where
        class c has no examples.
      weights: float64 [C C], the sum of p_ic' over the examples of class c, over the
        number of all examples. The sum over both is 1.
      squares: float64 [C C], the sum of p_ic' |g_ic'|^2 likewise.
    """

    means: np.ndarray
    weights: np.ndarray
    squares: np.ndarray

    @property
    def class_means(self) -> np.ndarray:
        """g_c, float64 [C n]."""
        weights = self._cross_weights()
        total = weights.sum(axis=1, keepdims=True)
        return np.einsum(
            "cd,cdn->cn", weights / np.where(total > 0, total, 1), self.means
        )

    def class_factor(self) -> np.ndarray:
        """F with F^T F = G_class, float64 [C n]."""
        weights = self._cross_weights().sum(axis=1)
        return np.sqrt(weights)[:, None] * self.class_means

    def cross_factor(self) -> np.ndarray:
        """F with F^T F = G_cross, float64 [C C n]; zero where c' = c."""
        centred = self.means - self.class_means[:, None]
        return np.sqrt(self._cross_weights())[..., None] * centred

    def traces(self) -> dict[str, float]:
        """The traces of the four parts, which add up to that of G."""
        off = ~np.eye(len(self.weights), dtype=bool)
        of_means = self.weights * np.sum(np.square(self.means), axis=-1)
        return {
            "class": float(np.sum(np.square(self.class_factor()))),
            "cross": float(np.sum(np.square(self.cross_factor()))),
            "within": float(np.sum((self.squares - of_means)[off])),
            "same": float(np.sum(self.squares[~off])),
        }

    def eigenvalues(self, part: str) -> np.ndarray:
        """The eigenvalues of G_class or G_cross that are not zero, descending."""
        if part not in ("class", "cross"):
            raise ValueError(f"part={part!r} is unknown; write 'class' or 'cross'")
        factor = self.class_factor() if part == "class" else self.cross_factor()
        factor = factor.reshape(-1, factor.shape[-1])
        return np.square(np.linalg.svd(factor, compute_uv=False))

    def frame(self) -> pd.DataFrame:
        """A row for each part's trace and each eigenvalue of class and cross part."""
        rows = [("trace", part, 0, value) for part, value in self.traces().items()]
        for part in ("class", "cross"):
            rows += [
                ("eigenvalue", part, i, float(value))
                for i, value in enumerate(self.eigenvalues(part))
            ]
        return pd.DataFrame(rows, columns=["quantity", "part", "index", "value"])

    def _cross_weights(self) -> np.ndarray:
        return np.where(np.eye(len(self.weights), dtype=bool), 0, self.weights)


def class_structure(
    objective: Objective,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    n_classes: int,
) -> ClassStructure:
    """Decomposes the Gauss-Newton matrix by classes.

    Args:
      objective: separable, with the cross-entropy as criterion; a penalty is left out.
      params: where it is taken.
      masks: what is active; None: everything.
      batches: of `label` int [b] and whatever the logits need; the Jacobians of a
        batch, examples x logits x parameters, are in memory at once.
      n_classes: C, the number of logits.

    Guarantees:
      - The four parts add up to the Gauss-Newton matrix.

    Raises:
      ValueError: logits of an example depend on the others.
    """
    if not objective.separable:
        raise ValueError(
            "norms='batch' makes logits depend on the other examples of a batch; "
            "give an objective with norms='frozen'"
        )
    space = active_space(params, masks)
    n = batches_lib.total(batches)

    @jax.jit
    def sums(params, batch):
        def of_one(p, example):
            return objective.logits(p, jax.tree.map(lambda x: x[None], example))[0]

        def of_example(example):
            logits, pull_back = jax.vjp(lambda p: of_one(p, example), params)
            p = jax.nn.softmax(logits)
            to_label = p[None, :] - jnp.eye(n_classes, dtype=p.dtype)
            rows = jax.vmap(lambda u: space.flatten(pull_back(u)[0]))(to_label)
            return p, rows

        with precise():
            p, rows = jax.vmap(of_example)(batch)  # [b c], [b c n]
            own = jax.nn.one_hot(batch["label"], n_classes, dtype=p.dtype)
            return (
                jnp.einsum("bk,bc,bcn->kcn", own, p, rows),
                jnp.einsum("bk,bc->kc", own, p),
                jnp.einsum("bk,bc,bc->kc", own, p, jnp.sum(rows * rows, axis=-1)),
            )

    shape = n_classes, n_classes
    means, weights, squares = (
        np.zeros((*shape, space.n)),
        np.zeros(shape),
        np.zeros(shape),
    )
    for batch in batches:
        found = (np.asarray(x, np.float64) / n for x in sums(params, batch))
        for total, part in zip((means, weights, squares), found, strict=True):
            total += part
    means /= np.where(weights > 0, weights, 1)[..., None]
    return ClassStructure(means, weights, squares)


def plot_class_structure(result: ClassStructure) -> Figure:
    """The traces of the parts, and the eigenvalues of class and cross part."""
    fig, (left, right) = figures.new(1, 2)
    traces = result.traces()
    left.bar(list(traces), list(traces.values()))
    left.set(ylabel="trace")
    for part in ("class", "cross"):
        values = result.eigenvalues(part)
        right.plot(np.arange(1, len(values) + 1), values, "o-", ms=3, label=part)
    right.set(xlabel="index", ylabel="eigenvalue", yscale="log")
    right.set_ylim(bottom=1e-6 * max(result.eigenvalues("class")[0], 1e-30))
    right.legend()
    return fig
