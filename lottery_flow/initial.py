"""The network before the first step, as a configuration asks for it.

Masks are random, full, those of an earlier run, or chosen by pruning at initialisation
(`sparsity.at_init`), which scores the weights that the network would have without
masks. It keeps those weights, unless sparsity.fresh_weights draws them anew.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lottery_flow import checkpoint, draw, method
from lottery_flow import data as data_lib
from lottery_flow.errors import UserError
from lottery_flow.models import Model
from lottery_flow.sparsity import at_init, at_init_checks, at_init_scores
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Params
from lottery_flow.steps import normalize

# Of the examples that are scored: few enough for per-example gradients.
_BATCH = 100


def network(
    config: ConfigDict,
    model: Model,
    spec: data_lib.Spec,
    shapes: Any,
    n_active: Mapping[str, int],
    seed: int,
    dataset: data_lib.Dataset | None = None,
) -> checkpoint.Network:
    """The network of a configuration and a seed.

    Args:
      config: all fields, checked.
      model, spec: of the network and the data set.
      shapes: of its parameters.
      n_active: weights that each layer shall have.
      seed: of the run.
      dataset: that pruning at initialisation takes its examples from.

    Raises:
      UserError: the run that masks or weights come from is missing or of another
        model; no examples where they are needed.
    """
    sparsity, key = config.sparsity, jax.random.key(seed)
    masks = source = None
    if sparsity.masks_from:
        masks = _source(config, "masks", seed, shapes).masks
        if not jax.tree.leaves(masks):
            raise UserError(
                f"sparsity.masks_from={sparsity.masks_from!r} is a dense network "
                "without masks; give a sparse run, or leave it empty"
            )
    if sparsity.weights_from:
        source = _source(config, "weights", seed, shapes)
    recipe = draw.Recipe(
        model_init=model.init,
        init=config.model.init,
        init_options=tuple(init_options(config).items()),
        n_active=tuple(n_active.items()),
        full_masks=method.starts_full(config),
        shuffle_masks=sparsity.shuffle_masks,
        granularity=method.granularity(config),
        # Under masks of a run with the same seed the usual draw would be that run's
        # own: not a fresh initialisation, but its lottery ticket.
        fresh=sparsity.fresh_weights or masks is not None,
    )
    taken = None if source is None else (source.params, source.batch_stats)
    if sparsity.at_init:
        masks = _prune(config, recipe, model, spec, key, taken, dataset)
    return draw.draw(recipe, key, masks, taken)


def init_options(config: ConfigDict) -> dict[str, Any]:
    """What a configuration asks of its initialisation, beside the init's own."""
    options = {
        "fan": config.model.init_fan,
        "distribution": config.model.init_distribution,
        "gain": config.model.init_gain,
    }
    return {k: v for k, v in options.items() if v}


def _prune(config, recipe, model, spec, key, taken, dataset):
    """Masks by the method of `sparsity.at_init`."""
    whole = recipe._replace(full_masks=True, shuffle_masks=False, fresh=False)
    dense = draw.draw(whole, key, None, taken)
    chosen = method.at_init(config)
    masks_key = jax.random.fold_in(key, draw.MASKS)
    # Norms that start at zero would hide what is behind them.
    params = at_init_checks.open_branches(masks_key, dense.params)
    if taken is None:
        scored = _fresh(model.init, model.apply, spec)
    else:
        scored = partial(_scored, model.apply, spec, taken[1])
    constant = 1.0
    if chosen.score is at_init_scores.synflow:
        constant = _constant(scored, params)
    asked = dict(recipe.n_active)
    try:
        return at_init.prune_at_init(
            chosen,
            masks_key,
            params,
            dense.masks,
            scored(constant),
            _batches(config, chosen, spec, dataset),
            {name: asked[name] for name in masks_lib.count(dense.masks)},
        )
    except ValueError as error:
        raise UserError(f"sparsity.at_init: {error}") from error


def _batches(config, chosen, spec, dataset):
    """The first training images, as many as the method scores."""
    n = min(chosen.n_examples, spec.n_train)
    if n and dataset is None:
        raise UserError(
            f"sparsity.at_init={config.sparsity.at_init!r} scores training images; "
            "give the data set"
        )
    cuts = [*range(0, n, _BATCH), n] if n else []
    return [
        jax.tree.map(jnp.asarray, data_lib.examples(dataset, "train", *ends))
        for ends in itertools.pairwise(cuts)
    ]


def _constant(scored: Callable, params: Params) -> float:
    """The largest input to all units for which SynFlow's sum is a float32.

    Without biases it changes all scores by the same factor.
    """
    sizes = jax.tree.map(jnp.abs, params)
    for exponent in range(0, 33, 8):
        constant = 10.0**-exponent
        if bool(jnp.all(jnp.isfinite(jax.jit(scored(constant).ones)(sizes)))):
            return constant
    return 1.0  # which says so


@lru_cache(maxsize=8)
def _fresh(init: Callable, apply: Callable, spec: data_lib.Spec) -> Callable:
    """`_scored` of a network that was never trained; one value for all seeds."""
    variables = jax.jit(init)(jax.random.key(0))
    stats = variables.get("batch_stats", {})
    return lru_cache(maxsize=8)(partial(_scored, apply, spec, stats))


def _scored(
    apply: Callable, spec: data_lib.Spec, stats: Any, constant: float
) -> at_init_scores.Network:
    """What is scored, in evaluation mode with these running statistics."""

    def logits(params, batch):
        images = normalize(batch["image"], spec.mean, spec.std)
        return apply(params, stats, images, False)[0]

    def criterion(z, batch):
        labels = batch["label"]
        return optax.softmax_cross_entropy_with_integer_labels(z, labels)

    def ones(params):
        images = jnp.full((1, *spec.image_shape), constant, jnp.float32)
        return apply(params, stats, images, False)[0]

    return at_init_scores.Network(logits, criterion, ones)


def _source(config, what: str, seed: int, params) -> checkpoint.Network:
    """The network that `masks` or `weights` come from, of the shapes of `params`."""
    directory = config.sparsity[f"{what}_from"].replace("{seed}", str(seed))
    step = config.sparsity[f"{what}_step"]
    field = f"sparsity.{what}_from={directory!r}"
    try:
        _, found = checkpoint.restore_network(Path(directory) / "checkpoints", step)
        own, other = (
            {k: v.shape for k, v in masks_lib.named_leaves(tree).items()}
            for tree in (params, found.params)
        )
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    for name in sorted(own.keys() | other.keys()):
        if own.get(name) != other.get(name):
            raise UserError(
                f"{field}: {name} has shape {other.get(name)} there and "
                f"{own.get(name)} here; give a run of the same model"
            )
    return found
