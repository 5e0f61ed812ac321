"""What can be asked of a finished run: a function for each, by name in `STUDIES`.

A study takes an opened run and options, and returns findings: tables, figures and a
few words. It calls the functions of `analysis`, which is where definitions stand.
"""

from collections.abc import Callable
from typing import NamedTuple

from lottery_flow.studies import gradients, hessians, networks, paths
from lottery_flow.studies.common import Findings, Options
from lottery_flow.study import Study

__all__ = ["STUDIES", "Findings", "Options", "Question"]


class Question(NamedTuple):
    """A study, and what it needs.

    Attributes:
      ask: `(study, options) -> Findings`.
      about: one line for the help.
      uses: the options that it heeds, beside `against`.
      n_against: how many other runs it needs, at least and at most.
      whole_run: whether it looks at all checkpoints instead of one.
    """

    ask: Callable[[Study, Options], Findings]
    about: str
    uses: tuple[str, ...]
    n_against: tuple[int, int] = (0, 0)
    whole_run: bool = False


LOSS = ("examples", "batch_size", "norms", "weight_decay")
PATH = (*LOSS, "mask")

STUDIES: dict[str, Question] = {
    "gradient_flow": Question(
        gradients.gradient_flow_, "its norm over training", LOSS, whole_run=True
    ),
    "gradient_norm": Question(
        gradients.gradient_norm, "by layer; the decrease of the loss", LOSS
    ),
    "gradient_noise": Question(gradients.noise, "gradients of single examples", LOSS),
    "rewire": Question(
        gradients.rewire, "gradient norm before and after the next rewire", LOSS
    ),
    "rules": Question(
        gradients.compare_rules,
        "the same by RigL, SET and RigL inverted",
        (*LOSS, "seed"),
    ),
    "signal": Question(
        gradients.signal_propagation,
        "signals at initialisation",
        ("batch_size", "seed"),
    ),
    "spectrum": Question(
        hessians.exact_spectrum, "all eigenvalues of the Hessian", LOSS
    ),
    "rewire_spectra": Question(
        hessians.rewire_spectra, "before and after the next rewire", LOSS
    ),
    "top": Question(
        hessians.top_eigenvalues,
        "extreme eigenvalues; the gradient's share",
        (*LOSS, "seed"),
    ),
    "density": Question(hessians.density, "spectral density", (*LOSS, "seed")),
    "trace": Question(
        hessians.trace, "trace and diagonal of the Hessian", (*LOSS, "seed")
    ),
    "classes": Question(
        hessians.classes, "class structure of the Gauss-Newton matrix", LOSS
    ),
    "interpolation": Question(
        paths.interpolate, "line to another network", PATH, (1, 1)
    ),
    "alignment": Question(paths.align, "the same with permuted units", LOSS, (1, 1)),
    "curve": Question(
        paths.curve,
        "Bezier curve to another network",
        (*PATH, "train_steps", "seed"),
        (1, 1),
    ),
    "autoneb": Question(
        paths.neb,
        "chain of low loss to another network",
        (*PATH, "train_steps", "seed"),
        (1, 1),
    ),
    "distances": Question(
        networks.distances, "to the start, to another", (), (0, 1), True
    ),
    "masks": Question(networks.overlap, "overlap with another network's", (), (1, 1)),
    "mds": Question(
        networks.embedding, "starts and ends in a plane", ("seed",), (1, 1000)
    ),
    "surface": Question(
        networks.loss_surface,
        "around a network, through three",
        (*LOSS, "seed"),
        (0, 2),
    ),
    "ensembles": Question(
        networks.ensemble, "with other networks", ("batch_size", "norms"), (1, 1000)
    ),
    "calibration": Question(
        networks.calibrate, "of predicted probabilities", ("batch_size", "norms")
    ),
}
