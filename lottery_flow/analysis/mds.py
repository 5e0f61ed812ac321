"""Networks in a plane, with distances as near as can be to those in weight space.

    raw stress = sum_{i<j} (||x_i - x_j|| - d_ij)^2
    stress-1   = sqrt(raw stress / sum_{i<j} ||x_i - x_j||^2)

d_ij: L2 distances between parameters; x_i: points of the plane that make the raw stress
small, found by SMACOF (metric multidimensional scaling; Kruskal 1964, de Leeuw 1977).
Stress-1 is 0 for a perfect picture, about 0.05 for a good and 0.2 for a poor one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.manifold import smacof

from lottery_flow.analysis import figures
from lottery_flow.analysis.geometry import matched
from lottery_flow.sparsity.masks import Params

CHUNK = 2**16  # weights of each network that are in float64 at once


class Embedding(NamedTuple):
    """Networks as points of a plane.

    Attributes:
      labels: str [p], which may repeat: points of one kind.
      positions: float64 [p 2], centred and turned to their principal axes.
      distances: float64 [p p], those that were to be kept.
      stress: the raw stress.
      stress_1: Kruskal's normalised stress.
    """

    labels: np.ndarray
    positions: np.ndarray
    distances: np.ndarray
    stress: float
    stress_1: float

    def frame(self) -> pd.DataFrame:
        """A row for each point."""
        x, y = self.positions.T
        return pd.DataFrame({"label": self.labels, "x": x, "y": y})


def distance_matrix(networks: Sequence[Params]) -> Float[np.ndarray, "p p"]:
    """L2 distances between all pairs of networks.

    Args:
      networks: p parameter trees of the same shapes.

    Returns:
      float64, symmetric, with zeros on its diagonal.

    Raises:
      ValueError: the networks differ in names or shapes.

    Guarantees:
      - Equals the distances of the concatenated float64 leaves, and keeps its relative
        precision between close networks.
      - Copies no more than `CHUNK` weights of each network at a time.
    """
    leaves = matched(networks)
    squares = np.zeros((len(networks), len(networks)))
    for name in leaves[0] if leaves else ():
        flat = [np.ravel(np.asarray(named[name])) for named in leaves]
        for start in range(0, flat[0].size, CHUNK):
            x = np.stack([w[start : start + CHUNK].astype(np.float64) for w in flat])
            for i in range(len(x) - 1):
                squares[i, i + 1 :] += np.sum(np.square(x[i + 1 :] - x[i]), axis=1)
    return np.sqrt(squares + squares.T)


def embed(
    distances: Float[np.ndarray, "p q"],
    labels: Sequence[str] | None = None,
    *,
    n_init: int = 8,
    random_state: int = 0,
) -> Embedding:
    """A plane picture of a matrix of distances.

    Args:
      distances: symmetric, of at least 2 points, with zeros on its diagonal.
      labels: of the points; their numbers if None.
      n_init: random starts, of which the one with the least stress is kept.
      random_state: seed of the starts.

    Raises:
      ValueError: the matrix is not one of distances, all points coincide, or the labels
        are not as many as the points.

    Guarantees:
      - Distances between points of a plane are met, up to the tolerance of SMACOF.
      - The same seed gives the same picture; scaled distances give a scaled picture.
    """
    d = np.asarray(distances, np.float64)
    _check(d)
    d = (d + d.T) / 2  # SMACOF allows rounding errors up to 1e-10 only
    if labels is None:
        labels = [str(i) for i in range(len(d))]
    if len(labels) != len(d):
        raise ValueError(f"labels has {len(labels)} entries for {len(d)} points")
    unit = np.sqrt(np.mean(np.square(d)))  # the tolerance is meant for about one
    # Every option is given: their defaults changed from version to version.
    positions = smacof(
        d / unit,
        metric=True,
        n_components=2,
        n_init=n_init,
        n_jobs=1,
        max_iter=2000,
        eps=1e-9,
        random_state=random_state,
        normalized_stress=False,
    )[0]
    positions = _upright(positions) * unit
    pairs = np.triu_indices(len(d), 1)
    found = np.linalg.norm(positions[:, None] - positions[None], axis=-1)[pairs]
    stress = np.sum(np.square(found - d[pairs]))
    stress_1 = np.sqrt(stress / np.sum(np.square(found)))
    return Embedding(np.array(labels), positions, d, float(stress), float(stress_1))


def plot_embedding(result: Embedding) -> Figure:
    """The points, one colour for each label."""
    fig, ax = figures.new()
    for label in dict.fromkeys(result.labels.tolist()):
        ax.plot(*result.positions[result.labels == label].T, "o", label=label)
    ax.set(title=f"stress-1: {float(result.stress_1):.3f}")
    ax.set_aspect("equal", adjustable="datalim")
    ax.legend(fontsize="small")
    return fig


def _upright(positions):
    """Centred, the longest axis first, the farthest point of each on its plus side."""
    centred = positions - np.mean(positions, axis=0)
    turned = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    farthest = np.argmax(np.abs(turned), axis=0)
    return turned * np.sign(turned[farthest, [0, 1]] + (turned[farthest, [0, 1]] == 0))


def _check(d) -> None:
    square = d.ndim == 2 and d.shape[0] == d.shape[1] and len(d) >= 2
    if not square or not np.all(np.isfinite(d)) or np.any(d < 0):
        raise ValueError(
            f"distances has shape {d.shape}; give a square matrix of two points or "
            "more, finite and nowhere negative"
        )
    if np.any(np.diag(d)) or not np.allclose(d, d.T, rtol=1e-9, atol=0):
        raise ValueError("distances must be symmetric, with zeros on its diagonal")
    if not np.any(d):
        raise ValueError("distances are all zero; give networks that differ")
