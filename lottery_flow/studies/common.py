"""What studies take and give, and how they open networks and data."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from lottery_flow.analysis.curvature import Progress
from lottery_flow.study import Study


class Options(NamedTuple):
    """What a study may be told.

    Attributes:
      against: other runs.
      examples: training images from the first on; 0: all; -1: the study's own number.
      batch_size: 0: the study's own.
      norms: 'frozen', 'batch'; '' the study's own. Paths also know 'recomputed'.
      weight_decay: of the penalty; 0: none.
      mask: which masks the ends of a path get, see `interpolation.masked_ends`.
      train_steps: of a curve, and of all cycles of an AutoNEB together.
      seed: of what a study draws.
      state_file: where long work keeps its state.
      tag: of what it is the state.
      progress: called with (done, all).
    """

    against: tuple[Study, ...] = ()
    examples: int = -1
    batch_size: int = 0
    norms: str = ""
    weight_decay: float = 0.0
    mask: str = "start"
    train_steps: int = 2000
    seed: int = 0
    state_file: Path | None = None
    tag: str = ""
    progress: Progress | None = None


class Findings(NamedTuple):
    """What a study found.

    Attributes:
      tables: results or frames, by what is added to the study's file name.
      figures: likewise.
      text: the gist.
    """

    tables: dict[str, Any]
    figures: dict[str, Figure]
    text: str


def network(
    study: Study, options: Options, norms: str, examples: int, batch_size: int = 0
) -> tuple[Any, Any, Any, Any]:
    """Objective, parameters, masks and training batches; the defaults are a study's."""
    n = options.examples
    if n < 0:
        n = min(examples, study.job.spec.n_train)
    # The examples of a probe in one batch, as in training: norms may see that.
    size = options.batch_size or batch_size or max(n, 1000)
    batches = study.train_batches(n, size)
    objective = study.objective(options.norms or norms, options.weight_decay)
    return objective, device(study.network.params), study.network.masks, batches


def forward_batch(study: Study, options: Options) -> int:
    """Images of a forward pass.

    Where no norm sees their number, it changes nothing but the time: what a small
    network computes of 125 images stays in the cache of a CPU.
    """
    alone = not study.network.batch_stats and jax.default_backend() == "cpu"
    return options.batch_size or (125 if alone else 1000)


def device(params):
    """Parameters of a checkpoint as arrays of jax."""
    return jax.tree.map(jnp.asarray, params)
