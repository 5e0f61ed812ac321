"""New matplotlib figures that need no display and no global state."""

from typing import Any

from matplotlib.figure import Figure


def new(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes: one, or a numpy array of them.

    Args:
      rows: of axes.
      columns: of axes.
      **options: for `Figure.subplots`, for instance `sharex`.
    """
    fig = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, **options)
