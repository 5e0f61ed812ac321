"""What the paper reports: the only place where its numbers stand.

Evci, Ioannou, Keskin and Dauphin, "Gradient Flow in Sparse Neural Networks and How
Lottery Tickets Win", AAAI 2022 (arXiv 2010.03533). Plots and comparisons read this
file; nothing that collects our results does. Curves were read off the vector graphics
of the authors' post on the paper, with an error of about 0.2 % of an axis. Accuracies
of the methods on MNIST beside those of the ensemble table are not public in numbers.
"""

# Standard deviation of LeNet-5's logits at initialisation, on masks with uneven fan-in,
# by sparsity. Without sparsity every curve is the framework's default initialisation.
SIGNAL_SPARSITY = (
    *(0.0, 0.07, 0.14, 0.21, 0.28, 0.35, 0.42, 0.49),
    *(0.56, 0.63, 0.70, 0.77, 0.84, 0.91, 0.98),
)
SIGNAL_STD = {
    "masked_dense": (
        *(0.147, 0.241, 0.191, 0.0701, 0.0793, 0.0949, 0.0869, 0.0358),
        *(0.0112, 0.0145, 0.0170, 0.00622, 0.00102, 4.2e-4, 4.6e-6),
    ),
    "layer_scaled": (
        *(0.234, 1.86, 2.30, 2.22, 1.97, 1.26, 1.67, 1.28),
        *(2.06, 2.07, 2.07, 1.28, 1.37, 1.50, 0.0097),
    ),
    "per_neuron": (
        *(0.250, 1.79, 1.55, 2.35, 1.47, 1.01, 1.11, 1.61),
        *(0.737, 1.17, 0.845, 1.27, 0.210, 0.0749, 0.0564),
    ),
}

# Gradient norm of LeNet-5 on MNIST at 95 % sparsity during training, mean over seeds:
# {curve: {step: norm}}.
_STEPS = (
    *(100, 200, 300, 400, 600, 800, 1000, 1300, 1600),
    *(2000, 3000, 5000, 7000, 9000, 11719),
)


def _curve(*values: float | None) -> dict[int, float]:
    pairs = zip(_STEPS, values, strict=True)
    return {step: value for step, value in pairs if value is not None}


GRADIENT_NORM = {
    "lottery": _curve(
        *(0.031, 0.085, 0.565, 0.448, 0.615, 0.274, 0.245, 0.230, 0.292),
        *(0.284, 0.342, 0.238, 0.181, 0.163, 0.172),
    ),
    "rigl+": _curve(
        *(2.537, 2.538, None, 1.283, 1.697, 1.460, 1.065, 0.665, 0.692),
        *(0.501, 0.372, 0.457, 0.256, 0.205, 0.196),
    ),
    "scratch": _curve(
        *(0.047, 0.034, 0.036, 0.030, 0.033, 0.034, 0.505, 1.121, 0.337),
        *(0.255, 0.340, 0.223, 0.250, 0.227, 0.161),
    ),
    "scratch+": _curve(
        *(1.156, 1.138, 0.722, 0.575, 0.574, 0.733, 0.528, 0.441, 0.317),
        *(0.533, 0.334, 0.403, 0.280, 0.241, 0.222),
    ),
    "small_dense": _curve(
        *(1.091, 1.091, None, 0.868, 0.553, 0.554, 0.539, 0.492, 0.577),
        *(0.503, 0.552, 0.459, 0.386, 0.280, 0.264),
    ),
}

# Test accuracy (%) of LeNet-5 on MNIST, mean and spread of five models.
ENSEMBLE_ACCURACY = {
    "lottery": (98.52, 0.02),
    "scratch": (97.04, 0.15),
    "scratch, other inits": (97.19, 0.33),
    "prune restart": (98.60, 0.01),
    "pruning solution": (98.53, None),
    "other pruning solutions": (98.30, 0.23),
}

# Orderings and shapes that the paper shows without numbers for MNIST.
EXPECTED = {
    "rewire_gain": (
        "RigL: large and positive in the first thousand steps, gone by step 2,000; "
        "SET: small and positive early; RigL inverted: about zero"
    ),
    "interpolation": (
        "from both starts the loss falls monotonically; from the lottery end it is "
        "flat; from the scratch end a high barrier stands between"
    ),
    "mds": (
        "the lottery start is nearer to the pruning solution than the scratch starts; "
        "lottery ends lie close together and nearest to it; scratch ends far from it "
        "and from one another"
    ),
    "hessian_spectrum": "rewires of RigL create new negative eigenvalues",
    "ensembles": (
        "gain of the ensemble far lower for lottery and prune restart than for all "
        "others; best ensemble: other pruning solutions; disagreement with the "
        "pruning solution: prune restart < lottery < other pruning solutions < scratch"
    ),
}
