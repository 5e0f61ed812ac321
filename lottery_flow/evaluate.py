"""Whole-split evaluation: exact means, whatever the batch size."""

from collections.abc import Iterable
from typing import Any

import jax

from lottery_flow.population import Population
from lottery_flow.steps import Batch


def evaluate(
    population: Population, state: Any, batches: Iterable[Batch]
) -> list[dict[str, float]]:
    """Mean loss (nats) and accuracy (fraction) over all examples, for each member.

    Both also of the running average of the weights, where there is one.

    Args:
      population: see there; its `evaluate` returns weighted sums.
      state: of the population.
      batches: of one shape, the last one padded with examples of weight 0.
    """
    # Each is read when the next one is on its way, so that neither the device waits nor
    # all batches must fit on it at once; added on the host in float64.
    by_batch, before = [], None
    for batch in batches:
        dispatched = population.evaluate(state, batch)
        if before is not None:
            by_batch.append(jax.device_get(population.split(before)))
        before = dispatched
    by_batch.append(jax.device_get(population.split(before)))
    means = []
    for sums in zip(*by_batch, strict=True):
        total = {k: sum(float(s[k]) for s in sums) for k in sums[0]}
        weight = total.pop("weight")
        means.append({k: value / weight for k, value in total.items()})
    return means
