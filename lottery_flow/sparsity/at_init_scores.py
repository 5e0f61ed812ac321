"""Scores for pruning at initialisation: what each weight is worth before training.

With the mean gradient g and Hessian H of the loss over all examples, for each weight w

    random      uniform in [0, 1)
    magnitude   |w|
    snip        |g w|             Lee et al. 2019, "SNIP", section 4
    grasp       w (H g)           Wang et al. 2020, "Picking Winning Tickets", section 4
    synflow     |w dR/dw|         Tanaka et al. 2020, "Pruning neural networks without
                                  any data", section 6; R is the sum of the outputs for
                                  an input of ones, all parameters at absolute values
    fisher      w^2 F / 2         LeCun et al. 1990, "Optimal Brain Damage", with the
                                  diagonal of the empirical Fisher: F is the mean over
                                  examples of the squared gradient of that example's
                                  loss, at the labels of the data

The highest scores are kept. GraSP's own score is s = -w (H g), of which it removes the
highest: setting w to zero changes the squared norm of the gradient by -2 w (H g) = 2 s
to first order, so those are the weights without which gradient flow is largest. Here
the sign is turned, like that of every score, to say what is worth keeping.

A scorer is a function `(key, params, masks, network, batches) -> scores`: a tree like
the parameters, None where there is no mask. The parameters come masked (`masks.apply`);
the scores of inactive weights mean nothing. Scores are computed in the precision of the
parameters, float32 at least. The models have to be in evaluation mode: an example's
logits depend on that example alone. Scorers that need examples raise ValueError for
empty batches; all of them work under jit.

Weights behind a factor that starts at zero, as the last norm of a residual branch does,
have a score of zero by every rule with a gradient: `at_init_checks.open_branches`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

Batches: TypeAlias = Sequence[Any]  # pytrees of arrays whose first axis is examples
Scores: TypeAlias = PyTree[Float[Array, "..."] | None]


class Network(NamedTuple):
    """What is pruned, as pure functions.

    Programs are compiled once for each network, told apart by these functions: make
    them once, not for every call.

    Attributes:
      logits: `(params, batch) -> float [b c]`.
      criterion: `(logits, batch) -> float [b]`, the loss of each example.
      ones: `(params) -> float [1 c]`, the logits of an input of ones, for SynFlow; None
        without it.
      penalty: `(params) -> scalar`, added to the mean loss by SNIP and GraSP; None adds
        nothing, as in both papers (the SNIP of Evci et al. 2020 counts its L2 term).
    """

    logits: Callable
    criterion: Callable
    ones: Callable | None = None
    penalty: Callable | None = None


Scorer: TypeAlias = Callable[[Key[Array, ""], Params, Masks, Network, Batches], Scores]


def random(key, params, masks, network=None, batches=()) -> Scores:
    """Uniform in [0, 1), independent for every weight."""
    del network, batches
    return _draws(key, _masked_leaves(masks, params))


def magnitude(key, params, masks, network=None, batches=()) -> Scores:
    """|w|."""
    del key, network, batches
    return _magnitudes(_masked_leaves(masks, params))


def snip(key, params, masks, network, batches) -> Scores:
    """|g w|, g of the mean loss: how much the loss feels each connection.

    The paper divides by the sum of all scores, which leaves their order as it is.

    Guarantees:
      - The scores don't depend on how the examples are cut into batches.
    """
    del key
    grads = _mean(_gradient, network, batches, params, 1.0)
    return _magnitudes(_products(masks, params, grads))


def grasp(
    key, params, masks, network, batches, *, temperature: float = 200.0
) -> Scores:
    """w (H g): how much of the gradient's norm is lost with a weight.

    As in the released code, g and H are those of the active masked weights alone.

    Args:
      temperature: divides the logits, in g and in H.

    Guarantees:
      - The scores don't depend on how the examples are cut into batches.
      - To first order, twice a score is what the squared norm of the gradient loses
        when that weight is set to zero.
    """
    del key
    grads = _mean(_gradient, network, batches, params, temperature)
    flow = _active_part(masks, params, grads)
    change = _mean(_hessian_product, network, batches, params, temperature, flow)
    return _products(masks, params, change)


def synflow(key, params, masks, network, batches=()) -> Scores:
    """|w dR/dw|: the synaptic flow through each connection, without any data.

    Range: R grows with depth, and that of a ResNet-50 exceeds float32. As long as all
    biases are zero, as they are at first, let `network.ones` take a smaller constant
    than 1 as its input, and return smaller logits by as much (1e-32 for that ResNet).

    Raises:
      ValueError: `network.ones` is None.

    Guarantees:
      - Without biases, the scores of each layer of a chain of layers add up to R.
      - Without biases, a smaller input and smaller logits scale all scores alike.
      - Without biases, the scores into a hidden unit add up to the scores out of it.
    """
    del key, batches
    if network.ones is None:
        raise ValueError(
            "network.ones is None, but synflow needs the logits of an input of ones; "
            "give Network(..., ones=...)"
        )
    return _masked_leaves(masks, _flow(network, params))


def fisher(key, params, masks, network, batches) -> Scores:
    """w^2 F / 2: the rise of the loss at a minimum whose Hessian is diag(F).

    Holds one gradient for each example of a batch: take small batches of large models.

    Guarantees:
      - The scores don't depend on how the examples are cut into batches.
    """
    del key
    squares = _mean(_mean_square_gradient, network, batches, params)
    return _products(masks, params, _products(masks, params, squares), 0.5)


def _loss(network: Network, params, temperature, batch):
    """The mean loss of a batch, its logits divided by the temperature."""
    logits = network.logits(params, batch)
    logits = logits.astype(_wide(logits)) / temperature
    mean = jnp.mean(network.criterion(logits, batch))
    return mean if network.penalty is None else mean + network.penalty(params)


def _gradient(network: Network, params, batch, temperature):
    return jax.grad(lambda p: _loss(network, p, temperature, batch))(params)


def _hessian_product(network: Network, params, batch, temperature, vector):
    def gradient(p):
        return _gradient(network, p, batch, temperature)

    return jax.jvp(gradient, (params,), (vector,))[1]


def _mean_square_gradient(network: Network, params, batch):
    def squares(example):
        alone = jax.tree.map(lambda x: x[None], example)

        def loss(p):
            return network.criterion(network.logits(p, alone), alone)[0]

        wide = jax.tree.map(lambda g: g.astype(_wide(g)), jax.grad(loss)(params))
        return jax.tree.map(jnp.square, wide)

    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(squares)(batch))


@functools.partial(jax.jit, static_argnums=0)
def _flow(network: Network, params):
    assert network.ones is not None
    magnitudes = jax.tree.map(jnp.abs, params)

    def total(p):
        logits = network.ones(p)
        return jnp.sum(logits.astype(_wide(logits)))

    flow = jax.grad(total)(magnitudes)
    return jax.tree.map(
        lambda w, g: jnp.abs(w.astype(_wide(w)) * g.astype(_wide(g))), magnitudes, flow
    )


def _mean(fn, network: Network, batches: Batches, params, *args):
    """The mean of `fn(network, params, batch, *args)`, weighted by examples."""
    if not len(batches):
        raise ValueError(
            "batches is empty, but this score needs examples; give at least one batch"
        )
    sizes = [jax.tree.leaves(batch)[0].shape[0] for batch in batches]
    total = _zeros(params)
    for batch, size in zip(batches, sizes, strict=True):
        share = size / sum(sizes)
        total = _add_part(fn, network, total, share, params, batch, *args)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_part(fn, network: Network, total, share, params, batch, *args):
    part = fn(network, params, batch, *args)
    return jax.tree.map(lambda t, x: t + share * x.astype(t.dtype), total, part)


# Each of these is one program instead of one for every layer.


@jax.jit
def _zeros(params):
    return jax.tree.map(lambda w: jnp.zeros(w.shape, _wide(w)), params)


@jax.jit
def _magnitudes(tree):
    return jax.tree.map(jnp.abs, tree)


@jax.jit
def _draws(key, tree):
    """Uniform draws like the leaves, from one draw for all: far less to compile."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = np.cumsum([0, *(leaf.size for leaf in leaves)])
    # float32 whatever the weights: bfloat16 would make most scores tie.
    flat = jax.random.uniform(key, (int(ends[-1]),), jnp.float32)
    draws = [
        flat[start:end].reshape(leaf.shape)
        for start, end, leaf in zip(ends[:-1], ends[1:], leaves, strict=True)
    ]
    return treedef.unflatten(draws)


@jax.jit
def _products(masks: Masks, params, tree, factor=1.0) -> Scores:
    """Weights times the leaves of `tree`, where there is a mask."""
    return jax.tree.map(
        lambda w, x: factor * (w.astype(x.dtype) * x),
        _masked_leaves(masks, params),
        _masked_leaves(masks, tree),
    )


@jax.jit
def _active_part(masks: Masks, params, grads):
    """The gradient of the active masked weights; zero for everything else."""

    def part(mask, grad, weight):
        zeros = jnp.zeros(weight.shape, weight.dtype)
        if mask is None:
            return zeros
        return jnp.where(mask, grad.astype(zeros.dtype), zeros)

    return masks_lib.tree_map(part, masks, grads, params)


def _masked_leaves(masks: Masks, tree):
    """The tree, with None where there is no mask."""
    return masks_lib.tree_map(
        lambda mask, leaf: None if mask is None else leaf, masks, tree
    )


def _wide(leaf):
    """The dtype to compute a score in: float32 at least."""
    return jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
