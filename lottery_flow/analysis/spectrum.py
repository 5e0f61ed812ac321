"""The exact Hessian of the active parameters, and all its eigenvalues.

    H = G + R        G = mean of J_i^T C_i J_i     R = mean of sum_c s_ic d2 z_ic

J_i is the Jacobian of the logits z_i of example i, C_i and s_i second and first
derivatives of its criterion. G is a product of tall matrices that 10 passes per example
fill; R has no block where the network is linear, for instance within a layer of a ReLU
network, and of two leaves the one with fewer active entries gives the directions, since
R is symmetric. Together this takes a small part of the passes that one product for each
parameter would. Where examples depend on each other (norms with the statistics of the
batch), or where there is a loss alone, H is made of products.

The spectra of sparse networks along training, and before and after a rewire, are those
of Evci et al. 2022 (sec. 4.2); there as here of the mean cross-entropy without penalty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.interpreters.partial_eval import dce_jaxpr
from matplotlib.figure import Figure

from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import figures
from lottery_flow.analysis.batches import Batches
from lottery_flow.analysis.curvature import (
    Operator,
    Progress,
    each,
    explicit,
    hessian,
    precise,
    with_fixed_slopes,
)
from lottery_flow.analysis.objective import LossFn, Objective
from lottery_flow.sparsity.active import ActiveSpace, active_space
from lottery_flow.sparsity.masks import Masks, Params

Network = tuple[Params, Masks | None]  # (params, masks)
# Active parameters whose matrix is small beside a network's activations: 0.5 GB.
_MATRIX = 8000


class Spectrum(NamedTuple):
    """All eigenvalues of a symmetric matrix over the active parameters.

    Attributes:
      eigenvalues: float64, ascending, without those of the dead coordinates.
      n_dead: coordinates whose row is exactly zero: parameters of units that are
        inactive for every example, or of inputs that are always zero. Their zeros are
        not curvature. A penalty gives kernels a row of their own.
    """

    eigenvalues: np.ndarray
    n_dead: int

    def counts(self, tolerance: float = 1e-6) -> dict[str, int]:
        """How many eigenvalues are `negative`, `zero`, `positive`, and `dead`.

        Args:
          tolerance: relative to the largest by magnitude; what is nearer to zero
            counts as zero. In float32 rounding alone makes many of about 1e-7.
        """
        bound = tolerance * np.max(np.abs(self.eigenvalues), initial=0.0)
        negative = int(np.sum(self.eigenvalues < -bound))
        positive = int(np.sum(self.eigenvalues > bound))
        zero = len(self.eigenvalues) - negative - positive
        return {
            "negative": negative,
            "zero": zero,
            "positive": positive,
            "dead": int(self.n_dead),
        }

    def negative_mass(self) -> float:
        """Sum of the magnitudes of negative eigenvalues, over that of all."""
        magnitudes = np.abs(self.eigenvalues)
        return float(np.sum(magnitudes[self.eigenvalues < 0]) / np.sum(magnitudes))

    def frame(self) -> pd.DataFrame:
        """A row for each eigenvalue, those of dead coordinates last."""
        alive, dead = len(self.eigenvalues), int(self.n_dead)
        return pd.DataFrame(
            {
                "index": np.arange(alive + dead),
                "eigenvalue": np.concatenate([self.eigenvalues, np.zeros(dead)]),
                "dead": np.arange(alive + dead) >= alive,
            }
        )


def spectrum(matrix: np.ndarray) -> Spectrum:
    """The eigenvalues of a symmetric matrix, float64 [n n], on the host.

    Raises:
      ValueError: it is not finite.
    """
    if not np.all(np.isfinite(matrix)):
        raise ValueError(
            "the Hessian is not finite; look for parameters or inputs that are not"
        )
    alive = np.any(matrix != 0, axis=1)
    inner = matrix[np.ix_(alive, alive)]
    return Spectrum(np.linalg.eigvalsh(inner), int(np.sum(~alive)))


def exact_spectrum(
    objective: Objective | LossFn,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    block: int | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    """All eigenvalues of `hessian_matrix`."""
    matrix = hessian_matrix(
        objective, params, masks, batches, block=block, progress=progress
    )
    return spectrum(matrix)


def rewire_spectra(
    objective: Objective | LossFn,
    before: Network,
    after: Network,
    batches: Batches,
    *,
    block: int | None = None,
    progress: Progress | None = None,
) -> tuple[Spectrum, Spectrum]:
    """The spectra just before and just after a rewire, on the same batches."""
    options: dict[str, Any] = {"block": block, "progress": progress}
    return (
        exact_spectrum(objective, *before, batches, **options),
        exact_spectrum(objective, *after, batches, **options),
    )


def hessian_matrix(
    objective: Objective | LossFn,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    block: int | None = None,
    progress: Progress | None = None,
    max_n: int = 20_000,
) -> np.ndarray:
    """The Hessian of the mean loss over the active parameters, float64 [n n].

    Args:
      objective: a separable `Objective` is split as above; any other, or a loss
        function `(params, batch) -> scalar`, is differentiated once per direction.
      params: where it is taken.
      masks: what is active; None: everything.
      batches: the Jacobians of a batch, as big as examples x logits x parameters, are
        in memory at once. On a CPU batches of about 50 examples are fastest.
      block: directions taken at once; None: one on a CPU, whose caches hold no more,
        32 elsewhere.
      progress: called with (batches done, all batches).
      max_n: refuses more active parameters than this: the matrix takes 8 n^2 bytes, and
        as much again while it is made.

    Raises:
      ValueError: more active parameters than `max_n`.

    Guarantees:
      - Equals the rows and columns of `jax.hessian` that belong to active parameters.
      - Exactly symmetric.
    """
    space = active_space(params, masks)
    if space.n > max_n:
        raise ValueError(
            f"{space.n} active parameters make a matrix of {8e-9 * space.n**2:.0f} GB; "
            "estimate it by lanczos.spectral_density (density), or raise max_n"
        )
    n = batches_lib.total(batches)
    matrix = np.zeros((space.n, space.n))
    if isinstance(objective, Objective) and objective.separable:
        split, penalty = objective, objective.penalty
        factors = jax.jit(lambda p, batch: _factors(split, space, p, batch))
    else:
        split = factors = penalty = None

    def rest(p, at, batch):
        if split is None:
            return objective(p, batch)
        return with_fixed_slopes(split, at, batch)(p)

    plan = _plan(rest, space, params, batches[0], block)

    def start(batch):
        """Dispatches all of a batch, which runs while another is fetched."""
        made = [rows.make(params, batch) for rows in plan]
        return made, None if factors is None else factors(params, batch)

    def finish(batch, started):
        made, outer = started
        if outer is not None:
            # On the host: its BLAS is faster than XLA's, and an accelerator may round
            # products to fewer bits.
            rows, curved = map(np.asarray, outer)
            np.add(matrix, rows.T @ curved / n, out=matrix)
        _add(matrix, batches_lib.size(batch) / n, plan, made)

    started = start(batches[0])
    for i, batch in enumerate(batches):
        current = started
        if i + 1 < len(batches):
            started = start(batches[i + 1])
        finish(batch, current)
        if progress is not None:
            progress(i + 1, len(batches))
    if penalty is not None:
        own: Any = penalty
        plan = _plan(lambda p, at, _: own(p), space, params, (), block)
        _add(matrix, 1.0, plan, [rows.make(params, ()) for rows in plan])
    return (matrix + matrix.T) / 2


def hessian_operator(
    objective: Objective | LossFn,
    params: Params,
    masks: Masks | None,
    batches: Batches,
    *,
    n_products: int,
    progress: Progress | None = None,
) -> Operator:
    """The Hessian for so many products: as a matrix where making that costs less.

    The products of `curvature.hessian` cost a few gradients each. The matrix of a
    sparse network costs as much as n/30 to n/10 of them (LeNet-5 at 95 % sparsity, a
    CPU), and its products next to nothing.

    Args:
      objective, params, masks, batches: those of `hessian_matrix`.
      n_products: that will be asked for.
      progress: of making the matrix.
    """
    space = active_space(params, masks)
    if space.n <= min(10 * n_products, _MATRIX):
        matrix = hessian_matrix(objective, params, masks, batches, progress=progress)
        return explicit(matrix, space)
    return hessian(objective, params, masks, batches)


def plot_spectrum(*results: Spectrum, labels: tuple[str, ...] = ()) -> Figure:
    """Histograms of eigenvalues, on axes linear near zero and logarithmic beyond."""
    fig, ax = figures.new()
    top = max(np.max(np.abs(r.eigenvalues)) for r in results)
    tail = np.geomspace(1e-6, 1, 60) * top
    edges = np.concatenate([-tail[::-1], tail])
    for i, result in enumerate(results):
        label = labels[i] if labels else None
        ax.hist(result.eigenvalues, edges, histtype="step", label=label)
    ax.set_xscale("symlog", linthresh=1e-5 * top)
    ax.set(xlabel="eigenvalue", ylabel="number", yscale="log")
    if labels:
        ax.legend()
    return fig


def _factors(objective: Objective, space: ActiveSpace, params, batch):
    """Jacobians J of the logits of a batch, and C J, [b c n] as [b * c, n]."""

    def of_one(p, example):
        one = jax.tree.map(lambda x: x[None], example)
        return objective.logits(p, one)[0]

    def jacobian(example):
        logits, pull_back = jax.vjp(lambda p: of_one(p, example), params)
        units = jnp.eye(len(logits), dtype=logits.dtype)
        rows = jax.vmap(lambda u: space.flatten(pull_back(u)[0]))(units)
        one = jax.tree.map(lambda x: x[None], example)
        curvature = jax.hessian(lambda z: objective.criterion(z[None], one)[0])(logits)
        return rows, curvature @ rows

    with precise():
        rows, curved = jax.vmap(jacobian)(batch)
    return rows.reshape(-1, space.n), curved.reshape(-1, space.n)


class _Rows(NamedTuple):
    """How the rows of one group of leaves are computed, and where they belong.

    Attributes:
      own: coordinates of the group, int [g].
      columns: coordinates that the rows reach, int [m].
      make: `(params, batch) -> [g m]`, the rows.
    """

    own: np.ndarray
    columns: np.ndarray
    make: Callable


def _groups(space: ActiveSpace) -> list[list[int]]:
    """The numbers of the leaves of each module: a kernel and its bias, say."""
    placeholder = jax.tree.unflatten(space.treedef, space.shapes)
    groups: dict[Any, list[int]] = {}
    for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(placeholder)):
        groups.setdefault(path[:-1], []).append(i)
    return list(groups.values())


def _coordinates(space: ActiveSpace, leaves: list[int]) -> np.ndarray:
    parts = list(space.layers.values())
    return np.concatenate([np.arange(parts[i].start, parts[i].stop) for i in leaves])


def _plan(fn: Callable, space: ActiveSpace, params, batch, block) -> list[_Rows]:
    """How to compute the Hessian of `fn(params, at, batch)`: each pair of groups once.

    Of a pair the one with fewer active entries gives the directions.
    """
    groups = _groups(space)
    coordinates = [_coordinates(space, group) for group in groups]
    rank = sorted(range(len(groups)), key=lambda g: len(coordinates[g]))
    plan = []
    for i, g in enumerate(rank):
        reached = _reached(fn, space, groups[g], params, batch)
        targets = [leaf for h in rank[i:] for leaf in groups[h] if reached[leaf]]
        if targets and len(coordinates[g]):
            make = jax.jit(_rows(fn, space, groups[g], targets, block))
            plan.append(_Rows(coordinates[g], _coordinates(space, targets), make))
    return plan


def _add(matrix: np.ndarray, weight: float, plan: list[_Rows], made: list) -> None:
    """Adds the rows of one batch, times `weight`, and their columns."""
    for (own, columns, _), rows in zip(plan, made, strict=True):
        others = ~np.isin(columns, own)
        found = weight * np.asarray(rows, np.float64)
        matrix[np.ix_(own, columns)] += found
        matrix[np.ix_(columns[others], own)] += found[:, others].T


def _reached(
    fn: Callable, space: ActiveSpace, group: list[int], params, batch
) -> list[bool]:
    """Which leaves' gradients depend on a group: those of the others do not.

    Read off the program, so it holds for any data: what is linear in a group has a
    gradient in which that group does not occur.
    """
    everything = list(range(len(space.shapes)))
    own = [space.shapes[i] for i in group]

    def product(along, params, batch):
        return _along(fn, space, group, everything, along, params, batch)

    program = jax.make_jaxpr(product)(own, params, batch).jaxpr
    reached = []
    for leaf in everything:
        _, used = dce_jaxpr(program, [i == leaf for i in everything])
        reached.append(any(used[: len(own)]))
    return reached


def _along(fn: Callable, space: ActiveSpace, group, wanted, along, params, batch):
    """How the gradients of the wanted leaves change along directions of a group.

    Differentiates along that group alone, so that what comes before it in the network
    has no derivative to compute.
    """
    leaves = space.treedef.flatten_up_to(params)

    def gradients(moved):
        tree = list(leaves)
        for i, leaf in zip(group, moved, strict=True):
            tree[i] = leaf
        grads = jax.grad(lambda p: fn(p, params, batch))(space.treedef.unflatten(tree))
        found = space.treedef.flatten_up_to(grads)
        return [found[i] for i in wanted]

    return jax.jvp(gradients, ([leaves[i] for i in group],), (along,))[1]


def _rows(
    fn: Callable, space: ActiveSpace, group: list[int], wanted: list[int], block
) -> Callable:
    """See `_Rows.make`."""
    sizes = [part.stop - part.start for part in space.layers.values()]
    ends = np.cumsum([sizes[i] for i in group])

    def make(params, batch):
        def row(number):
            unit = jax.nn.one_hot(number, ends[-1], dtype=space.dtype)
            parts = jnp.split(unit, ends[:-1])
            along = [space.scatter(i, p) for i, p in zip(group, parts, strict=True)]
            found = _along(fn, space, group, wanted, along, params, batch)
            entries = (space.entries(i, f) for i, f in zip(wanted, found, strict=True))
            return jnp.concatenate(list(entries))

        with precise():
            return each(row, jnp.arange(ends[-1]), block)

    return make
