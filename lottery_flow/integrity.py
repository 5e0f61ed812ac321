"""What a checkpoint says of itself, so that damage is found and not trained on.

    digest(x) = SHA-256(dtype; shape; bytes of x)                  (FIPS 180-4)

The record of a checkpoint holds the digest of every array and the active weights of
every masked layer, and it is only made of a state whose inactive weights are zero. It
is one more item of the checkpoint and committed with it, so that there is never one
without the other. To make or verify it takes a copy of the state to the host and, where
the processor has instructions for it, a second for a gigabyte.

Of an array that is cut over many processes nobody has all bytes: its digest is null and
nothing is verified by it. All that one process has, or can read alone, is.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

Record = Mapping[str, Any]  # {'sha256': {name: digest or None}, 'n_active': {layer: n}}

_MASKS = "network/masks/"
_WEIGHTS = "network/params/", "network/ema/"


def record(network: PyTree, training: PyTree) -> Record:
    """The record of a state, as JSON takes it.

    Args:
      network, training: the items of a checkpoint, see `checkpoint`.

    Raises:
      ValueError: an inactive weight is not zero.
    """
    arrays = _arrays({"network": network, "training": training})
    broken = _not_zero(arrays)
    if broken is not None:
        raise ValueError(broken)
    n_active = {k.removesuffix("/kernel"): n for k, n in _counts(arrays).items()}
    return {"sha256": _digests(arrays), "n_active": n_active}


def parse(text: str) -> Record:
    """The record that was written as `text`.

    Raises:
      ValueError: it was not.
    """
    found = json.loads(text)
    kinds = {"sha256": (str, type(None)), "n_active": (int,)}
    for name, kind in kinds.items():
        own = found.get(name) if isinstance(found, dict) else None
        if not isinstance(own, dict) or not all(
            isinstance(value, kind) for value in own.values()
        ):
            raise ValueError(f"no {name} in it")
    return found


def problem(expected: Record, **items: PyTree) -> str | None:
    """What of a checkpoint is not as its record says; None if nothing is.

    Args:
      expected: its record.
      items: `network`, `training` or both, on the host or on devices.
    """
    arrays = _arrays(items)
    found = _digests(arrays)
    own = {
        name: digest
        for name, digest in expected["sha256"].items()
        if name.partition("/")[0] in items
    }
    for name in sorted(own.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in own:
            return f"{name} is not in its record"
        if None not in (own[name], found[name]) and own[name] != found[name]:
            return f"{name} is not what was written"
    for path, n in _counts(arrays).items():
        layer, nobody_knew = path.removesuffix("/kernel"), own[_MASKS + path] is None
        there = expected["n_active"].get(layer, n if nobody_knew else None)
        if there != n:
            return f"{layer} has {n} active weights and {there} in its record"
    return _not_zero(arrays)


def _arrays(items: Mapping[str, PyTree]) -> dict[str, np.ndarray | None]:
    """Every array by its path, on the host; None of what this process has no whole."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
    ]
    # All at once: the copies of one array do not wait for those of another.
    found = jax.device_get([_whole(leaf) for _, leaf in leaves])
    return dict(zip(names, found, strict=True))


def _whole(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.is_fully_replicated:
        # An array of its own, so that no copy on the host is kept with the state,
        # whose buffers are given away by the next step.
        return leaf.addressable_data(0)
    return leaf if leaf.is_fully_addressable else None


def _digests(arrays: Mapping[str, np.ndarray | None]) -> dict[str, str | None]:
    return {k: None if a is None else _digest(a) for k, a in sorted(arrays.items())}


def _digest(array: np.ndarray) -> str:
    found = hashlib.sha256(f"{array.dtype.name};{array.shape};".encode())
    if array.size:
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _masks(arrays: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """By the path of what they are of."""
    return {
        name.removeprefix(_MASKS): array
        for name, array in arrays.items()
        if name.startswith(_MASKS) and array is not None
    }


def _counts(arrays: Mapping[str, np.ndarray | None]) -> dict[str, int]:
    return {k: int(np.count_nonzero(m)) for k, m in _masks(arrays).items()}


def _not_zero(arrays: Mapping[str, np.ndarray | None]) -> str | None:
    """Says which inactive weights are not zero, None if all are."""
    for path, mask in _masks(arrays).items():
        for prefix in _WEIGHTS:
            weights = arrays.get(prefix + path)
            if weights is None:
                continue
            n = np.count_nonzero((weights != 0) & ~mask)
            if n:
                return f"{n} inactive weights of {prefix + path} are not zero"
    return None
