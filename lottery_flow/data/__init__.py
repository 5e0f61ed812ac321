"""Images in, batches out: data sets that fit in memory, as numpy arrays.

`DATASETS` maps a name to what is known without reading (`Spec`) and to the function
that reads (`load`). No module here imports jax, and reading never imports TensorFlow;
only `python -m lottery_flow.data.prepare` does.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lottery_flow.data import digits, tfds_arrays
from lottery_flow.data.arrays import (
    Arrays,
    Spec,
    batch_indices,
    gather,
    padded_batches,
)


class Source(NamedTuple):
    """A data set that can be read.

    `load` takes the TFDS data directory ("" is TFDS's own default: the environment
    variable TFDS_DATA_DIR, or else ~/tensorflow_datasets) and returns arrays that agree
    with `spec`. It raises UserError where the data set is missing, damaged or other
    than `spec` says.
    """

    spec: Spec
    load: Callable[[str], Arrays]


DATASETS: dict[str, Source] = {
    "digits": Source(digits.SPEC, digits.load),
    **{
        name: Source(spec, partial(tfds_arrays.load, spec))
        for name, spec in tfds_arrays.SPECS.items()
    },
}

__all__ = [
    "DATASETS",
    "Arrays",
    "Source",
    "Spec",
    "batch_indices",
    "gather",
    "padded_batches",
]
