"""Curvature of the loss at a network of a run."""

import jax
import numpy as np

from lottery_flow.analysis import (
    class_structure,
    curvature,
    hutchinson,
    lanczos,
    spectrum,
)
from lottery_flow.studies.common import Findings, Options, device, network
from lottery_flow.study import Study, next_rewire


def exact_spectrum(study: Study, options: Options) -> Findings:
    """All eigenvalues of the Hessian of the active parameters."""
    objective, params, masks, batches = network(study, options, "frozen", 0, 50)
    found = spectrum.exact_spectrum(
        objective, params, masks, batches, progress=options.progress
    )
    return Findings({"": found}, {"": spectrum.plot_spectrum(found)}, _describe(found))


def rewire_spectra(study: Study, options: Options) -> Findings:
    """Exact spectra just before and just after the next rewire."""
    step, before, after = next_rewire(study)
    study = study._replace(network=before)  # its statistics of norms, too
    objective, _, _, batches = network(study, options, "frozen", 10_000, 50)
    pair = spectrum.rewire_spectra(
        objective,
        (device(before.params), before.masks),
        (device(after.params), after.masks),
        batches,
        progress=options.progress,
    )
    text = f"rewire at step {step}; before: {_describe(pair[0])}; after: "
    figure = spectrum.plot_spectrum(*pair, labels=("before", "after"))
    tables = {"before": pair[0], "after": pair[1]}
    return Findings(tables, {"": figure}, text + _describe(pair[1]))


def top_eigenvalues(study: Study, options: Options) -> Findings:
    """The extreme eigenvalues, and the share of the gradient in their vectors."""
    operator, objective, args = _operator(study, options)
    key = jax.random.key(options.seed)
    pairs = {
        which: lanczos.top_eigenpairs(
            operator,
            10,
            key,
            which=which,
            tolerance=1e-5,
            progress=options.progress,
        )
        for which in ("largest", "smallest")
    }
    gradient = curvature.gradient(objective, *args)
    overlap = curvature.gradient_overlap(gradient, pairs["largest"].vectors)
    unsure = [
        which
        for which, pair in pairs.items()
        if np.any(pair.residuals > 1e-5 * np.abs(pairs["largest"].values[0]))
    ]
    text = (
        f"largest {pairs['largest'].values[0]:.6g}, smallest "
        f"{pairs['smallest'].values[0]:.6g}; {100 * overlap['overlap'].iloc[-1]:.1f} % "
        "of the squared gradient lies in the ten largest eigenvectors"
        + "".join(f"; the {which} did not converge" for which in unsure)
    )
    figures = {k: lanczos.plot_top_eigenpairs(v) for k, v in pairs.items()}
    figures["overlap"] = curvature.plot_gradient_overlap(overlap)
    return Findings({**pairs, "overlap": overlap}, figures, text)


def density(study: Study, options: Options) -> Findings:
    """The spectral density by stochastic Lanczos quadrature."""
    n_steps, n_probes = 100, 10
    operator = spectrum.hessian_operator(
        *_network(study, options), n_products=n_steps * n_probes
    )
    found = lanczos.spectral_density(
        operator,
        jax.random.key(options.seed),
        n_steps=n_steps,
        n_probes=n_probes,
        state_file=options.state_file,
        tag=options.tag,
        progress=options.progress,
    )
    text = (
        f"from {found.nodes.min():.4g} to {found.nodes.max():.4g}; "
        f"{100 * found.negative():.1f} % of the eigenvalues are negative"
    )
    return Findings({"": found}, {"": lanczos.plot_spectral_density(found)}, text)


def trace(study: Study, options: Options) -> Findings:
    """Trace and diagonal of the Hessian."""
    operator, *_ = _operator(study, options)
    keys = jax.random.split(jax.random.key(options.seed))
    found = hutchinson.trace(operator, keys[0], progress=options.progress)
    diagonal = hutchinson.diagonal(operator, keys[1], progress=options.progress)
    text = f"trace {found.mean:.5g} +- {found.standard_error:.2g}"
    return Findings(
        {"": found, "diagonal": diagonal},
        {
            "": hutchinson.plot_trace(found),
            "diagonal": hutchinson.plot_diagonal(diagonal),
        },
        text,
    )


def classes(study: Study, options: Options) -> Findings:
    """What of the Gauss-Newton matrix comes from classes."""
    args = network(study, options, "frozen", 10_000, 50)
    n_classes = study.job.spec.n_classes
    found = class_structure.class_structure(*args, n_classes=n_classes)
    traces = found.traces()
    total = sum(traces.values())
    text = f"trace {total:.4g}: " + ", ".join(
        f"{100 * value / total:.1f} % {part}" for part, value in traces.items()
    )
    figure = class_structure.plot_class_structure(found)
    return Findings({"": found}, {"": figure}, text)


def _network(study: Study, options: Options):
    # Few images at once stay in the cache of a core: half the time of 250.
    size = 50 if jax.default_backend() == "cpu" else 1000
    return network(study, options, "frozen", 1000, size)


def _operator(study: Study, options: Options):
    objective, *args = _network(study, options)
    return curvature.hessian(objective, *args), objective, args


def _describe(found: spectrum.Spectrum) -> str:
    counts = found.counts()
    return (
        f"{counts['negative']} negative, {counts['zero']} zero, {counts['positive']} "
        f"positive and {counts['dead']} dead of "
        f"{sum(counts.values())}; from {found.eigenvalues[0]:.4g} to "
        f"{found.eigenvalues[-1]:.4g}; {100 * found.negative_mass():.2f} % of the mass "
        "negative"
    )
