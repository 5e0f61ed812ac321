"""The curve that all experiments draw: a mean over seeds, and their range around it."""

import pandas as pd
from matplotlib.axes import Axes


def band(
    ax: Axes,
    rows: pd.DataFrame,
    x: str,
    y: str,
    color: str,
    label: str,
    *,
    dashed: bool = False,
) -> None:
    """Mean of column `y` at each value of column `x`, from lowest to highest shaded."""
    grouped = rows.groupby(x)[y]
    mean, low, high = grouped.mean(), grouped.min(), grouped.max()
    style = "--" if dashed else "-"
    ax.plot(mean.index, mean, style, color=color, label=label, lw=1.3)
    ax.fill_between(mean.index, low, high, color=color, alpha=0.15, lw=0)
