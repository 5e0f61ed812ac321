"""Sparse neural networks in JAX: gradient flow, lottery tickets, sparse training."""

from lottery_flow._version import __version__
from lottery_flow.sparsity import (
    criteria,
    distributions,
    initializers,
    masks,
    rules,
    schedules,
)
from lottery_flow.sparsity.rules import Rule
from lottery_flow.sparsity.topk import topk_mask
from lottery_flow.sparsity.transform import SparseState, rewire_network, sparsify

__all__ = [
    "Rule",
    "SparseState",
    "__version__",
    "criteria",
    "distributions",
    "initializers",
    "masks",
    "rewire_network",
    "rules",
    "schedules",
    "sparsify",
    "topk_mask",
]
