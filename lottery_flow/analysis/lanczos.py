"""Lanczos with full reorthogonalisation: extreme eigenpairs and the spectral density.

    A Q_k = Q_k T_k + beta_k q_{k+1} e_k^T,      Q_k^T Q_k = I,  T_k tridiagonal
    v^T f(A) v = sum_j w_j f(theta_j)    theta_j: eigenvalues of T_k,
                                         w_j: squared first entries of its eigenvectors

(Golub & Welsch 1969; Golub & Meurant 2010; stochastic Lanczos quadrature: Ubaru, Chen &
Saad 2017; for networks: Ghorbani, Krishnan & Xiao 2019.) Without reorthogonalisation
the vectors lose their orthogonality as soon as an eigenvalue converges, and copies of
that eigenvalue appear; here each new vector is made orthogonal to all others, twice.

The vectors live on the device, the small tridiagonal matrices in float64 on the host.
k vectors of each of s probes take s k n floats.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from lottery_flow.analysis import figures, results
from lottery_flow.analysis.curvature import Operator, Progress, precise
from lottery_flow.files import replacing


class Tridiagonal(NamedTuple):
    """What k steps of Lanczos leave, for s start vectors.

    Attributes:
      basis: [s, k + 1, n], orthonormal rows for each start vector; the first is the
        start vector.
      diagonal: float64 [k, s].
      beside: float64 [k, s], norms beta_1 ... beta_k; the last one belongs to the
        vector that comes next.
    """

    basis: Float[Array, "s k1 n"]
    diagonal: np.ndarray
    beside: np.ndarray

    @property
    def n_steps(self) -> int:
        """Steps done, k."""
        return len(self.diagonal)

    def decompose(self, probe: int) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues (ascending) and eigenvectors (columns) of T_k, in float64."""
        inner = self.beside[:-1, probe]
        matrix = np.diag(self.diagonal[:, probe])
        matrix += np.diag(inner, 1) + np.diag(inner, -1)
        return np.linalg.eigh(matrix)


def start(vectors: Float[Array, "s n"], n_steps: int) -> Tridiagonal:
    """No step done yet, with room for `n_steps`; the vectors are normalised."""
    n_probes, n = vectors.shape
    unit = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    basis = jnp.zeros((n_probes, n_steps + 1, n), vectors.dtype).at[:, 0].set(unit)
    return Tridiagonal(basis, np.zeros((0, n_probes)), np.zeros((0, n_probes)))


def advance(
    operator: Operator, so_far: Tridiagonal, key: Key[Array, ""]
) -> Tridiagonal:
    """One more step for every start vector; takes the place of `so_far`.

    Where the space of a start vector is exhausted, its chain goes on with a new random
    direction and a norm of exactly zero.
    """
    done = so_far.n_steps
    vectors = so_far.basis[:, done]
    products = operator.product(vectors)
    alpha = jnp.sum(vectors * products, axis=1)
    if not bool(jnp.all(jnp.isfinite(alpha))):
        raise ValueError(
            "a product with the operator is not finite; look for parameters or inputs "
            "that are not"
        )
    w, norm = _orthogonalize(so_far.basis, products)
    scale = jnp.linalg.norm(products, axis=1)
    # What rounding leaves of a vector that lies in the space of the others.
    tiny = norm <= 10 * jnp.finfo(w.dtype).eps * scale
    if bool(jnp.any(tiny)):
        fresh = jax.random.normal(jax.random.fold_in(key, done), w.shape, w.dtype)
        fresh, _ = _orthogonalize(so_far.basis, fresh)
        w = jnp.where(tiny[:, None], fresh, w)
        norm = jnp.where(tiny, jnp.zeros_like(norm), norm)
    basis = _append(so_far.basis, w, done + 1)
    return Tridiagonal(
        basis,
        np.concatenate([so_far.diagonal, np.asarray(alpha, np.float64)[None]]),
        np.concatenate([so_far.beside, np.asarray(norm, np.float64)[None]]),
    )


def lanczos(
    operator: Operator,
    vectors: Float[Array, "s n"],
    n_steps: int,
    key: Key[Array, ""],
    *,
    state_file: str | Path | None = None,
    tag: str = "",
    save_every: int = 10,
    progress: Progress | None = None,
) -> Tridiagonal:
    """`n_steps` steps from each of s start vectors, all together.

    Args:
      operator: of `curvature`.
      vectors: start vectors, of any norm but zero.
      n_steps: at most the dimension; more are cut to it.
      key: for directions where a chain is exhausted.
      state_file: an `.npz` to which the state is written now and then, and from which
        an interrupted call goes on; deleted at the end.
      tag: kept in the file; a file of another tag is refused. Say what the operator is
        of, since its first product tells only if it is another one altogether.
      save_every: steps between two writes.
      progress: called with (steps done, all steps).

    Raises:
      ValueError: the file is of another operator or other start vectors.

    Guarantees:
      - Interrupted at any step and called again, it returns the same bits.
    """
    n_steps = min(n_steps, operator.space.n)
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps} must be at least 1")
    state = start(vectors, n_steps)
    path = None if state_file is None else Path(state_file)
    if path is not None and path.exists():
        state = _resume(path, operator, state, tag)
    while state.n_steps < n_steps:
        state = advance(operator, state, key)
        if path is not None and state.n_steps % save_every == 0:
            _save(path, state, tag)
        if progress is not None:
            progress(state.n_steps, n_steps)
    if path is not None:
        path.unlink(missing_ok=True)
    return state


class Eigenpairs(NamedTuple):
    """Eigenvalues and their vectors.

    Attributes:
      values: float64 [k], best first: largest, smallest, or largest by magnitude.
      vectors: [k, n], orthonormal rows, in the space of active parameters.
      residuals: float64 [k], bounds on |A u - theta u|, which bound the errors of the
        values.
      n_products: products with the operator that it took.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    n_products: int

    def frame(self) -> pd.DataFrame:
        """A row for each eigenvalue."""
        return pd.DataFrame(
            {
                "index": np.arange(len(self.values)),
                "eigenvalue": self.values,
                "residual": self.residuals,
            }
        )


def top_eigenpairs(
    operator: Operator,
    k: int,
    key: Key[Array, ""],
    *,
    which: str = "largest",
    tolerance: float = 1e-4,
    max_steps: int = 300,
    progress: Progress | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs.

    Args:
      operator: of `curvature`.
      k: how many; fewer come back where the dimension is smaller.
      key: of the start vector.
      which: 'largest', 'smallest' (the most negative) or 'magnitude'.
      tolerance: on the residuals, relative to the largest eigenvalue by magnitude. The
        error of a value is at most its residual, and in general of its square.
      max_steps: gives up after so many products; look at `residuals`.
      progress: called with (products done, at most).

    An eigenvalue that is there several times is found once, as in every Krylov method
    with one start vector.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(
            f"which={which!r} is unknown; write 'largest', 'smallest' or 'magnitude'"
        )
    n = operator.space.n
    n_steps, k = min(max_steps, n), min(k, n)
    if n_steps < k:
        raise ValueError(f"max_steps={max_steps} must be at least k={k}")
    first = jax.random.normal(key, (1, n), operator.space.dtype)
    state = start(first, min(n_steps, 32))
    while True:
        if state.n_steps == state.basis.shape[1] - 1:  # full; rarely needed
            more = jnp.zeros((1, state.n_steps, n), first.dtype)
            longer = jnp.concatenate([state.basis, more], axis=1)
            state = state._replace(basis=longer)
        state = advance(operator, state, key)
        done = state.n_steps
        if progress is not None:
            progress(done, n_steps)
        last = done == n_steps
        if done < k or not (last or done % 5 == 0):
            continue
        values, vectors = state.decompose(0)
        order = {
            "largest": np.argsort(-values),
            "smallest": np.argsort(values),
            "magnitude": np.argsort(-np.abs(values)),
        }[which][:k]
        residuals = np.abs(state.beside[-1, 0] * vectors[-1, order])
        if last or np.all(residuals <= tolerance * np.max(np.abs(values))):
            basis = np.asarray(state.basis[0, :done], np.float64)
            found = vectors[:, order].T @ basis
            return Eigenpairs(values[order], found, residuals, done)


def plot_top_eigenpairs(result: Eigenpairs) -> Figure:
    """The eigenvalues, with their residuals as error bars."""
    fig, ax = figures.new()
    index = np.arange(1, len(result.values) + 1)
    ax.errorbar(index, result.values, yerr=result.residuals, fmt="o", capsize=3)
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set(xlabel="index", ylabel="eigenvalue")
    return fig


class Density(NamedTuple):
    """A spectral density as a quadrature: sum over j of weight_j delta(x - node_j).

    Attributes:
      nodes: float64 [s, k], for each of s probes.
      weights: float64 [s, k], not negative, of sum 1 for each probe.
      n: dimension of the space.
    """

    nodes: np.ndarray
    weights: np.ndarray
    n: int

    def mean_of(self, fn) -> float:
        """The mean of `fn` over the eigenvalues, tr fn(A) / n."""
        return float(np.mean(np.sum(self.weights * fn(self.nodes), axis=1)))

    def negative(self, tolerance: float = 1e-6) -> float:
        """The share of eigenvalues below -tolerance times the largest by magnitude."""
        bound = -tolerance * np.max(np.abs(self.nodes))
        return self.mean_of(lambda x: (x < bound).astype(np.float64))

    def on_grid(
        self, n_points: int = 1000, width: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The density, each node as a normal curve.

        Args:
          n_points: of the grid, which reaches three widths beyond the nodes.
          width: standard deviation of the curves; a hundredth of the range if None.

        Returns:
          Grid and density, float64 [n_points], which integrates to 1.
        """
        low, high = np.min(self.nodes), np.max(self.nodes)
        if width is None:
            width = max(high - low, np.abs(high), np.abs(low)) / 100 or 1.0
        grid = np.linspace(low - 3 * width, high + 3 * width, n_points)
        curves = np.exp(-0.5 * np.square((grid[:, None] - self.nodes.ravel()) / width))
        curves /= width * np.sqrt(2 * np.pi)
        return grid, curves @ self.weights.ravel() / len(self.nodes)

    def frame(self) -> pd.DataFrame:
        """A row for each node."""
        n_probes, n_nodes = self.nodes.shape
        return pd.DataFrame(
            {
                "probe": np.repeat(np.arange(n_probes), n_nodes),
                "node": self.nodes.ravel(),
                "weight": self.weights.ravel(),
                "n": int(self.n),
            }
        )


def spectral_density(
    operator: Operator,
    key: Key[Array, ""],
    *,
    n_steps: int = 100,
    n_probes: int = 10,
    state_file: str | Path | None = None,
    tag: str = "",
    save_every: int = 10,
    progress: Progress | None = None,
) -> Density:
    """Stochastic Lanczos quadrature from directions uniform on the sphere.

    Args:
      operator: of `curvature`.
      key: of the start vectors.
      n_steps: nodes of each probe.
      n_probes: start vectors; all take a step together.
      state_file, tag, save_every, progress: see `lanczos`.

    Guarantees:
      - For one probe v, the first 2 n_steps - 1 moments are those of v exactly; their
        mean over probes is an unbiased estimate of tr A^m / n.
    """
    if n_probes < 1:
        raise ValueError(f"n_probes={n_probes} must be at least 1")
    shape = n_probes, operator.space.n
    vectors = jax.random.normal(key, shape, operator.space.dtype)
    state = lanczos(
        operator,
        vectors,
        n_steps,
        key,
        state_file=state_file,
        tag=tag,
        save_every=save_every,
        progress=progress,
    )
    decomposed = [state.decompose(i) for i in range(n_probes)]
    nodes = np.stack([values for values, _ in decomposed])
    weights = np.stack([np.square(vectors[0]) for _, vectors in decomposed])
    return Density(nodes, weights, operator.space.n)


def plot_spectral_density(result: Density) -> Figure:
    """The smoothed density on a logarithmic axis."""
    fig, ax = figures.new()
    ax.plot(*result.on_grid())
    ax.set(xlabel="eigenvalue", ylabel="density", yscale="log")
    ax.set_ylim(bottom=0.1 / result.n)
    return fig


@jax.jit
def _orthogonalize(basis, vectors):
    """The part orthogonal to the basis, as unit vectors, and its norm before that."""

    def project(_, w):
        # Rows that are not there yet are zero and take nothing away.
        coefficients = jnp.einsum("skn,sn->sk", basis, w)
        return w - jnp.einsum("skn,sk->sn", basis, coefficients)

    with precise():
        w = jax.lax.fori_loop(0, 2, project, vectors)
    norm = jnp.linalg.norm(w, axis=1)
    safe = jnp.where(norm > 0, norm, jnp.ones_like(norm))
    return w / safe[:, None], norm


@partial(jax.jit, donate_argnums=0)  # of two copies of the basis there is no room
def _append(basis, vectors, i):
    return basis.at[:, i].set(vectors)


def _save(path: Path, state: Tridiagonal, tag: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    basis = np.asarray(state.basis[:, : state.n_steps + 1])
    with replacing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, basis=basis, diagonal=state.diagonal, beside=state.beside, tag=tag)


def _kept(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """What `_save` wrote: arrays and a text; nothing in it can execute code."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as found:
            basis, diagonal, beside = found["basis"], found["diagonal"], found["beside"]
            return basis, diagonal, beside, str(found["tag"])
    except (OSError, *results.UNREADABLE) as error:
        raise ValueError(f"{path} is damaged; move it away to begin anew") from error


def _resume(
    path: Path, operator: Operator, fresh: Tridiagonal, tag: str
) -> Tridiagonal:
    other = f"{path} is of another {{}}; move it away to begin anew"
    basis, diagonal, beside, kept = _kept(path)
    if kept != tag:
        raise ValueError(other.format("network, loss or data"))
    begun = np.asarray(fresh.basis[:, 0])
    if (
        basis.ndim != 3
        or basis.dtype != begun.dtype
        or not np.array_equal(basis[:, 0], begun)
        or basis.shape[1] > fresh.basis.shape[1]
    ):
        raise ValueError(other.format("start vector or number of steps"))
    first = fresh.basis[:, 0]
    products = operator.product(first)
    alpha = np.asarray(jnp.sum(first * products, axis=1), np.float64)
    scale = np.asarray(jnp.linalg.norm(products, axis=1), np.float64)
    if np.any(np.abs(alpha - diagonal[0]) > 1e-3 * scale):
        raise ValueError(other.format("network, loss or data"))
    whole = fresh.basis.at[:, : basis.shape[1]].set(basis)
    return Tridiagonal(whole, diagonal, beside)
