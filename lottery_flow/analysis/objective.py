"""What is analysed: a loss as a function of the parameters and a batch.

    loss(params, batch) = mean of criterion(logits, batch) + penalty(params)

Most of the analysis needs only such a function, `(params, batch) -> scalar`, from
wherever it comes; where the logits are needed too, an `Objective`, which is such a
function, says how the one follows from the other. A batch is any pytree of arrays whose
first axis counts examples.

With norms the loss depends on whose statistics they use, and that is said, never
guessed. `'frozen'` are the running statistics, as in evaluation: the loss is a mean
over images and the same however they are cut into batches. `'batch'` are those of the
batch, as in training: another cut is another loss.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from lottery_flow.sparsity import masks as masks_lib

LossFn = Callable[[PyTree, Any], Array]  # (params, batch) -> scalar


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss that goes through logits, `(params, batch) -> scalar`.

    The mean of the criterion over the batch, with the penalty.

    Attributes:
      logits: `(params, batch) -> float [b c]`.
      criterion: `(logits, batch) -> float [b]`, the loss of each example, which depends
        on the logits of that example alone.
      penalty: `(params) -> scalar`, None without one.
      separable: whether the logits of an example depend on that example alone; False
        where norms use the statistics of the batch.
    """

    logits: Callable
    criterion: Callable
    penalty: Callable | None = None
    separable: bool = True

    def __call__(self, params: PyTree, batch: Any) -> Float[Array, ""]:
        """The loss."""
        mean = jnp.mean(self.criterion(self.logits(params, batch), batch))
        return mean if self.penalty is None else mean + self.penalty(params)


def classification(
    apply_fn: Callable,
    batch_stats: PyTree,
    *,
    norms: str = "frozen",
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    preprocess: Callable[[Any], Array] | None = None,
) -> Objective:
    """The mean cross-entropy of a model on batches of `image` and integer `label`.

    Args:
      apply_fn: `(params, batch_stats, images, train) -> (logits, batch_stats)`, as
        `models.Model.apply`.
      batch_stats: running statistics of norms, {} without any.
      norms: 'frozen' or 'batch', which statistics norms use, see above. Without norms
        both are the same.
      weight_decay: coefficient of half the squared L2 norm of all kernels
        (`masks.is_kernel`); 0 leaves the penalty out, as the paper does.
      label_smoothing: share of the target that is spread evenly over all classes.
      preprocess: makes model inputs of `batch["image"]`; the images themselves if None.
    """
    if norms not in ("frozen", "batch"):
        raise ValueError(f"norms={norms!r} is unknown; write 'frozen' or 'batch'")

    def logits(params, batch):
        images = batch["image"] if preprocess is None else preprocess(batch["image"])
        return apply_fn(params, batch_stats, images, norms == "batch")[0]

    def penalty(params):
        kernels = masks_lib.layers(params).values()
        return 0.5 * weight_decay * sum(jnp.sum(w * w) for w in kernels)

    separable = norms == "frozen" or not jax.tree.leaves(batch_stats)
    criterion = cross_entropy
    if label_smoothing:
        criterion = functools.partial(cross_entropy, label_smoothing=label_smoothing)
    return Objective(logits, criterion, penalty if weight_decay else None, separable)


def cross_entropy(
    logits: Float[Array, "b c"], batch: Any, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Cross-entropy (nats) of each example with its `batch["label"]`, int [b]."""
    labels: Int[Array, " b"] = jnp.asarray(batch["label"])
    log_p = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    if not label_smoothing:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * jnp.mean(log_p, axis=1)
