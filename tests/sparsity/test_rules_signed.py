"""SET's own rule of signs, by hand and against numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from lottery_flow.sparsity import rules, schedules

always = schedules.every(1)


def propose(rule, masks, weights):
    args = 0, jax.random.key(0), masks, weights, weights, ()
    return jax.jit(rule.propose)(*args)[0]["w"]


def by_sign(fraction, prefer=0):
    """Drops as SET by sign; grows from a position on, in order."""

    def grow(key, weights, grads):
        return jnp.where(jnp.arange(weights.size) >= prefer, 1.0, 0.0).reshape(
            weights.shape
        )

    fraction = schedules.constant(fraction)
    return rules.drop_and_grow(always, fraction, grow=grow, by_sign=True)


def test_dropping_by_sign_by_hand():
    masks = {"w": jnp.array([True] * 8 + [False] * 4)}
    weights = {"w": jnp.array([1.0, 2, 3, 4, -0.1, -0.2, -5, -0.0, 0, 0, 0, 0])}
    # Of the 5 that are not negative -0 and 1 go, of the 3 negative ones -0.1.
    new = propose(by_sign(0.4, prefer=8), masks, weights)
    assert np.flatnonzero(new).tolist() == [1, 2, 3, 5, 6, 8, 9, 10]
    new = propose(rules.set_signed(always, schedules.constant(0.4)), masks, weights)
    assert new[jnp.array([1, 2, 3, 5, 6])].all()
    assert new.sum() == 8


def test_set_signed_drops_the_same_fraction_of_either_sign():
    rng = np.random.default_rng(0)
    mask, w = rng.random((40, 30)) < 0.3, rng.standard_normal((40, 30))
    w = np.where(w > 0, w, 0.01 * w).astype(np.float32)  # plain SET drops these alone
    masks, weights = {"w": jnp.asarray(mask)}, {"w": jnp.asarray(np.where(mask, w, 0))}
    kept = np.zeros_like(mask)
    for part in (mask & (w < 0), mask & (w > 0)):
        n = int(part.sum())
        n_keep = n - int(np.float32(n) * np.float32(0.3))
        order = np.argsort(-np.where(part, np.abs(w), -1.0).ravel(), kind="stable")
        kept.ravel()[order[:n_keep]] = True
    new = propose(by_sign(0.3), masks, weights)
    free = np.flatnonzero(~kept)[: mask.sum() - kept.sum()]
    expected = kept.ravel().copy()
    expected[free] = True
    np.testing.assert_array_equal(new.ravel(), expected)
