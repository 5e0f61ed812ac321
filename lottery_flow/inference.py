"""Exported networks as functions that cost by their active weights.

    net = inference.load("rigl.model", batch_size=16)
    logits = net.apply(net.variables, images)          # uint8 [b h w c] -> [b classes]

A layer is multiplied by in compressed rows, its dense kernel gone from memory, where
that was measured to be faster for batches of that size on this machine, and the whole
network is, too; all others are dense. The logits are those of the masked network up to
rounding. See `sparsity.execution`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow import export, models
from lottery_flow.sparsity import execution_choice
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.execution import compress
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.steps import normalize

EXECUTIONS = ("auto", "dense", "compressed")


class Inference(NamedTuple):
    """A network ready to use.

    Attributes:
      apply: `(variables, images) -> logits`, compiled; images uint8 [b h w c].
      variables: the network; kernels of compressed layers are there in that form alone.
      compressed: names of those layers.
    """

    apply: Any
    variables: dict[str, Any]
    compressed: list[str]


def load(
    path: str | Path, *, batch_size: int = 1, execution: str = "auto"
) -> Inference:
    """The network of a file that `python -m lottery_flow.export` wrote.

    Args:
      path: of the file.
      batch_size: of images that it will see, for which layers are measured.
      execution: "auto"; "dense", or all sparse layers "compressed".

    Raises:
      ValueError: a damaged file, or one without a description of its network, as a
        direct call of `export.save` writes it: use `make` for that.
    """
    found = export.load(path)
    try:
        about = json.loads(found.about["model"])
        own = {k: _frozen(v) for k, v in about["options"].items()}
        shape = _frozen(about["image_shape"])
        model = models.create(about["name"], shape, about["n_classes"], **own)
        mean, std = _frozen(about["mean"]), _frozen(about["std"])
    except (
        *(AttributeError, KeyError, TypeError, ValueError, OverflowError),
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} does not say what network it holds; give its model to "
            "inference.make"
        ) from error
    return make(
        *(model, found.params, found.masks, found.batch_stats),
        image_shape=shape,
        mean=mean,
        std=std,
        batch_size=batch_size,
        execution=execution,
    )


def make(
    model: models.Model,
    params: Params,
    masks: Masks,
    batch_stats: Any,
    *,
    image_shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 1,
    execution: str = "auto",
) -> Inference:
    """A network as a function of images.

    Args:
      model: see `models`.
      params: sparse; inactive weights are zero.
      masks: of the same structure, None where a leaf is dense.
      batch_stats: running statistics of norms, {} without any.
      image_shape: (h, w, c).
      mean: of each channel, as a fraction of 255, see `steps.normalize`.
      std: likewise.
      batch_size: see `load`.
      execution: see `load`.

    Raises:
      ValueError: an unknown `execution`; parameters of another network.
    """
    if execution not in EXECUTIONS:
        raise ValueError(
            f"execution={execution!r}: choose one of {', '.join(EXECUTIONS)}"
        )
    named, leaves = masks_lib.named_leaves(masks), masks_lib.named_leaves(params)
    for name, layer in model.layers.items():
        found = np.shape(leaves[name]) if name in leaves else "none"
        if found != layer.kernel_shape:
            raise ValueError(
                f"the model's kernel {name} has the shape {layer.kernel_shape}, that "
                f"of the parameters: {found}; give those of this model"
            )
    n_active = {
        name: int(np.count_nonzero(named[name]))
        for name in model.layers
        if named[name] is not None
    }

    # Once, for all choices.
    params, batch_stats = jax.tree.map(jnp.asarray, (params, batch_stats))

    @jax.jit
    def apply(variables, images):
        logits, _ = model.apply(
            variables["params"],
            variables["batch_stats"],
            normalize(images, mean, std),
            train=False,
            plans={"compressed": variables["compressed"]},
        )
        return logits

    def of(names):
        return _variables(params, masks, batch_stats, names)

    if execution != "auto":
        names = list(n_active) if execution == "compressed" else []
        return Inference(apply, of(names), names)
    times = {
        name: execution_choice.measure_forward(model.layers[name], n, batch_size)
        for name, n in n_active.items()
    }
    choices: list[list[str]] = [[]]
    for margin in execution_choice.MARGIN, execution_choice.CLEARLY:
        names = [k for k, (dense, own) in times.items() if own <= (1 - margin) * dense]
        if names not in choices:
            choices.append(names)
    images = jnp.zeros((batch_size, *image_shape), jnp.uint8)
    variables = [of(names) for names in choices]
    best, _ = execution_choice.best_of(apply, [(own, images) for own in variables])
    return Inference(apply, variables[best], choices[best])


def _variables(params, masks, batch_stats, names) -> dict[str, Any]:
    """The network, with the kernels of some layers compressed."""

    def walk(params, masks, path):
        kept: dict[str, Any] = {}
        for key, value in params.items():
            name = "/".join(path)
            if isinstance(value, Mapping):
                kept[key] = walk(value, masks[key], (*path, key))
            elif key == "kernel" and name in names:
                compressed[name] = compress(value, masks[key])
            else:
                kept[key] = value
        return kept

    compressed: dict[str, Any] = {}
    kept = walk(params, masks, ())
    return {"params": kept, "batch_stats": batch_stats, "compressed": compressed}


def _frozen(value: Any) -> Any:
    """Lists of JSON as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
