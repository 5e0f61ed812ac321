"""Forward signal at initialisation against sparsity (the paper's figure 1c).

Standard deviation of LeNet-5's logits on inputs from N(0, 1), for masks that leave the
first units of each layer few inputs (the released notebook's) and for uniform ones.
"""

import functools

import jax
import pandas as pd
from matplotlib.figure import Figure

from experiments import paper
from experiments.bands import band
from experiments.publish import Tables
from experiments.trainings import INITS, Setup, Training
from lottery_flow import models
from lottery_flow.analysis import figures, signal
from lottery_flow.sparsity import initializers

ABOUT = "std of the logits at initialisation against sparsity"
SHAPE = (28, 28, 3)  # the notebook's
MASKS = {"uneven": signal.uneven_masks, "uniform": signal.uniform_masks}


def settings(setup: Setup) -> dict:
    """Of the draws."""
    sparsities = [round(0.07 * i, 2) for i in range(15)]
    return {
        "sparsities": sparsities[::7] if setup.smoke else sparsities,
        "draws": 2 if setup.smoke else 20,
        "examples": 50 if setup.smoke else 500,
        "seed": 0,
    }


def runs(setup: Setup) -> list[Training]:
    """Nothing is trained."""
    return []


def collect(setup: Setup) -> Tables:
    """A row for each initialisation, kind of masks, sparsity and draw."""
    own = settings(setup)
    model = models.create("lenet5", SHAPE, 10)
    key = jax.random.key(own["seed"])
    variables = model.init(jax.random.fold_in(key, 0))
    n = own["examples"]
    batch = {
        "image": jax.random.normal(jax.random.fold_in(key, 1), (n, *SHAPE)),
        "label": jax.random.randint(jax.random.fold_in(key, 2), (n,), 0, 10),
    }

    def trace(params, batch, perturbations):
        return model.trace(params, {}, batch["image"], True, perturbations)

    frames = []
    for masks, make in MASKS.items():
        for init in INITS:
            found = signal.signal_propagation(
                trace,
                functools.partial(initializers.INITIALIZERS[init]),
                make,
                variables["params"],
                batch,
                own["sparsities"],
                n_draws=own["draws"],
                key=jax.random.fold_in(key, 3),
            )
            frames.append(found.frame().assign(masks=masks, init=init))
    rows = pd.concat(frames, ignore_index=True)
    return {"": rows[["masks", "init", *rows.columns[:-2]]]}


def plot(found: Tables) -> dict[str, Figure]:
    """Mean and range over the draws; the paper's curves as dots."""
    rows = found[""]
    logits = rows[rows["quantity"] == "logit_std"]
    fig, axes = figures.new(1, 2, sharey=True)
    for ax, masks in zip(axes, MASKS, strict=True):
        for i, init in enumerate(INITS):
            own = logits[(logits["masks"] == masks) & (logits["init"] == init)]
            band(ax, own, "sparsity", "value", f"C{i}", init)
            if masks == "uneven":
                ax.plot(paper.SIGNAL_SPARSITY, paper.SIGNAL_STD[init], f"C{i}o", ms=3.5)
        ax.set(xlabel="sparsity", ylabel="std of the logits", yscale="log")
        ax.set(
            title=f"{masks} masks" + ("; dots: the paper" if masks == "uneven" else "")
        )
        ax.set(ylim=(1e-7, 20))
        ax.legend(fontsize=8)
    return {"": fig}


def beside(found: Tables) -> pd.DataFrame:
    """Means over the draws on uneven masks, ours and the paper's."""
    rows = found[""]
    logits = rows[rows["quantity"] == "logit_std"]
    mean = logits.groupby(["masks", "init", "sparsity"])["value"].mean()
    lines = []
    for init in INITS:
        theirs = dict(zip(paper.SIGNAL_SPARSITY, paper.SIGNAL_STD[init], strict=True))
        for s in sorted(set(logits["sparsity"])):
            even = mean["uniform", init, s]
            lines.append(
                (
                    init,
                    s,
                    f"{mean['uneven', init, s]:.2g}",
                    f"{theirs[s]:.2g}",
                    f"{even:.2g}",
                )
            )
    columns = ["init", "sparsity", "ours, uneven", "paper, uneven", "ours, uniform"]
    return pd.DataFrame(lines, columns=columns)
