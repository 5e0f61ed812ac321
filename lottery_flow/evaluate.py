"""Whole-split evaluation: exact means, whatever the batch size."""

from collections.abc import Callable, Iterable

from lottery_flow.state import TrainState
from lottery_flow.steps import Batch


def evaluate(
    evaluate_step: Callable, state: TrainState, batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean loss (nats) and accuracy (fraction) over all examples of the batches.

    Args:
      evaluate_step: `Steps.evaluate`; returns weighted sums.
      state: the network.
      batches: of one shape, the last one padded with examples of weight 0.
    """
    # Dispatch all batches before the first read, and add on the host in float64.
    sums = [evaluate_step(state, batch) for batch in batches]
    total = {k: sum(float(s[k]) for s in sums) for k in ("loss", "hits", "weight")}
    return {
        "test_loss": total["loss"] / total["weight"],
        "test_accuracy": total["hits"] / total["weight"],
    }
