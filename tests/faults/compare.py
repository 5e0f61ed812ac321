"""Whether a run ended with the bits of one that nothing happened to."""

import collections
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lottery_flow import checkpoint


class Comparison(NamedTuple):
    """What is different; nothing, if the runs are the same.

    Attributes:
      lost, doubled: rows of metrics.
      differences: all that is not the same, in words.
    """

    lost: int
    doubled: int
    differences: list[str]


def compare(found: Path, whole: Path, may_have_more: bool = False) -> Comparison:
    """Compares all runs below two work directories.

    Parameters, masks, the optimizer and the keys are those of every checkpoint; the
    batches are in the losses of the rows.

    Args:
      found: had the faults.
      whole: had none.
      may_have_more: whether checkpoints beside those of `whole` are right, as SIGTERM
        leaves them.
    """
    own, expected = runs(found), runs(whole)
    told = [f"there are other runs: {own}, not {expected}"] if own != expected else []
    lost = doubled = 0
    for name in expected:
        rows = _lines(found / name), _lines(whole / name)
        less, more = (collections.Counter(_step(k) for k in lines) for lines in rows)
        doubled += sum((less - collections.Counter(set(less))).values())
        lost += len(more.keys() - less.keys())
        told += [f"{name}: {what}" for what in _differences(found / name, whole / name)]
        steps = checkpoint.steps_in(whole / name / "checkpoints")
        others = checkpoint.steps_in(found / name / "checkpoints")
        if others != steps and not (may_have_more and set(others) >= set(steps)):
            told.append(f"{name}: checkpoints of {others}, not of {steps}")
        for step in set(steps) & set(others):
            told += _arrays(found / name, whole / name, step)
    return Comparison(lost, doubled, told)


def runs(workdir: Path) -> list[str]:
    """The directories of runs, below a work directory."""
    found = workdir.rglob("config.json")
    return sorted(str(p.parent.relative_to(workdir)) for p in found)


def raw(run: Path, step: int) -> dict[str, tuple[str, bytes]]:
    """Every array of a checkpoint by its path: type and bytes."""
    found = {}
    for item in ("network", "training"):
        path = (run / "checkpoints" / str(step) / item).absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            # Whatever the devices were that it was saved from.
            own = ocp.RestoreArgs(restore_type=np.ndarray)
            args = jax.tree.map(lambda _, own=own: own, tree)
            restored = checkpointer.restore(path, restore_args=args)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            array = np.asarray(leaf)
            name = item + jax.tree_util.keystr(path)
            found[name] = f"{array.dtype}{array.shape}", array.tobytes()
    return found


def _differences(found: Path, whole: Path) -> list[str]:
    told = []
    for name in ("metrics.jsonl", "summary.txt", "DONE"):
        mine, theirs = (_read(run / name) for run in (found, whole))
        if mine != theirs:
            told.append(f"{name} is not the same")
    # A finished run is left as it is: with the lock of whom a kill kept from more.
    names = {p.name for p in found.glob("*")} - {"lock"}
    if names != {p.name for p in whole.glob("*")}:
        told.append(f"its files are {sorted(names)}")
    directory = found / "checkpoints"
    there = [p.name for p in directory.glob("*")]
    odd = [k for k in there if "tmp" in k or not k.split(".")[0].isdigit()]
    return told + [f"{odd} are left"] * bool(odd)


def _arrays(found: Path, whole: Path, step: int) -> list[str]:
    """Of the last step all bytes are compared, of the others digests, read anew."""
    damage = checkpoint.damage(found / "checkpoints", step)
    told = [f"the checkpoint of step {step} {damage}"] if damage is not None else []
    mine, theirs = (
        json.loads(_read(run / f"checkpoints/{step}/record/metadata") or "{}")
        for run in (found, whole)
    )
    if mine != theirs or "sha256" not in theirs:
        told.append(f"other arrays in the checkpoint of step {step}")
    last = checkpoint.steps_in(whole / "checkpoints")[-1]
    if step == last and damage is None and raw(found, step) != raw(whole, step):
        told.append(f"other bytes in the checkpoint of step {step}")
    return told


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _lines(run: Path) -> list[bytes]:
    return _read(run / "metrics.jsonl").splitlines()


def _step(line: bytes) -> int:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return -1
