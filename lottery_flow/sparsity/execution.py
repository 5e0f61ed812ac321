"""Linear layers that cost by their active weights: products in compressed rows.

    y^T = W^T x^T        W^T in compressed sparse rows, one row for each output
    dx^T = W dy^T        W in compressed sparse rows, one row for each input
    dW[i, o] = sum over the batch of x[., i] dy[., o], everywhere or where W is active

    plan = structure_on_host(mask)                    # again after each rewire
    y = linear(x, kernel, plan, grad="active") + bias

The parameters stay as they are: a kernel [in, out] whose inactive entries are zero, and
its gradient of the same shape. Where the active weights lie is a `Structure`; it is
static between two rewires, and the number of active weights, its only static shape,
for ever under static masks, SET and RigL. The product is that of
`jax.experimental.sparse.BCSR`: on CPUs a compiled kernel for float32, Eigen's over
several threads; elsewhere it gathers and adds, which is correct and slow. Formats:
Saad 2003, Iterative methods for sparse linear systems, section 3.4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import sparse
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int32

from lottery_flow.sparsity.execution_structure import Structure

GRADS = ("dense", "active")

# Products of gathered rows, that many at a time: they fit into a core's second cache.
_GATHERED = 2**15


class Compressed(NamedTuple):
    """A kernel [in, out] in compressed rows of its outputs: for inference.

    Attributes:
      values: the active weights, by output and then by input.
      inputs: of each of them.
      starts: where each output's weights start, and the number of all.
    """

    values: Float[Array, " n"]
    inputs: Int32[Array, " n"]
    starts: Int32[Array, " out+1"]


def compress(kernel, mask) -> Compressed:
    """A kernel and its mask [..., out], the leading dimensions taken as inputs."""
    n_out = np.shape(kernel)[-1]
    mask = np.asarray(mask).reshape(-1, n_out).T
    _, inputs = np.nonzero(mask)
    return Compressed(
        values=jnp.asarray(np.asarray(kernel).reshape(-1, n_out).T[mask]),
        inputs=jnp.asarray(inputs.astype(np.int32)),
        starts=jnp.asarray(np.cumsum([0, *mask.sum(1)]).astype(np.int32)),
    )


def linear(
    x: Float[Array, "... features"],
    kernel: Float[Array, "n m"] | Compressed,
    plan: Structure | None,
    *,
    grad: str = "dense",
) -> Float[Array, "... o"]:
    """x @ kernel by the active weights; reverse derivatives alone, once.

    Args:
      x: [..., in], any number of leading dimensions.
      kernel: [in, out], of the dtype of x. Inactive entries are not read. It may be
        its active weights alone, [n, 1] as in `compact`; the gradient is, then, too.
        Compressed, it has no plan, no derivatives, and cannot tell whether the features
        of x are its inputs.
      plan: where weights are active; None for the dense product, which reads all.
      grad: of the kernel. "dense" is that of the dense product, for rules that grow
        weights by it; "active" costs by the active weights as well.

    Returns:
      The product in the dtype of x; sums are taken in float32 (float64 for float64).

    Raises:
      ValueError: an unknown `grad`, dtypes that differ, a plan for other shapes.

    Guarantees:
      - Products and gradients are those of the masked dense kernel up to rounding,
        with empty and full rows and columns, in float32 and bfloat16.
      - With grad="active" the gradient of an inactive weight is exactly zero; with
        "dense" it is the dense gradient everywhere.
      - Under `vmap`, members take turns.
    """
    if grad not in GRADS:
        raise ValueError(f"grad={grad!r}: choose one of {', '.join(GRADS)}")
    if isinstance(kernel, Compressed):
        return _compressed_product(x, kernel)
    if x.dtype != kernel.dtype:
        raise ValueError(
            f"x is {x.dtype}, kernel {kernel.dtype}: cast them to the same dtype"
        )
    if plan is None:
        return x @ kernel
    sizes = plan.input_starts.size - 1, plan.output_starts.size - 1
    if x.shape[-1] != sizes[0]:  # the compiled kernel would read beyond x
        raise ValueError(
            f"x has {x.shape[-1]} features, the plan {sizes[0]}; give those"
        )
    if kernel.shape == (plan.positions.size, 1):
        if grad == "dense" and sizes != kernel.shape:
            raise ValueError(
                "active weights alone have no dense gradient; give grad='active'"
            )
    elif sizes != kernel.shape:
        raise ValueError(
            f"plan is for kernels of shape {sizes}, not {kernel.shape}; build it from "
            "this layer's mask"
        )
    y = _linear(x.reshape(-1, x.shape[-1]), kernel, plan, grad)
    return y.reshape(*x.shape[:-1], sizes[1])


def _compressed_product(x, kernel: Compressed):
    """x [..., in] times a compressed kernel."""
    x_t = with_layout_constraint(_wide(x.reshape(-1, x.shape[-1])).T, Layout((0, 1)))
    y_t = _csr_product(_wide(kernel.values), kernel.inputs, kernel.starts, x_t)
    return y_t.T.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _linear(x, kernel, plan, grad):
    """x [batch, in] @ kernel, with its own backward pass."""
    is_compact = kernel.shape == (plan.positions.size, 1)

    @jax.custom_vjp
    def product(x, kernel, plan):
        return forward(x, kernel, plan)[0]

    def forward(x, kernel, plan):
        # In this order in memory, or each of its readers would turn it for itself.
        x_t = with_layout_constraint(_wide(x).T, Layout((0, 1)))
        values = kernel.reshape(-1)
        values = _wide(values if is_compact else _take(values, plan.positions))
        by_output = _take(values, plan.order)
        y_t = _csr_product(by_output, plan.inputs_by_output, plan.output_starts, x_t)
        return y_t.T.astype(x.dtype), (x_t, values, plan)

    def backward(saved, dy):
        x_t, values, plan = saved
        dy_t = _wide(dy).T
        dx_t = _csr_product(values, plan.outputs, plan.input_starts, dy_t)
        if grad == "dense":
            d_kernel = x_t @ dy_t.T
        else:
            d_values = _sampled_product(x_t, dy_t, plan.inputs, plan.outputs)
            d_kernel = d_values[:, None]
            if not is_compact:
                d_kernel = jnp.zeros(kernel.size, d_values.dtype)
                d_kernel = d_kernel.at[plan.positions].set(
                    d_values, mode="drop", indices_are_sorted=True
                )
                d_kernel = d_kernel.reshape(kernel.shape)
        return dx_t.T.astype(dy.dtype), d_kernel.astype(kernel.dtype), None

    product.defvjp(forward, backward)
    return product(x, kernel, plan)


@jax.custom_batching.sequential_vmap
def _csr_product(values, indices, starts, dense):
    """A matrix in compressed rows times `dense`. Batched, it would lose its kernel."""
    shape = starts.size - 1, dense.shape[0]
    if 0 in (values.size, dense.size):  # no pointers to nothing
        return jnp.zeros((shape[0], dense.shape[1]), dense.dtype)
    matrix = sparse.BCSR(
        (values, indices, starts),
        shape=shape,
        indices_sorted=True,
        unique_indices=True,
    )
    return matrix @ dense


def _sampled_product(x_t, dy_t, inputs, outputs):
    """(x_t @ dy_t.T) at the pairs (inputs, outputs) alone."""
    batch, n = x_t.shape[1], inputs.size
    ones = jnp.ones(batch, x_t.dtype)

    def some(inputs, outputs):
        rows = lax.optimization_barrier(_take(x_t, inputs) * _take(dy_t, outputs))
        # A matrix product to sum them: in five times its time, XLA would as a sum.
        return jnp.matmul(ones, rows.T, precision=lax.Precision.HIGHEST)

    # What is gathered is written and read again: it has to stay in the cache.
    size = max(_GATHERED // max(batch, 1), 8)
    if n <= size:
        return some(inputs, outputs)

    def chunk(i, found):
        start = i * size  # clamped: the last chunk overlaps the one before
        pairs = (lax.dynamic_slice(a, (start,), (size,)) for a in (inputs, outputs))
        return lax.dynamic_update_slice(found, some(*pairs), (start,))

    return lax.fori_loop(0, -(-n // size), chunk, jnp.zeros(n, x_t.dtype))


def _take(values, indices):
    """Entries or rows; a position that no weight has gives any of them."""
    return values.at[indices].get(mode="clip", wrap_negative_indices=False)


def _wide(x):
    """In the dtype of the products: the kernel knows no halves."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
