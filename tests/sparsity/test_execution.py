"""Products in compressed rows against the masked dense ones, in numpy with float64."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery_flow.sparsity import execution, rules, schedules
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.execution import compress, linear
from lottery_flow.sparsity.execution_structure import structure, structure_on_host
from lottery_flow.sparsity.transform import sparsify

KINDS = ("none", "all", "half", "empty_lines", "one", "first_column", "last_row")
structure_jit = jax.jit(structure, static_argnums=1)


def mask_of(kind, shape, seed=0):
    """A mask [in, out] of some kind."""
    mask = np.random.default_rng(seed).random(shape) < 0.4
    lines = np.ones(shape, bool)
    lines[::2] = lines[:, 1::3] = False
    one = np.zeros(shape, bool)
    one[-1, -1] = True
    first, last = np.zeros(shape, bool), np.zeros(shape, bool)
    first[:, 0] = last[-1] = True
    masks = (mask & False, mask | True, mask, mask & lines, one, first, last)
    return dict(zip(KINDS, masks, strict=True))[kind]


def arrays(shape, batch, mask, dtype="float32", seed=0):
    """x, kernel and dy that `dtype` can hold."""
    rng = np.random.default_rng(seed)
    sizes = (batch, shape[0]), shape, (batch, shape[1])
    x, kernel, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in sizes)
    return x, jnp.where(mask, kernel, jnp.zeros_like(kernel)), dy


def oracle(x, kernel, dy):
    """y, dx and dW of the dense product in float64."""
    x, kernel, dy = (np.asarray(a).astype(np.float64) for a in (x, kernel, dy))
    return x @ kernel, dy @ kernel.T, x.T @ dy


@partial(jax.jit, static_argnames="grad")
def passes(x, kernel, dy, plan, grad="dense"):
    """y, dx and dW of `linear`."""
    y, pull = jax.vjp(lambda x, k: linear(x, k, plan, grad=grad), x, kernel)
    return y, *pull(dy)


def assert_close(found, want, dtype="float32", terms=1):
    """Up to the rounding of sums in float32, and of results in `dtype`."""
    eps = float(jnp.finfo(dtype).eps)
    found = np.asarray(found).astype(np.float64)
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    rounding = 4 * np.sqrt(terms) * float(jnp.finfo("float32").eps) * scale
    np.testing.assert_allclose(found, want, rtol=eps, atol=rounding)


def check(shape, batch, mask, dtype="float32", capacity=None):
    """Every number of `linear` against the oracle, with both gradients."""
    x, kernel, dy = arrays(shape, batch, mask, dtype)
    plan = structure_on_host(mask, capacity)
    y, dx, d_kernel = oracle(x, kernel, dy)
    for grad in execution.GRADS:
        found = passes(x, kernel, dy, plan, grad)
        assert all(a.dtype == jnp.dtype(dtype) for a in found)
        assert_close(found[0], y, dtype, shape[0])
        assert_close(found[1], dx, dtype, shape[1])
        where = mask if grad == "active" else np.ones(shape, bool)
        assert_close(found[2], np.where(where, d_kernel, 0.0), dtype, batch)
        assert not np.asarray(found[2])[~where].any()


@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_the_masked_dense_ones(kind):
    for shape, batch in (((7, 5), 1), ((5, 9), 6)):
        check(shape, batch, mask_of(kind, shape))


@pytest.mark.parametrize(
    ("shape", "batch"), [((1, 1), 3), ((1, 40), 2), ((40, 1), 2), ((64, 48), 512)]
)
def test_results_and_gradients_at_other_shapes_and_batches(shape, batch):
    check(shape, batch, mask_of("half", shape))


@pytest.mark.parametrize("kind", ["half", "empty_lines", "none"])
def test_bfloat16_rounds_results_alone(kind):
    check((30, 20), 8, mask_of(kind, (30, 20)), "bfloat16")


def test_float64_keeps_its_digits():
    with jax.enable_x64(True):
        mask = mask_of("half", (12, 9))
        x, kernel, dy = arrays(mask.shape, 5, mask, "float64")
        plan = structure_on_host(mask)
        found = passes(x, kernel, dy, plan, "active")
        y, dx, d_kernel = oracle(x, kernel, dy)
        for a, b in zip(found, (y, dx, np.where(mask, d_kernel, 0)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("extra", [-1, 0, 1, 7, 8])
def test_the_active_gradient_in_chunks_of_any_number_of_weights(monkeypatch, extra):
    """Eight weights at a time: the last chunk overlaps the one before."""
    monkeypatch.setattr(execution, "_GATHERED", 1)
    shape = (10, 6)
    mask = np.zeros(60, bool)
    mask[np.random.default_rng(extra + 1).permutation(60)[: 16 + extra]] = True
    mask = mask.reshape(shape)
    x, kernel, dy = arrays(shape, 3, mask)
    found = jax.jit(
        lambda x, kernel, dy, plan: jax.vjp(
            lambda k: linear(x, k, plan, grad="active"), kernel
        )[1](dy)[0]
    )(x, kernel, dy, structure_on_host(mask))
    assert_close(found, np.where(mask, oracle(x, kernel, dy)[2], 0), terms=3)


@settings(max_examples=15)
@given(
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    density=st.floats(0, 1),
    spare=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_structures_list_the_active_weights_in_both_orders(
    n_in, n_out, density, spare, seed
):
    mask = np.random.default_rng(seed).random((n_in, n_out)) < density
    n = int(mask.sum())
    plan = structure_on_host(mask, min(n + spare, mask.size))
    rows, columns = np.nonzero(mask)
    np.testing.assert_array_equal(plan.inputs[:n], rows)
    np.testing.assert_array_equal(plan.outputs[:n], columns)
    np.testing.assert_array_equal(plan.positions[:n], rows * n_out + columns)
    assert (np.asarray(plan.positions[n:]) == mask.size).all()
    columns, rows = np.nonzero(mask.T)
    np.testing.assert_array_equal(plan.inputs_by_output[:n], rows)
    np.testing.assert_array_equal(np.asarray(plan.outputs)[plan.order[:n]], columns)
    for starts, axis in ((plan.input_starts, 1), (plan.output_starts, 0)):
        np.testing.assert_array_equal(np.diff(starts), mask.sum(axis))
        assert starts[0] == 0
        assert starts[-1] == n
    assert {a.dtype for a in plan} == {jnp.dtype("int32")}


@pytest.mark.parametrize("kind", ["none", "all", "half", "empty_lines"])
def test_a_structure_built_under_jit_equals_that_of_the_host(kind):
    mask = mask_of(kind, (8, 11))
    for spare in (0, 3):
        n = min(int(mask.sum()) + spare, mask.size)
        on_device, on_host = structure_jit(mask, n), structure_on_host(mask, n)
        for name, a, b in zip(on_host._fields, on_device, on_host, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert a.dtype == b.dtype


def test_spare_capacity_changes_no_number():
    mask = mask_of("empty_lines", (9, 8))
    check(mask.shape, 4, mask, capacity=int(mask.sum()) + 5)
    check(mask.shape, 4, np.zeros((9, 8), bool), capacity=5)


def test_too_small_a_capacity_reads_no_foreign_memory():
    """The device cannot raise; it leaves the last weights out."""
    mask = mask_of("half", (9, 8))
    n = int(mask.sum()) - 4
    plan = structure_jit(mask, n)
    kept = np.zeros(72, bool)
    kept[np.flatnonzero(mask)[:n]] = True
    for a, b in zip(plan, structure_on_host(kept.reshape(9, 8)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inactive_entries_of_the_kernel_are_not_read():
    mask = mask_of("half", (9, 8))
    x, kernel, dy = arrays(mask.shape, 4, mask)
    plan = structure_on_host(mask)
    with_nan = jnp.where(mask, kernel, jnp.nan)
    for a, b in zip(
        passes(x, kernel, dy, plan), passes(x, with_nan, dy, plan), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_forward_derivatives_are_refused():
    """Products with a Hessian take the dense product instead."""
    mask = mask_of("half", (9, 8))
    x, kernel, _ = arrays(mask.shape, 4, mask)
    plan = structure_on_host(mask)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda k: linear(x, k, plan), (kernel,), (kernel,))


def test_any_number_of_leading_dimensions():
    mask = mask_of("half", (9, 8))
    x, kernel, _ = arrays(mask.shape, 6, mask)
    plan = structure_on_host(mask)
    y = linear(x, kernel, plan)
    np.testing.assert_array_equal(
        linear(x.reshape(2, 3, 9), kernel, plan), y.reshape(2, 3, 8)
    )
    np.testing.assert_array_equal(
        linear(x[0], kernel, plan), linear(x[:1], kernel, plan)[0]
    )
    assert linear(x[:0], kernel, plan).shape == (0, 8)


def test_the_program_holds_the_compiled_product():
    """The point of it all: without it every product would gather and add."""
    mask = mask_of("half", (9, 8))
    x, kernel, dy = arrays(mask.shape, 4, mask)
    plan = structure_on_host(mask)
    calls = passes.lower(x, kernel, dy, plan).as_text().count("cpu_csr_sparse_dense")
    assert calls == 2


@pytest.mark.parametrize("grad", execution.GRADS)
def test_members_under_vmap_equal_single_ones(grad):
    masks = np.stack([mask_of("half", (9, 8), seed) for seed in (1, 2, 3)])
    n = int(masks.reshape(3, -1).sum(1).max())
    plans = [structure_on_host(m, n) for m in masks]
    own = [arrays((9, 8), 4, m, seed=i) for i, m in enumerate(masks)]
    together = jax.tree.map(lambda *a: jnp.stack(a), *own)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *plans)
    run = jax.jit(jax.vmap(partial(passes, grad=grad)))
    # By turns, not by the product for batches of matrices, which gathers and adds.
    assert "cpu_csr_sparse_dense" in run.lower(*together, stacked).as_text()
    found = run(*together, stacked)
    for i, (one, plan) in enumerate(zip(own, plans, strict=True)):
        want = passes(*one, plan, grad)
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


def test_members_may_share_their_batch_and_mask():
    mask = mask_of("half", (9, 8))
    x, kernel, dy = arrays(mask.shape, 4, mask)
    plan = structure_on_host(mask)
    kernels = jnp.stack([kernel, 2 * kernel])
    run = jax.vmap(partial(passes, grad="active"), in_axes=(None, 0, None, None))
    y, dx, d_kernel = run(x, kernels, dy, plan)
    for i, factor in enumerate((1.0, 2.0)):
        want = oracle(x, factor * kernel, dy)
        assert_close(y[i], want[0], terms=9)
        assert_close(dx[i], want[1], terms=8)
        assert_close(d_kernel[i], np.where(mask, want[2], 0), terms=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, k, p: linear(x, k, p, grad="some"), "grad='some'"),
        (lambda x, k, p: linear(x, k.astype("bfloat16"), p), "bfloat16"),
        (lambda x, k, p: linear(x, jnp.zeros((4, 4)), p), "shape"),
        (lambda x, k, p: linear(x[:, 1:], k, p), "3 features"),
        (lambda x, k, p: structure_on_host(np.ones((4, 3), bool), 5), "n_active=5"),
        (lambda x, k, p: structure(np.ones((4, 3), bool), 13), "n_active=13"),
        (lambda x, k, p: structure(np.ones((4, 3), bool), -1), "n_active=-1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    plan = structure_on_host(np.ones((4, 3), bool))
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 4)), jnp.ones((4, 3)), plan)


# Training


def network(params, x, plans, grad):
    """Two layers and a dense one."""
    for name in ("fc1", "fc2", "fc3"):
        layer = params[name]
        y = linear(x, layer["kernel"], plans.get(name), grad=grad)
        x = jnp.tanh(y + layer["bias"].reshape(1, -1))
    return x


def test_training_with_rewires_equals_masked_dense_training():
    """RigL through sparsify: the structure is built again after each rewire."""
    key = jax.random.key(0)
    widths = (12, 16, 10, 3)
    params = {
        f"fc{n}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, n), pair) / 3,
            "bias": jnp.zeros(pair[1]),
        }
        for n, pair in enumerate(itertools.pairwise(widths), start=1)
    }
    masks = masks_lib.random(key, params, {"fc1": 40, "fc2": 35})
    params = masks_lib.apply(masks, params)
    rule = rules.rigl(schedules.every(7), schedules.constant(0.4))
    tx = sparsify(optax.sgd(0.1, momentum=0.9), masks, rule, key=key)
    x = jax.random.normal(jax.random.fold_in(key, 9), (20, 8, 12))
    target = jax.random.normal(jax.random.fold_in(key, 10), (20, 8, 3))

    @partial(jax.jit, static_argnames=("rewire", "grad"))
    def step(params, state, plans, x, target, rewire, grad):
        grads = jax.grad(
            lambda p: jnp.mean((network(p, x, plans, grad) - target) ** 2)
        )(params)
        updates, state = tx.update(grads, state, params, rewire=rewire)
        return optax.apply_updates(params, updates), state

    def plans_of(state):
        named = masks_lib.named_leaves(state.masks).items()
        return {k: structure_on_host(m) for k, m in named if m is not None}

    def train(sparse):
        weights, changes = params, 0
        state: Any = tx.init(params)
        plans = plans_of(state) if sparse else {}
        for t in range(20):
            rewire = t in (7, 14)
            grad = "active" if sparse and not rewire else "dense"
            args = weights, state, plans, x[t], target[t]
            old, (weights, state) = state.masks, step(*args, rewire, grad)
            if rewire:
                changed = jax.tree.map(
                    lambda a, b: int((a != b).sum()), old, state.masks
                )
                changes += sum(jax.tree.leaves(changed))
                plans = plans_of(state) if sparse else {}
        return weights, state, changes

    (dense, dense_state, changes), (sparse, sparse_state, _) = train(False), train(True)
    assert changes > 20
    for a, b in zip(*map(jax.tree.leaves, (dense, sparse)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(
        *(jax.tree.leaves(s.masks) for s in (dense_state, sparse_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_kernels_give_the_same_products(kind):
    for dtype in ("float32", "bfloat16"):
        mask = mask_of(kind, (7, 5))
        x, kernel, dy = arrays((7, 5), 6, mask, dtype)
        own = compress(jnp.where(mask, kernel, jnp.nan), mask)
        assert own.values.shape == own.inputs.shape == (mask.sum(),)
        found = linear(x.reshape(2, 3, 7), own, None)
        assert found.dtype == x.dtype
        assert_close(found.reshape(6, 5), oracle(x, kernel, dy)[0], dtype, 7)
