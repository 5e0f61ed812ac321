"""How the linear layers of a run are computed: dense, or by their active weights.

`train.execution=auto` measures each layer once, when the run begins, and keeps what it
chose in `<run>/execution.json`: a run that goes on computes as before. The plans, where
active weights lie, follow from the masks; they are built on the host when training
begins and after each rewire, and are no part of the state. Whatever needs more than the
gradient of a step (rewires, probes, evaluation, analysis) computes densely.
"""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lottery_flow import options
from lottery_flow.errors import UserError
from lottery_flow.job import Job
from lottery_flow.runs import read_object, write_atomically
from lottery_flow.sparsity import execution_choice, rules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.execution_structure import structure_on_host
from lottery_flow.sparsity.masks import Masks, Params

_LOG = logging.getLogger(__name__)


def choose(job: Job, params: Params, masks: Masks, record: Path) -> dict[str, str]:
    """The path of each linear layer, {} where all of them are dense.

    Args:
      job: of the run; `job.execution` is `train.execution`.
      params: of its network.
      masks: with as many active weights as throughout the training.
      record: the file that `keep` wrote, if the run goes on.

    Raises:
      UserError: a layer or path that does not exist; a damaged record.
    """
    if job.execution == "dense":
        return {}
    kernels = {
        name: tuple(leaf.shape)
        for name, leaf in masks_lib.layers(params).items()
        if len(leaf.shape) == 2
    }
    if record.exists():
        return _kept(record, kernels)
    masked = {k for k, m in masks_lib.named_leaves(masks).items() if m is not None}
    counts = masks_lib.counts(masks, params)
    override = {}
    if job.execution != "auto":  # nothing is left to a measurement
        asked = options.parse("train.execution", job.execution)
        override = dict.fromkeys(kernels, "dense") | asked
    sizes = kernels, {k: counts[k] for k in kernels if k in masked}, job.batch_size
    # Images need no gradient.
    first = {
        "without_dx": [k for k in list(kernels)[:1] if len(kernels) == len(counts)]
    }
    try:
        paths = execution_choice.choose(
            *sizes, **first, dense_grads=rules.watches(job.rule), override=override
        )
    except ValueError as error:
        raise UserError(f"train.execution: {error}") from error
    for name, path in paths.items():
        if path != "dense" and name not in masked:
            raise UserError(
                f"train.execution: {name} has no inactive weights; write dense for it"
            )
    if job.execution == "auto":
        table = execution_choice.table(*sizes, paths, **first)
        _LOG.info("how linear layers are computed, in ms:\n%s", table)
    return paths


def _kept(record: Path, kernels: Collection[str]) -> dict[str, str]:
    """The paths that `keep` wrote."""
    try:
        found = read_object(record)
    except ValueError:
        found = {}
    whole = found.keys() == set(kernels)
    if not whole or any(v not in execution_choice.PATHS for v in found.values()):
        raise UserError(f"{record} is damaged; delete it to choose anew")
    return found


def keep(paths: Mapping[str, str], record: Path) -> None:
    """Writes what was chosen, for when the run goes on."""
    if paths and not record.exists():
        write_atomically(record, json.dumps(paths, indent=1) + "\n")


def of_masks(paths: Mapping[str, str], masks: Masks) -> dict[str, Any]:
    """The plans of `Model.apply`: a collection for each path, by layer name."""
    named, found = masks_lib.named_leaves(masks), {}
    for name, path in paths.items():
        if path != "dense":
            mask = np.asarray(jax.device_get(named[name]))
            found.setdefault(path, {})[name] = structure_on_host(mask)
    return found
