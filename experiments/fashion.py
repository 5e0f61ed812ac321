"""The accuracy table and the gradient flow on Fashion-MNIST, which the paper has not.

The same networks, sparsities and settings as on MNIST.
"""

import pandas as pd
from matplotlib.figure import Figure

from experiments import accuracy_table, gradient_flow_training
from experiments.publish import Tables
from experiments.trainings import Setup, Training

ABOUT = "accuracy table and gradient flow on Fashion-MNIST"
DATA = "fashion_mnist"


def settings(setup: Setup) -> dict:
    """Nothing beside the trainings."""
    return {}


def runs(setup: Setup) -> list[Training]:
    """Those of the accuracy table, which hold those of the gradient flow."""
    return accuracy_table.runs(setup, DATA)


def collect(setup: Setup) -> Tables:
    """The tables of both."""
    flow = gradient_flow_training.collect(setup, DATA)
    return accuracy_table.collect(setup, DATA) | {"gradient_norm": flow[""]}


def plot(found: Tables) -> dict[str, Figure]:
    """The figures of both."""
    flow = gradient_flow_training.plot({"": found["gradient_norm"]})
    return accuracy_table.plot(found) | {"gradient_norm": flow[""]}


def beside(found: Tables) -> pd.DataFrame:
    """Ours alone."""
    return accuracy_table.beside(found).drop(columns="paper")
