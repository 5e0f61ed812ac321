"""How many weights each layer keeps: uniform, Erdos-Renyi, Erdos-Renyi-kernel.

    uniform        n_l = N_l - floor(s N_l)
    Erdos-Renyi    n_l = N_l - floor((1 - eps p_l) N_l),  one eps for all layers, with

        p_l = (n_in + n_out) / (n_in n_out)    last two dimensions (Erdos-Renyi)
        p_l = sum(dims) / prod(dims)           all dimensions (Erdos-Renyi-kernel)
        eps = [sum_sparse (N_l - floor(s N_l)) - sum_dense floor(s N_l)]
              / sum_sparse p_l N_l

N_l is the size of layer l and s the sparsity. While some eps p_l exceeds 1, every layer
that holds the largest p becomes dense and eps is solved again.

Sources: Mocanu et al., "Scalable training of artificial neural networks with adaptive
sparse connectivity inspired by network science" (2018), methods (Erdos-Renyi); Evci et
al., "Rigging the Lottery" (arXiv 1911.11134), section 3, and the code released with it
(the kernel variant, the dense loop, floor).

All of it is host-side arithmetic on exact fractions: a sparsity means the decimal that
is written (0.98 is 98/100), and no result depends on the order of the layers.
"""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]
"""Layer name -> kernel shape, laid out as (..., in, out)."""


def n_zeros(size: int, sparsity: float) -> int:
    """Number of inactive weights of a layer: floor(sparsity * size), in decimals.

    Args:
      size: number of weights.
      sparsity: fraction of weights removed, in [0, 1).

    Raises:
      ValueError: `sparsity` is outside [0, 1).

    Source: the released code of arXiv 1911.11134.

    Guarantees:
      - A product that is whole in decimals is not lowered by binary rounding.
      - At least one weight of a non-empty layer stays active.
    """
    return math.floor(_decimal("sparsity", sparsity) * size)


def parse_layer_map(text: str) -> dict[str, float]:
    """Reads per-layer sparsities from their config form, 'conv1=0,fc3=0.5'.

    Args:
      text: comma-separated `name=sparsity` items; blanks around items and signs are
        ignored and the empty string gives no layers.

    Raises:
      ValueError: an item is not `name=sparsity`, repeats a layer, or its sparsity is
        not a number in [0, 1).

    Guarantees:
      - Written out as `name=sparsity` items, any result is read back equal.
    """
    result: dict[str, float] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, number = (part.strip() for part in item.rpartition("="))
        if not name or name in result:
            raise ValueError(
                f"layer map item {item!r} must be name=sparsity, each name once: write "
                "for example conv1=0,fc3=0.5"
            )
        _decimal(f"layer map sparsity of {name!r}", number)
        result[name] = float(number)
    return result


def uniform(
    shapes: Shapes,
    sparsity: float,
    *,
    dense: Iterable[str] = (),
    layer_sparsity: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """The same sparsity in every layer that has none of its own.

    Args:
      shapes: layer name -> kernel shape (..., in, out).
      sparsity: fraction of weights removed, in [0, 1).
      dense: names of the layers that keep all their weights.
      layer_sparsity: layer name -> its own sparsity, in [0, 1).

    Returns:
      Layer name -> number of active weights, in the order of `shapes`.

    Raises:
      ValueError: a sparsity outside [0, 1); a layer that is unknown, empty, or both
        in `dense` and sparse in `layer_sparsity`; no layer left for `sparsity`.

    Source: arXiv 1911.11134, section 3.

    Guarantees:
      - Every layer keeps between one and all of its weights.
      - A layer in `dense` keeps all; one in `layer_sparsity` gets exactly its own.
      - A higher sparsity leaves no layer with more weights.
      - The order of `shapes` does not matter.
    """
    sizes, own = _resolve(shapes, sparsity, dense, layer_sparsity)
    default = _decimal("sparsity", sparsity)
    return {
        name: size - math.floor(own.get(name, default) * size)
        for name, size in sizes.items()
    }


def erdos_renyi(
    shapes: Shapes,
    sparsity: float,
    *,
    power: float = 1.0,
    dense: Iterable[str] = (),
    layer_sparsity: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Number of active weights by the last two dimensions (ER).

    Arguments, errors, source and guarantees are those of `solve_erdos_renyi`.
    """
    options = dict(power=power, dense=dense, layer_sparsity=layer_sparsity)
    return solve_erdos_renyi(shapes, sparsity, kernel=False, **options).n_active


def erdos_renyi_kernel(
    shapes: Shapes,
    sparsity: float,
    *,
    power: float = 1.0,
    dense: Iterable[str] = (),
    layer_sparsity: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Number of active weights by all dimensions (ERK).

    Arguments, errors, source and guarantees are those of `solve_erdos_renyi`.
    """
    options = dict(power=power, dense=dense, layer_sparsity=layer_sparsity)
    return solve_erdos_renyi(shapes, sparsity, kernel=True, **options).n_active


DISTRIBUTIONS = {
    "uniform": uniform,
    "erdos_renyi": erdos_renyi,
    "erdos_renyi_kernel": erdos_renyi_kernel,
}


class ErdosRenyi(NamedTuple):
    """A solved Erdos-Renyi distribution.

    Attributes:
      eps: the common factor of the raw probabilities (0 if no layer is left to share).
      sparsity: layer name -> fraction of weights removed, before rounding to counts.
      dense: names of the layers that the solution made dense, in the order of `shapes`
        (those that the caller asked to be dense are not among them).
      n_active: layer name -> number of active weights, in the order of `shapes`.
    """

    eps: float
    sparsity: dict[str, float]
    dense: tuple[str, ...]
    n_active: dict[str, int]


def solve_erdos_renyi(
    shapes: Shapes,
    sparsity: float,
    *,
    kernel: bool,
    power: float = 1.0,
    dense: Iterable[str] = (),
    layer_sparsity: Mapping[str, float] | None = None,
) -> ErdosRenyi:
    """Solves the module's equation for eps, the sparsities and the counts.

    Args:
      shapes: layer name -> kernel shape (..., in, out).
      sparsity: fraction of weights removed from the layers that share it, in [0, 1).
      kernel: take p_l from all dimensions (ERK) instead of the last two (ER).
      power: exponent of p_l; below 1 softens, 0 gives every layer the same sparsity.
      dense: names of the layers that keep all their weights, outside the budget: the
        others are as sparse as if those did not exist.
      layer_sparsity: layer name -> its own sparsity, in [0, 1); outside the budget too.

    Raises:
      ValueError: as in `uniform`; a power that is negative, not finite, or so large
        that a layer would keep nothing.

    Source: arXiv 1911.11134, section 3, with the loop of the code released with it.

    Guarantees:
      - Every layer keeps between one and all of its weights.
      - A layer in `dense` keeps all; one in `layer_sparsity` gets exactly its own.
      - The layers inside the budget keep together at least what `uniform` gives them,
        and exceed it by fewer weights than they are layers.
      - A higher sparsity leaves no layer with more weights.
      - The order of `shapes` does not matter.
    """
    sizes, exact = _resolve(shapes, sparsity, dense, layer_sparsity)
    raw = {
        name: _raw_probability(name, shape if kernel else shape[-2:], power)
        for name, shape in shapes.items()
        if name not in exact
    }
    budget = sum(sizes[name] - n_zeros(sizes[name], sparsity) for name in raw)

    # A dense layer takes its whole size from the budget, less than the eps p N > N that
    # it would have had: so eps only grows, and the last layer left always fits.
    shared, eps, saturated = set(raw), Fraction(0), set[str]()
    while shared:
        rest = budget - sum(sizes[name] for name in saturated)
        eps = Fraction(rest) / sum(raw[name] * sizes[name] for name in shared)
        largest = max(raw[name] for name in shared)
        if eps * largest <= 1:
            break
        saturated |= {name for name in shared if raw[name] == largest}
        shared -= saturated

    exact |= {name: 1 - eps * raw[name] for name in shared}
    exact |= dict.fromkeys(saturated, Fraction(0))
    return ErdosRenyi(
        eps=float(eps),
        sparsity={name: float(exact[name]) for name in sizes},
        dense=tuple(name for name in sizes if name in saturated),
        n_active={n: size - math.floor(exact[n] * size) for n, size in sizes.items()},
    )


def _raw_probability(name: str, dims: tuple[int, ...], power: float) -> Fraction:
    """(sum / product of the dimensions) ** power, exact where the power is 1."""
    if not (math.isfinite(power) and power >= 0):
        raise ValueError(
            f"power={power} must be finite and at least 0: write 1 for the plain "
            "distribution or a value below 1 for a softer one"
        )
    ratio = Fraction(sum(dims), math.prod(dims))
    raw = ratio if power == 1 else Fraction(float(ratio) ** power)
    if raw == 0:
        raise ValueError(
            f"layer {name!r} of {math.prod(dims)} weights would keep nothing at "
            f"power={power}: lower the power or give the layer its own sparsity"
        )
    return raw


def _resolve(
    shapes: Shapes,
    sparsity: float,
    dense: Iterable[str],
    layer_sparsity: Mapping[str, float] | None,
) -> tuple[dict[str, int], dict[str, Fraction]]:
    """Checks the arguments; gives all sizes, and the sparsities of the layers' own."""
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"layer {name!r} of shape {shape} would keep nothing: give a kernel "
                "shape (..., in, out) without empty dimensions or leave the layer out"
            )
    own = {
        name: _decimal(f"layer_sparsity of {name!r}", value)
        for name, value in (layer_sparsity or {}).items()
    }
    for name in dense:
        if own.setdefault(name, Fraction(0)) != 0:
            raise ValueError(
                f"layer {name!r} is named in dense but has layer_sparsity "
                f"{float(own[name])}: remove it from one of them"
            )
    if unknown := sorted(own.keys() - shapes.keys()):
        raise ValueError(
            f"dense or layer_sparsity names unknown layers {unknown}: choose from "
            f"{sorted(shapes)}"
        )
    if _decimal("sparsity", sparsity) > 0 and len(own) == len(shapes):
        raise ValueError(
            f"sparsity={sparsity} has no layer left to carry it, as each of "
            f"{sorted(shapes)} is dense or has its own: free one or write sparsity=0"
        )
    return {name: math.prod(shape) for name, shape in shapes.items()}, own


def _decimal(argument: str, value: float | str) -> Fraction:
    """The decimal that a sparsity prints as, or an error that names the argument."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(
            f"{argument} is {value!r} but must lie in [0, 1): write the fraction of "
            "weights to remove, such as 0.8"
        )
    return Fraction(repr(number))
