"""Small runs, trained alone or together, and whether they are the same."""

from pathlib import Path

import jax
import numpy as np
import pytest
import run_cli

from lottery_flow import runs
from lottery_flow.build import build
from lottery_flow.loop import Result, Run
from lottery_flow.members import members
from lottery_flow.train import train

# Sums in another order, over 12 steps; masks must be the same.
ROUNDING = 2e-5


def started(root: Path, **fields: object) -> list[Run]:
    """The members of a small configuration."""
    config = run_cli.small_config(**fields)
    return [
        Run(build(own, seed), runs.RunPaths(root / f"run_{i}"), {"seed": seed})
        for i, (own, seed) in enumerate(members(config))
    ]


def alone(root: Path, **fields: object) -> list[Result]:
    """The same members, each trained as a run of its own."""
    return [train([run])[0] for run in started(root, **fields)]


def leaves(result: Result) -> list[np.ndarray]:
    state = result.state
    trees = state.params, state.batch_stats, state.masks, state.opt_state.inner_state
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def assert_same(found: Result, expected: Result, rtol: float = 0.0) -> None:
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
    for mine, theirs in zip(found.rows, expected.rows, strict=True):
        assert mine.keys() == theirs.keys()
        none = {k for k, v in theirs.items() if v is None}
        assert none == {k for k, v in mine.items() if v is None}
        numbers = {k: v for k, v in theirs.items() if k not in none}
        found_numbers = {k: v for k, v in mine.items() if k not in none}
        assert found_numbers == pytest.approx(numbers, rel=rtol, abs=rtol)
