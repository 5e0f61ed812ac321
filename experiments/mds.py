"""A map of starts, ends and the pruning solution (the paper's figure 5a).

Seventeen networks of LeNet-5 in the plane that keeps the L2 distances between their
weights best (metric SMACOF): the start of a ticket and five ends, five starts and ends
of scratch on the same masks, and the pruning solution.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.publish import Tables
from experiments.trainings import TICKET_SEED, Setup, Training, members, tickets
from lottery_flow import checkpoint
from lottery_flow.analysis import figures
from lottery_flow.analysis import mds as mds_lib
from lottery_flow.runs import RunPaths

ABOUT = "map of starts, ends and the pruning solution"
# By the name of the scratch networks: the paper's, and with the sparse init.
MAPS = ("scratch, other inits", "scratch+, other inits")


def settings(setup: Setup) -> dict:
    """Of the embedding."""
    return {"random_state": 0, "ticket_seed": TICKET_SEED}


def runs(setup: Setup) -> list[Training]:
    """Tickets, scratch runs and the pruning run."""
    own = tickets(setup)
    return [t for name in ("lottery", *MAPS) for t in own[name]]


def collect(setup: Setup) -> Tables:
    """Positions of each map; `distances` has all pairs."""
    own, points, pairs = tickets(setup), [], []
    solution = Training("lenet5", "prune")
    for name in MAPS:
        ends = members(own["lottery"], setup)
        starts = members(own[name], setup)
        networks = [
            ("lottery start", *ends[0], 0),
            *(("lottery end", *one, -1) for one in ends),
            *(("scratch start", *one, 0) for one in starts),
            *(("scratch end", *one, -1) for one in starts),
            ("pruning solution", solution, TICKET_SEED, -1),
        ]
        params = [
            checkpoint.restore_network(
                RunPaths(training.run(setup, seed)).checkpoints, step
            )[1].params
            for _, training, seed, step in networks
        ]
        labels = [label for label, *_ in networks]
        found = mds_lib.embed(mds_lib.distance_matrix(params), labels, random_state=0)
        frame = found.frame().assign(
            map=name,
            seed=[seed for *_, seed, _ in networks],
            config=[training.digest(setup) for _, training, *_ in networks],
            stress_1=float(found.stress_1),
        )
        points.append(frame)
        for i, j in zip(*np.triu_indices(len(params), 1), strict=True):
            pairs.append((name, labels[i], labels[j], found.distances[i, j]))
    columns = ["map", "from", "to", "distance"]
    return {
        "": pd.concat(points, ignore_index=True),
        "distances": pd.DataFrame(pairs, columns=columns),
    }


def plot(found: Tables) -> dict[str, Figure]:
    """Both maps."""
    fig, axes = figures.new(1, len(MAPS))
    rows = found[""]
    for ax, name in zip(axes, MAPS, strict=True):
        own = rows[rows["map"] == name]
        for label in dict.fromkeys(own["label"]):
            part = own[own["label"] == label]
            marker = {"lottery start": "^", "pruning solution": "*"}.get(label, "o")
            ax.plot(part["x"], part["y"], marker, label=label, ls="")
        ax.set(title=f"{name}; stress-1 {own['stress_1'].iloc[0]:.3f}")
        ax.set_aspect("equal", adjustable="datalim")
        ax.legend(fontsize=8)
    return {"": fig}


def beside(found: Tables) -> pd.DataFrame:
    """Mean distances between the kinds of networks."""
    pairs = found["distances"]
    mean = pairs.groupby(["map", "from", "to"], sort=False)["distance"].mean()
    return mean.map("{:.3f}".format).reset_index().astype(object)
