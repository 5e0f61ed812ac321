"""Warnings about masks and scores, and parameters that open closed branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery_flow.sparsity import at_init_checks as checks
from lottery_flow.sparsity import masks as masks_lib

KEY = jax.random.key(0)
SHAPES = {"layer2": (3, 4), "layer10": (4, 5), "out": (5, 2)}
PARAMS = {k: {"kernel": np.ones(shape, np.float32)} for k, shape in SHAPES.items()}
FULL = masks_lib.full(PARAMS, SHAPES)


def scores_of(**values):
    return {k: {"kernel": np.full(s, values[k])} for k, s in SHAPES.items()}


def test_collapsed_names_empty_layers_in_the_order_of_the_tree():
    named = {k: np.zeros(shape, bool) for k, shape in SHAPES.items()}
    named["layer10"][1, 2] = True
    masks = masks_lib.from_named(named, PARAMS)
    assert checks.collapsed(masks) == ["layer2", "out"]
    assert checks.counts(masks) == {"layer2": 0, "layer10": 1, "out": 0}
    with pytest.warns(UserWarning, match="snip left no active weight in layer2, out,"):
        checks.warn_collapsed(masks, "snip")
    assert checks.collapsed(FULL) == []
    checks.warn_collapsed(FULL, "snip")  # a warning would be an error
    checks.warn_collapsed(masks_lib.dense(PARAMS), "snip")


def test_scores_that_are_not_finite_are_an_error_and_zeros_a_warning():
    fine = scores_of(layer2=1.0, layer10=-1.0, out=np.float32(0))
    fine["out"]["kernel"][4, 1] = 1e-30
    checks.check_scores(fine, FULL, "snip")
    for bad in (np.nan, np.inf, -np.inf):
        scores = scores_of(layer2=1.0, layer10=1.0, out=1.0)
        scores["out"]["kernel"][0, 0] = bad
        with pytest.raises(ValueError, match="scores of snip are not finite in out;"):
            checks.check_scores(scores, FULL, "snip")
    scores = scores_of(layer2=0.0, layer10=1.0, out=-0.0)
    with pytest.warns(UserWarning, match="scores of snip are all zero in layer2, out,"):
        checks.check_scores(scores, FULL, "snip")
    checks.check_scores(scores, FULL, "snip", warn=False)


def test_the_scores_of_inactive_weights_do_not_matter():
    named = {k: np.ones(shape, bool) for k, shape in SHAPES.items()}
    named["layer2"][0, 0], named["out"][:] = False, False
    masks = masks_lib.from_named(named, PARAMS)
    scores = scores_of(layer2=0.0, layer10=1.0, out=0.0)
    scores["layer2"]["kernel"][0, 0] = np.inf
    with pytest.warns(UserWarning, match="scores of snip are all zero in layer2, so"):
        checks.check_scores(scores, masks, "snip")


def test_open_branches_replaces_what_multiplies_by_zero_alone():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "norm1": {"scale": jnp.full(8, 0.5), "bias": jnp.zeros(8)},
        "norm2": {"scale": jnp.zeros(8), "bias": jnp.zeros(8)},
        "partly": {"kernel": jnp.eye(8)},
        "out": {"kernel": jnp.zeros((100, 300), jnp.bfloat16), "bias": jnp.ones(300)},
        "scale": jnp.zeros(()),
    }
    opened = jax.jit(checks.open_branches)(KEY, params)
    drawn = np.float32(opened["out"]["kernel"])
    # Glorot: variance 2 / (100 + 300); four standard errors of 30,000 draws.
    np.testing.assert_allclose(np.var(drawn), 1 / 200, rtol=4 * (2 / 30000) ** 0.5)
    assert opened["out"]["kernel"].dtype == jnp.bfloat16
    expected = {
        **params,
        "norm2": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
        "out": {**params["out"], "kernel": opened["out"]["kernel"]},
        "scale": jnp.ones(()),
    }
    jax.tree.map(np.testing.assert_array_equal, opened, expected)
