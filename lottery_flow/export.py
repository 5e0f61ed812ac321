"""A sparse network as one file: the active weights, and a bit for each weight.

    python -m lottery_flow.export --run=runs/rigl_lenet5-.../seed_0 --out=rigl.model

A file in the safetensors layout, which other programs read too. A leaf with a mask is
two tensors, a dense leaf is one:

    params/conv1/kernel.values   the active weights, by flat index
    params/conv1/kernel.mask     uint8, a bit for each weight, the first one highest
    params/conv1/bias            as it is
    batch_stats/...              statistics of norms, as they are

`lottery_flow.inference` makes a function of it that costs by its active weights. The
file's metadata have the shapes of leaves with a mask (`shapes`, as JSON) and a
checksum of all tensors (`sha256`). Loaded again, every leaf has the same bits. The size
is the one that `counting` counts, but for norms, of which it counts one number for each
channel, and a header of some kilobytes.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import scipy.sparse
from absl import flags
from jax.experimental.sparse import BCSR
from jaxtyping import Array, Bool, Float
from safetensors.numpy import save as serialize

from lottery_flow import build, checkpoint, command, counting, files, recorded
from lottery_flow.errors import UserError
from lottery_flow.runs import RunPaths
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Masks, Params

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "U8": np.uint8,
    "I32": np.int32,
}


class Exported(NamedTuple):
    """What a file holds, as nested dicts of numpy arrays.

    Attributes:
      params: the parameters; inactive weights are zero.
      masks: the same tree, None where a leaf is dense.
      batch_stats: statistics of norms; {} without any.
      about: texts that were stored along.
    """

    params: Any
    masks: Any
    batch_stats: Any
    about: dict[str, str]


def save(
    path: str | Path,
    params: Params,
    masks: Masks,
    batch_stats: Any = None,
    about: Mapping[str, str] | None = None,
) -> int:
    """Writes a network, whole or not at all; the size of the file in bytes.

    Args:
      path: of the file; one that is there is replaced.
      params: nested dicts of arrays.
      masks: the same tree, None where a leaf is dense.
      batch_stats: statistics of norms, nested dicts of arrays.
      about: texts to store along.

    Raises:
      ValueError: masks that do not fit, or inactive weights that are not zero.
    """
    masks_lib.check(masks, params)
    leaves, own = _flat(params), _flat(masks)
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        mask = own.get(name)
        if mask is None:
            tensors[f"params/{name}"] = leaf
            continue
        lost = int(np.count_nonzero(leaf[~mask]))
        if lost:
            raise ValueError(
                f"{name}: {lost} inactive weights are not zero and would be lost; "
                "apply the masks first, masks.apply(masks, params)"
            )
        tensors[f"params/{name}.values"] = leaf[mask]
        tensors[f"params/{name}.mask"] = np.packbits(mask.ravel())
    for name, leaf in _flat(batch_stats or {}).items():
        tensors[f"batch_stats/{name}"] = leaf
    shapes = {k: list(v.shape) for k, v in leaves.items() if own.get(k) is not None}
    texts = {**(about or {}), "shapes": json.dumps(shapes), "sha256": _sha256(tensors)}
    content = serialize(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=texts
    )
    files.write(Path(path), content)
    return len(content)


def load(path: str | Path) -> Exported:
    """The network of a file that `save` wrote.

    Raises:
      ValueError: the file is damaged, or not one of ours.
      OSError: there is no such file.
    """
    content = Path(path).read_bytes()
    try:
        return _read(content)
    except _UNREADABLE as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"{path} is damaged, or no network that was exported ({reason}); export it "
            "anew"
        ) from error


# At a file that is damaged, or was made to do harm.
_UNREADABLE = (
    *(AttributeError, KeyError, MemoryError, OverflowError, RecursionError, TypeError),
    *(ValueError, safetensors.SafetensorError),
)


def _read(content: bytes) -> Exported:
    """The network of a file's content; a name in it is a key and never a path."""
    tensors = {
        name: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"])
        for name, t in safetensors.deserialize(content)
    }
    n = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + n]).get("__metadata__", {})
    shapes = json.loads(about.pop("shapes"))
    if about.pop("sha256") != _sha256(tensors):
        raise ValueError("its checksum is another")
    params, masks = {}, {}
    for name, shape in shapes.items():
        values, bits = (tensors.pop(f"params/{name}.{k}") for k in ("values", "mask"))
        size = math.prod(shape)
        # A few bytes must not ask for all of the memory.
        if bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
            raise ValueError(f"{name}: {bits.size} bytes of mask for {size} weights")
        mask = np.unpackbits(bits, count=size).astype(bool).reshape(shape)
        if values.shape != (np.count_nonzero(mask),):
            raise ValueError(f"{name}: {values.size} values are not those of its mask")
        params[name], masks[name] = np.zeros(shape, values.dtype), mask
        params[name][mask] = values
    stats = {}
    for name, tensor in tensors.items():
        group, _, leaf = name.partition("/")
        if group not in ("params", "batch_stats"):
            raise ValueError(f"{name} is of no group")
        (params if group == "params" else stats)[leaf] = tensor
    masks = dict.fromkeys(params) | masks
    return Exported(_nested(params), _nested(masks), _nested(stats), about)


def csr(
    kernel: Float[Array | np.ndarray, "..."], mask: Bool[Array | np.ndarray, "..."]
) -> scipy.sparse.csr_array:
    """A kernel as a compressed matrix [out, all the rest], a row for each neuron.

    Its entries are the active weights, those that are zero at the moment too.

    Args:
      kernel: [..., in, out].
      mask: what is active, of the same shape.
    """
    kernel, mask = np.asarray(kernel), np.asarray(mask)
    n_out = kernel.shape[-1]
    weights, active = kernel.reshape(-1, n_out).T, mask.reshape(-1, n_out).T
    rows, columns = np.nonzero(active)
    starts = np.searchsorted(rows, np.arange(n_out + 1))
    return scipy.sparse.csr_array(
        (weights[active], columns, starts), shape=weights.shape
    )


def bcsr(
    kernel: Float[Array | np.ndarray, "..."], mask: Bool[Array | np.ndarray, "..."]
) -> BCSR:
    """The matrix of `csr` for JAX."""
    m = csr(kernel, mask)
    entries = jnp.asarray(m.data), jnp.asarray(m.indices), jnp.asarray(m.indptr)
    return BCSR(entries, shape=(kernel.shape[-1], kernel.size // kernel.shape[-1]))


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    own: Any = {"flag_values": values}
    flags.DEFINE_string("run", "", "Directory (seed_N) of a run.", **own)
    flags.DEFINE_integer("step", -1, "Of the checkpoint; -1: the newest.", **own)
    flags.DEFINE_string("out", "", "File to write.", **own)


def main(argv: Sequence[str]) -> None:
    """Writes a network of a run, and says how large it is."""
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; flags begin with --")
    values = flags.FLAGS
    for name in ("run", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is missing")
    step, network = checkpoint.restore_network(
        RunPaths(Path(values.run)).checkpoints, values.step
    )
    about = {
        "run": Path(values.run).parent.name,
        "step": str(step),
        "model": json.dumps(build.description(recorded.read(Path(values.run)).config)),
    }
    try:
        size = save(values.out, *_parts(network), about)
    except OSError as error:
        raise UserError(f"--out={values.out!r}: {error.strerror}") from error
    shapes = {k: v.shape for k, v in masks_lib.layers(network.params).items()}
    counted, dense = (
        counting.model_megabytes(shapes, n)
        for n in (masks_lib.counts(network.masks, network.params), None)
    )
    print(
        f"{values.out}: {size / 1e6:.3f} MB; counted are {counted:.3f} MB, and "
        f"{dense:.3f} MB for the dense network"
    )


def cli() -> None:
    """The command, from the shell."""
    define_flags(flags.FLAGS)
    command.run(main)


def _parts(network: checkpoint.Network) -> tuple[Any, Any, Any]:
    return network.params, network.masks, network.batch_stats


def _sha256(tensors: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        total.update(np.ascontiguousarray(tensor).tobytes())
    return total.hexdigest()


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Leaves of nested dicts by their path; None is no leaf."""
    found = {}
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise ValueError(f"{prefix}{key}: names are texts without a slash")
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            found[prefix + key] = np.asarray(value)
    return found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in sorted(flat.items()):
        *groups, last = name.split("/")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name} is inside of another leaf")
        inner[last] = value
    return tree


if __name__ == "__main__":
    cli()
