"""Results as values: NamedTuples of arrays, or tidy frames; saved and read again.

A NamedTuple goes into an `.npz` file (arrays alone, nothing in it can execute code), a
frame into a `.csv` file. Every result NamedTuple has a method `frame()`, the same as a
tidy table: one observation a row.
"""

from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import matplotlib.figure
import numpy as np
import pandas as pd

from lottery_flow.files import replacing

Result = TypeVar("Result")
# What numpy raises at files that are damaged, or hold objects and not numbers alone.
UNREADABLE = (AttributeError, EOFError, KeyError, TypeError, ValueError, BadZipFile)


def save(path: str | Path, result: Any) -> Path:
    """Writes a result whole or not at all.

    Args:
      path: ends in `.npz` for a NamedTuple of arrays, in `.csv` for a frame (or for
        the `frame()` of a NamedTuple), in `.png`, `.pdf` or `.svg` for a figure.
      result: what to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if isinstance(result, matplotlib.figure.Figure):
            result.savefig(temporary, dpi=150)
        elif path.suffix == ".csv":
            frame = result if isinstance(result, pd.DataFrame) else result.frame()
            frame.to_csv(temporary, index=False)
        elif path.suffix == ".npz":
            fields: Any = {k: np.asarray(v) for k, v in result._asdict().items()}
            np.savez(temporary, **fields)
        else:
            ends = f"{path} ends in {path.suffix!r}"
            raise ValueError(f"{ends}; write .npz, .csv or .png")
    return path


def load(path: str | Path, kind: type[Result] | None = None) -> Any:
    """Reads what `save` wrote.

    Args:
      path: of an `.npz` or a `.csv` file.
      kind: the NamedTuple that an `.npz` file holds; not used for a `.csv`.

    Returns:
      A NamedTuple `kind` of numpy arrays, or a frame.

    Raises:
      ValueError: the file holds something else.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return pd.read_csv(path)
    try:
        # Opened here: np.load leaves the file open where it is no zip file.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            fields = {k: found[k] for k in found.files}
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is damaged, or no .npz file of arrays alone "
            f"({str(error)[:200]}); make it anew"
        ) from error
    wanted = getattr(kind, "_fields", ())
    if kind is None or set(wanted) != set(fields):
        raise ValueError(
            f"{path} holds the fields {', '.join(fields)}; give the kind of result "
            f"that has them, not {getattr(kind, '__name__', kind)}"
        )
    return kind(**fields)
