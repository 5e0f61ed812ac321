"""The table of rules: every way in which masks change while a network trains.

An argument of the names that `lottery_flow.method` lists is given by a configuration;
others are options of the rule.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

from lottery_flow.sparsity import rules, rules_adaptive, rules_pruning
from lottery_flow.sparsity.rules import Rule

Timing: TypeAlias = Literal["after", "instead"]


def _drop_grow(make: Callable[..., Rule]) -> Callable[..., Rule]:
    """Names the arguments that the family of SET and RigL hands on."""

    def rule(is_due, fraction, timing: Timing = "after", granularity=None) -> Rule:
        return make(is_due, fraction, timing=timing, granularity=granularity)

    return rule


def _signed(is_due, fraction, timing: Timing = "after") -> Rule:
    return rules.set_signed(is_due, fraction, timing=timing)


def _global_gradual_pruning(begin, end, interval, total_sparsity) -> Rule:
    return rules_pruning.global_gradual_pruning(
        begin=begin, end=end, interval=interval, final_sparsity=total_sparsity
    )


def _gradual_pruning(begin, end, interval, final_sparsity, granularity=None) -> Rule:
    return rules.gradual_pruning(
        begin=begin,
        end=end,
        interval=interval,
        final_sparsity=final_sparsity,
        granularity=granularity,
    )


RULES: dict[str, Callable[..., Rule]] = {
    "static": rules.static,
    "set": _drop_grow(rules.set_),
    "set_signed": _signed,
    "rigl": _drop_grow(rules.rigl),
    "rigl_inverted": _drop_grow(rules.rigl_inverted),
    "snfs": rules_adaptive.snfs,
    "dsr": rules_adaptive.dsr,
    "gradual_pruning": _gradual_pruning,
    "global_gradual_pruning": _global_gradual_pruning,
    "han_pruning": rules_pruning.han_pruning,
}
# Those that leave each layer as many weights as it has.
CONSERVING = frozenset({"static", "set", "set_signed", "rigl", "rigl_inverted"})
# Those that take weights away alone, and so start from all of them.
PRUNING = frozenset({"gradual_pruning", "global_gradual_pruning", "han_pruning"})
