"""How the layers of a run are computed: dense, or by their active weights.

`train.execution=auto` measures each layer once, when the run begins, then whole steps,
and keeps what it chose in `<run>/execution.json`: a run that goes on computes as
before. The plans, where active weights lie, follow from the masks; they are built on
the host when training begins and after each rewire, and are no part of the state.
Whatever needs more than the gradient of a step (rewires, probes, evaluation, analysis)
computes densely.
"""

import json
import logging
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow import files, options
from lottery_flow.errors import UserError
from lottery_flow.job import Job
from lottery_flow.runs import read_object
from lottery_flow.sparsity import execution_choice, rules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.compact import positions_in
from lottery_flow.sparsity.execution_structure import structure_on_host
from lottery_flow.sparsity.masks import Masks
from lottery_flow.state import TrainState
from lottery_flow.steps import Batch

_LOG = logging.getLogger(__name__)


def choose(job: Job, state: TrainState, record: Path) -> dict[str, str]:
    """The path of each layer that can have a plan, {} where all of them are dense.

    Args:
      job: of the run; `job.execution` is `train.execution`.
      state: of one network, with as many active weights as throughout the training.
      record: the file that `keep` wrote, if the run goes on.

    Raises:
      UserError: a layer or path that does not exist; a damaged record.
    """
    if job.execution == "dense":
        return {}
    layers = job.model.layers
    if record.exists():
        return _kept(record, layers)
    masked = masks_lib.by_layer(state.masks)
    counts = masks_lib.counts(state.masks, state.params)
    n_active = {k: counts[k] for k in layers if k in masked}
    override = {}
    if job.execution in execution_choice.PATHS:
        override = dict.fromkeys(layers, "dense")
        override |= dict.fromkeys(n_active, job.execution)
    elif job.execution != "auto":  # nothing is left to a measurement
        asked = options.parse("train.execution", job.execution)
        override = dict.fromkeys(layers, "dense") | asked
    first = list(layers)[:1]  # images need no gradient
    choose_by = partial(
        *(execution_choice.choose, layers, n_active, job.batch_size),
        without_dx=first,
        dense_grads=rules.watches(job.rule),
        override=override,
    )
    try:
        paths = choose_by()
    except ValueError as error:
        raise UserError(f"train.execution: {error}") from error
    for name, path in paths.items():
        if path != "dense" and name not in masked:
            raise UserError(
                f"train.execution: {name} has no inactive weights; write dense for it"
            )
    if job.execution == "auto":
        table = execution_choice.table(
            layers, n_active, job.batch_size, paths, without_dx=first
        )
        _LOG.info("how layers are computed, in ms:\n%s", table)
        clear = choose_by(margin=execution_choice.CLEARLY)
        paths = _fastest(job, state, [paths, clear])
    return paths


def _fastest(job: Job, state: TrainState, choices: list[dict[str, str]]) -> Any:
    """Of some choices of paths that of the fastest whole step, if it is not dense.

    Between layers that are computed differently activations are turned over, which no
    layer shows on its own.
    """
    dense = dict.fromkeys(choices[0], "dense")
    choices = [dense] + [c for c in choices if c != dense]
    args = state, job.knobs, noise(job), None
    best, ratio = execution_choice.best_of(
        job.make_steps().train,
        [(*args, of_masks(paths, state.masks)) for paths in choices],
    )
    sparse = [name for name, path in choices[best].items() if path != "dense"]
    _LOG.info(
        "computed by their active weights: %s; a step takes %.2f of the time of a "
        "dense one",
        ", ".join(sparse) or "no layers",
        ratio,
    )
    return choices[best]


def noise(job: Job) -> Batch:
    """A batch of noise, for measuring: what is timed does not depend on images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (job.batch_size, *job.spec.image_shape), np.uint8)
    labels = rng.integers(0, job.spec.n_classes, job.batch_size, np.int32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels)}


def _kept(record: Path, layers: Collection[str]) -> dict[str, str]:
    """The paths that `keep` wrote."""
    try:
        found = read_object(record)
    except ValueError:
        found = {}
    whole = found.keys() == set(layers)
    if not whole or any(v not in execution_choice.PATHS for v in found.values()):
        raise UserError(f"{record} is damaged; delete it to choose anew")
    return found


def keep(paths: Mapping[str, str], record: Path) -> None:
    """Writes what was chosen, for when the run goes on."""
    if paths and not record.exists():
        files.write(record, json.dumps(paths, indent=1) + "\n")


def of_masks(
    paths: Mapping[str, str], masks: Masks, *, compact: bool = False
) -> dict[str, Any]:
    """The plans of `Model.apply`: a collection for each path, by layer name.

    With `compact` those of a network as `storage` packs it.
    """
    named = masks_lib.named_leaves(masks)
    if not compact:
        named = {k: named[k] for k, path in paths.items() if path != "dense"}
    found: dict[str, Any] = {"positions": {}} if compact else {}
    for name, mask in jax.device_get(named).items():
        path = paths.get(name, "dense")
        if mask is None:
            continue
        if path != "dense":
            matrix = mask.reshape(-1, mask.shape[-1])
            found.setdefault(path, {})[name] = structure_on_host(matrix)
        if compact and path != "csr_gathered":  # which has them in its structure
            found["positions"][name] = jnp.asarray(positions_in(mask))
    return found
