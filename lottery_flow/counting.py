"""Operations, bytes and training cost of sparse networks.

    operations  = 2 n P + c_out P      one layer, one image
                  multiplications n P + c_out P (the ReLU), additions
                  (n - c_out) P + c_out P (the bias)
    bits        = 32 n + N [n < N] + 32 c_out         one layer
    training    = m (3 f T + 2 f + 1) / (3 (T + 1))   RigL, relative to dense training
                  m f                                 fixed mask, SET, gradual pruning

n of the layer's N weights are active; P is the number of output positions of the layer
(height times width, 1 for a dense layer); f the operations for inference relative to
the dense network, T the steps between two rewires, m the length of training relative to
the dense run.

Sources: the counting rules of the MicroNet Challenge (google-research,
`micronet_challenge/counting.py`), written there as v = kh kw c_in (1 - s) and
P c_out outputs, so that n = v c_out. The training cost is that of Evci et al., "Rigging
the Lottery" (arXiv 1911.11134), appendix on FLOPs: a step costs a forward pass and, for
the gradients of activations and of weights, one more each: 3 f. One step in T + 1 takes
the gradient of all weights, active or not: 2 f + 1.

Every layer counts as one with bias and ReLU. Normalisation, pooling, residual sums, the
softmax and attention's products of activations are not counted. The published tables
take n = N (1 - s), not rounded.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

Shapes = Mapping[str, tuple[int, ...]]
"""Layer name -> kernel shape, laid out as (..., in, out)."""

Counts = Mapping[str, float | int]
"""Layer name -> number of active weights, whole or as size times density."""


def inference_flops(
    shapes: Shapes,
    positions: Mapping[str, int],
    n_active: Counts | None = None,
) -> dict[str, float]:
    """Multiplications plus additions of each layer for one image.

    Args:
      shapes: layer name -> kernel shape (..., in, out).
      positions: layer name -> number of output positions per image.
      n_active: layer name -> number of active weights; None counts the dense network.

    Raises:
      ValueError: a layer lacks its positions or its count, or the count is outside
        [0, size].

    Source: `micronet_challenge/counting.py`; a grouped or depthwise convolution follows
    the same rule, its kernel being (kh, kw, c_in / groups, c_out).
    """
    active = _active(shapes, n_active)
    _check_names("positions", shapes, positions)
    return {
        name: float((2 * active[name] + shape[-1]) * positions[name])
        for name, shape in shapes.items()
    }


def model_megabytes(shapes: Shapes, n_active: Counts | None = None) -> float:
    """Size of the model in megabytes (10^6 bytes).

    32 bits for each active weight and each bias, and for a layer that is not dense one
    bit per element to say which are active.

    Args:
      shapes: layer name -> kernel shape (..., in, out).
      n_active: layer name -> number of active weights; None counts the dense network.

    Raises:
      ValueError: a layer lacks its count, or the count is outside [0, size].

    Source: `micronet_challenge/counting.py`.
    """
    active = _active(shapes, n_active)
    bits = 0.0
    for name, shape in shapes.items():
        size = math.prod(shape)
        bit_mask = size if active[name] < size else 0
        bits += 32 * active[name] + bit_mask + 32 * shape[-1]
    return bits / 8e6


def training_flops(
    f: float | Sequence[float],
    interval: int | None = None,
    length_multiplier: float = 1.0,
) -> float:
    """Operations of a training run relative to one dense run.

    Args:
      f: operations for inference relative to the dense network; several values, one
        for each of equal parts of the run, are averaged (gradual pruning).
      interval: steps between two rewires that need the dense gradient (RigL), or None
        where none does (fixed mask, SET, gradual pruning).
      length_multiplier: steps of the run relative to the dense run.

    Raises:
      ValueError: `f` is empty or negative, `interval` is below 1, or
        `length_multiplier` is not positive.

    Source: arXiv 1911.11134, appendix on FLOPs.
    """
    ratios = list(f) if isinstance(f, Sequence) else [f]
    if not ratios or not all(0 <= ratio < math.inf for ratio in ratios):
        raise ValueError(
            f"f={f} must be one or more ratios of at least 0: divide the operations of "
            "the sparse network by those of the dense one"
        )
    if interval is not None and interval < 1:
        raise ValueError(
            f"interval={interval} must be at least 1 step: write None for a method "
            "without dense gradients"
        )
    if not 0 < length_multiplier < math.inf:
        raise ValueError(
            f"length_multiplier={length_multiplier} must be positive: write 1 for a "
            "run as long as the dense one"
        )
    mean = fmean(ratios)
    if interval is None:
        return length_multiplier * mean
    cost = 3 * mean * interval + 2 * mean + 1
    return length_multiplier * cost / (3 * (interval + 1))


def dense_training_flops(inference: float, n_steps: int, batch_size: int) -> float:
    """Operations of the dense training run that `training_flops` is relative to.

    Args:
      inference: operations of the dense network for one image.
      n_steps: number of training steps.
      batch_size: images per step.
    """
    return 3.0 * inference * n_steps * batch_size


def _active(shapes: Shapes, n_active: Counts | None) -> Counts:
    """The checked counts; the sizes where none are given."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if n_active is None:
        return sizes
    _check_names("n_active", shapes, n_active)
    for name, size in sizes.items():
        if not 0 <= n_active[name] <= size:
            raise ValueError(
                f"n_active[{name!r}]={n_active[name]} must lie in [0, {size}]: give "
                "the number of active weights of that layer"
            )
    return n_active


def _check_names(argument: str, shapes: Shapes, values: Counts) -> None:
    """Every layer needs a value, and every value a layer."""
    missing = sorted(shapes.keys() - values.keys())
    unknown = sorted(values.keys() - shapes.keys())
    if missing or unknown:
        raise ValueError(
            f"{argument} lacks layers {missing} and has unknown layers {unknown}: give "
            f"one value for each of {sorted(shapes)}"
        )
