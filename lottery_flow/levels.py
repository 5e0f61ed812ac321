"""Runs of iterative pruning: a run for each level, one after another.

    <run>/seed_<N>/level_0/     trains the network under all of its weights
    <run>/seed_<N>/level_1/     its ticket after one round of pruning, and so on

Each level is a run like any other, which ends, resumes and is analysed by itself; what
it starts from follows from the checkpoints of those before. The rounds are those of
`sparsity.tickets`, whose module names the sources. All members of a population train a
level together.
"""

import copy
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lottery_flow import checkpoint, method, options, runs
from lottery_flow.initial import init_options
from lottery_flow.job import Job
from lottery_flow.sparsity import initializers, ticket_weights, tickets
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.distributions import parse_layer_map

_ROUND = 7  # a stream of the run's randomness, beside those of `draw`


def at(config: ConfigDict, level: int) -> ConfigDict:
    """The configuration of a level; of a run without rounds there is level 0 alone."""
    if not config.tickets.rounds:
        return config
    own = copy.deepcopy(config)  # with the references between its fields
    with own.unlocked():
        own.tickets.level = level
    return own.lock()


def with_ticket(config: ConfigDict, job: Job, paths: runs.RunPaths) -> Job:
    """The job of a level, which starts from what the levels before it left."""
    if not config.tickets.level:
        return job
    return job._replace(make_network=partial(_ticket, config, job, paths))


def _ticket(config, job: Job, paths: runs.RunPaths, dataset=None) -> checkpoint.Network:
    """The network that a level above 0 starts from."""
    del dataset
    own, level = config.tickets, config.tickets.level
    key = jax.random.fold_in(jax.random.key(job.seed), _ROUND)

    def network(level: int, step: int) -> checkpoint.Network:
        directory = paths.root.with_name(f"level_{level}") / "checkpoints"
        found = checkpoint.restore_network(directory, step)[1]
        return jax.tree.map(jnp.asarray, found)

    start, final = network(level - 1, 0), network(level - 1, -1)
    masks, start_key = tickets.next_masks(
        jax.random.fold_in(key, level),
        start.masks,
        start.params,
        final.params,
        rate=method.rate_of_round(config),
        criterion=own.criterion,
        scope=own.scope,
        layer_rates=parse_layer_map(own.layer_rates),
    )
    first = network(0, 0)
    source = final if own.rewind != "weights" else network(0, own.rewind_steps)
    init = initializers.INITIALIZERS[config.model.init]

    def fresh(key):
        params_key, init_key = jax.random.split(key)
        drawn = job.model.init(params_key)["params"]
        return init(init_key, drawn, masks, **init_options(config))

    if own.treatment == "reinit":
        params = fresh(start_key)
    else:
        given = {
            "key": lambda: start_key,
            "params": lambda: source.params,
            "masks": lambda: masks,
            "std": lambda: ticket_weights.layer_std(first.params, masks),
        }
        treatment = ticket_weights.TREATMENTS[own.treatment]
        field, text = "tickets.treatment_options", own.treatment_options
        params = options.call(field, treatment, given, text)
    return checkpoint.Network(masks_lib.apply(masks, params), source.batch_stats, masks)
