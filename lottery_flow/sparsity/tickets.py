"""Iterative pruning: train, prune, go back, train again.

    level 0        train from w_0 under the first masks; remember w_k
    level l > 0    prune a share of the active weights by what training made of them,
                   then start from  w_k            weight rewinding (k = 0: to w_0)
                                    the final w    learning-rate rewinding, fine-tuning

The loop runs on the host around a `train` of the caller's, which owns data, optimizer
and files. One round is one-shot pruning. Sources: Frankle & Carbin 2019, "The lottery
ticket hypothesis" (k = 0); Frankle et al. 2020, "Linear mode connectivity and the
lottery ticket hypothesis" (k > 0); Renda, Frankle & Carbin 2020, "Comparing rewinding
and fine-tuning" (the ways back).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Key

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity import ticket_criteria, ticket_masks, ticket_weights
from lottery_flow.sparsity.masks import Masks, Params
from lottery_flow.sparsity.ticket_criteria import TicketCriterion
from lottery_flow.sparsity.ticket_masks import Scope
from lottery_flow.sparsity.ticket_weights import Treatment

Rewind: TypeAlias = Literal["weights", "learning_rate", "fine_tune"]
Train: TypeAlias = Callable[[Params, Masks, int], tuple[Params, Params]]
"""`(params, masks, level) -> (final params, params at step k)`."""


class Level(NamedTuple):
    """One level; (start, masks) is its ticket.

    Attributes:
      level: rounds of pruning before it.
      masks: what was active while it trained.
      start: the parameters it started from.
      params: the parameters it ended with.
    """

    level: int
    masks: Masks
    start: Params
    params: Params


def iterative_pruning(
    train: Train,
    params: Params,
    masks: Masks,
    *,
    key: Key[Array, ""],
    n_rounds: int,
    rate: float,
    criterion: str | TicketCriterion = "large_final",
    scope: Scope = "global",
    layer_rates: Mapping[str, float] | None = None,
    rewind: Rewind = "weights",
    treatment: Treatment = ticket_weights.rewind,
) -> Iterator[Level]:
    """Trains and prunes in turn; yields each level when it is trained.

    Args:
      train: `(params, masks, level) -> (final, rewound)`. It keeps inactive weights at
        zero, starts at step `first_step(rewind, level, ...)` of its schedule, and may
        return what it finds on disk instead of training. `rewound`, the parameters at
        step k (`params` itself, if k = 0), is read at level 0 alone.
      params: of step 0.
      masks: of level 0, `masks.full` for a dense network.
      key: a typed key; the round that leads to level l uses `fold_in(key, l)`.
      n_rounds: rounds of pruning; there is one level more.
      rate: fraction of the active weights that a round removes, see `prune_round`.
      criterion: scores from a level's start and its end, see `ticket_criteria`.
      scope: of the ranking.
      layer_rates: layer name -> its own rate.
      rewind: where the next level starts from: the "weights" of step k, or the final
        ones, with a schedule that goes back ("learning_rate") or not ("fine_tune").
      treatment: changes what a level above 0 starts from: one of `ticket_weights` or
        `initializers`.

    Raises:
      ValueError: at once, a negative `n_rounds`, an unknown name, a rate outside
        [0, 1), masks that do not fit the parameters.

    Guarantees:
      - The masks of a level are a subset of those before, with the counts of
        `prune_round`.
      - What a level starts from is zero where it is inactive.
      - A level is trained when it is asked for, so stopping early costs nothing.
    """
    if n_rounds < 0:
        raise ValueError(f"n_rounds={n_rounds}: give 0 or more rounds of pruning")
    _check_rewind(rewind)
    masks_lib.check(masks, params)
    ticket_masks.check_round(masks, rate, scope, layer_rates)
    score_fn = ticket_criteria.named_criterion(criterion)

    def levels() -> Iterator[Level]:
        active, start, anchor = masks, masks_lib.apply(masks, params), None
        for level in range(n_rounds + 1):
            final, rewound = train(start, active, level)
            if level == 0:
                anchor = rewound
            yield Level(level, active, start, final)
            if level < n_rounds:
                active, start_key = next_masks(
                    jax.random.fold_in(key, level + 1),
                    active,
                    start,
                    final,
                    rate=rate,
                    criterion=score_fn,
                    scope=scope,
                    layer_rates=layer_rates,
                )
                source = anchor if rewind == "weights" else final
                start = masks_lib.apply(active, treatment(start_key, source, active))

    return levels()


def next_masks(
    key: Key[Array, ""],
    masks: Masks,
    start: Params,
    final: Params,
    *,
    rate: float,
    criterion: str | TicketCriterion = "large_final",
    scope: Scope = "global",
    layer_rates: Mapping[str, float] | None = None,
) -> tuple[Masks, Key[Array, ""]]:
    """One round of `iterative_pruning`: the masks of the next level.

    Args:
      key: of the round.
      masks: of the level before.
      start: what that started from.
      final: what it ended with.
      rate, criterion, scope, layer_rates: see `iterative_pruning`.

    Returns:
      The masks, and the key that a treatment of the next level's weights draws with.
    """
    score_key, start_key = jax.random.split(key)
    scores = ticket_criteria.ticket_scores(criterion, score_key, masks, start, final)
    pruned = ticket_masks.prune_round(
        masks, scores, rate, scope=scope, layer_rates=layer_rates
    )
    return pruned, start_key


def first_step(rewind: Rewind, level: int, *, rewind_step: int, n_steps: int) -> int:
    """The step of the schedule that a level begins at.

    Args:
      rewind: as in `iterative_pruning`.
      level: rounds of pruning before.
      rewind_step: k.
      n_steps: steps of a whole training.

    Returns:
      0 at level 0; above it k, or `n_steps` for fine-tuning, where the schedule has
      come to its last learning rate.

    Raises:
      ValueError: an unknown name; k outside [0, n_steps].
    """
    _check_rewind(rewind)
    if not 0 <= rewind_step <= n_steps:
        raise ValueError(
            f"rewind_step={rewind_step}: give a step from 0 to n_steps={n_steps}"
        )
    if level == 0:
        return 0
    return n_steps if rewind == "fine_tune" else rewind_step


def _check_rewind(rewind: str) -> None:
    if rewind not in ("weights", "learning_rate", "fine_tune"):
        raise ValueError(f"rewind={rewind!r}: give weights, learning_rate or fine_tune")
