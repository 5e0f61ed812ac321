"""Loss on straight lines to the pruning solution, on Fashion-MNIST and both networks.

The paper has it for LeNet-5 on MNIST alone, see `interpolation`.
"""

import pandas as pd
from matplotlib.figure import Figure

from experiments import interpolation
from experiments.accuracy_table import NETWORKS
from experiments.fashion import DATA
from experiments.publish import Tables
from experiments.trainings import Setup, Training

ABOUT = "loss from starts and ends to the pruning solution on Fashion-MNIST"
KINDS = ("start", "end")


def settings(setup: Setup) -> dict:
    """Of lines; 0 examples are all training images."""
    return {"examples": interpolation.settings(setup)["examples"]}


def runs(setup: Setup) -> list[Training]:
    """Those of both networks that share the masks of the pruning run of their seed."""
    return [t for n in NETWORKS for t in interpolation.runs(setup, n, DATA)]


def collect(setup: Setup) -> Tables:
    """A row for each point of a path; `barriers` has one for each path."""
    rows = interpolation.points(runs(setup), setup, KINDS)
    by = ["network", *interpolation.BY]
    return {"": rows, "barriers": interpolation.barriers(rows, by)}


def plot(found: Tables) -> dict[str, Figure]:
    """A figure for each network."""
    rows = found[""]
    return {
        network: interpolation.plot({"": rows[rows["network"] == network]})[""]
        for network in NETWORKS
    }


def beside(found: Tables) -> pd.DataFrame:
    """Barriers of each kind of path."""
    return interpolation.beside(found, ("network",))
