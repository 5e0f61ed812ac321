"""Where networks lie, and what they predict."""

import jax
import numpy as np

from lottery_flow.analysis import calibration, ensembles, geometry, mds, surface
from lottery_flow.errors import UserError
from lottery_flow.studies.common import (
    Findings,
    Options,
    device,
    forward_batch,
    network,
)
from lottery_flow.study import Study


def distances(study: Study, options: Options) -> Findings:
    """Distances of all checkpoints to the start, and to another network."""
    solution = options.against[0].network.params if options.against else None
    points = ((step, network.params) for step, network in study.networks())
    frame = geometry.trajectory(points, solution)
    whole = frame[frame["layer"] == "all"]
    text = "; ".join(
        f"to the {name}: {part['l2'].iloc[0]:.4g} at first, "
        f"{part['l2'].iloc[-1]:.4g} in the end"
        for name, part in whole.groupby("reference", sort=False)
    )
    return Findings({"": frame}, {"": geometry.plot_trajectory(frame)}, text)


def overlap(study: Study, options: Options) -> Findings:
    """How far the masks agree with those of another network."""
    other = options.against[0]
    frame = geometry.mask_overlap(study.network.masks, other.network.masks)
    whole = frame[frame["layer"] == "all"].iloc[0]
    text = (
        f"with {other.name} (step {other.step}): intersection over union "
        f"{whole['iou']:.4f}, {whole['random_iou']:.4f} by chance"
    )
    return Findings({"": frame}, {"": geometry.plot_mask_overlap(frame)}, text)


def embedding(study: Study, options: Options) -> Findings:
    """Starts and ends of runs in a plane."""
    networks, labels = [], []
    for one in (study, *options.against):
        for step, what in ((one.steps()[0], "start"), (one.step, "end")):
            networks.append(one.at(step).network.params)
            labels.append(f"{one.name} {what}")
    found = mds.embed(mds.distance_matrix(networks), labels, random_state=options.seed)
    text = f"{len(labels)} networks, stress-1 {float(found.stress_1):.3f}"
    return Findings({"": found}, {"": mds.plot_embedding(found)}, text)


def loss_surface(study: Study, options: Options) -> Findings:
    """The loss around a network, or on the plane through it and two others."""
    if options.norms == "frozen" and options.against and study.network.batch_stats:
        raise UserError(
            "--norms=frozen: three networks have three statistics; leave it out"
        )
    norms = options.norms or ("batch" if study.network.batch_stats else "frozen")
    objective, params, masks, batches = network(study, options, norms, 5000, 1000)
    if len(options.against) == 1:
        raise UserError("surface: --against needs two runs, or none")
    if options.against:
        three = [params, *(device(s.network.params) for s in options.against)]
        names = [s.name for s in (study, *options.against)]
        found = surface.through_solutions(
            objective, three, batches, labels=tuple(names)
        )
    else:
        key = jax.random.key(options.seed)
        found = surface.around_solution(key, objective, params, masks, batches)
    text = f"loss from {found.loss.min():.4g} to {found.loss.max():.4g}"
    return Findings({"": found}, {"": surface.plot_surface(found)}, text)


def ensemble(study: Study, options: Options) -> Findings:
    """The ensemble with other runs, and how far they differ, on test images."""
    logits, labels = _logits((study, *options.against), options)
    found, pairs = ensembles.summary(logits, labels), ensembles.compare(logits, labels)
    text = (
        f"accuracy {100 * np.mean(found.accuracy):.2f} % alone, "
        f"{100 * found.ensemble_accuracy:.2f} % together; pairs disagree on "
        f"{100 * np.mean(found.disagreement):.2f} %"
    )
    table = ensembles.table({f"{len(logits)} networks": found})
    return Findings(
        {"": found, "pairs": pairs, "table": table},
        {"pairs": ensembles.plot_comparison(pairs), "": ensembles.plot_table(table)},
        text,
    )


def calibrate(study: Study, options: Options) -> Findings:
    """Calibration on test images, and the temperature that mends it."""
    (logits,), labels = _logits((study,), options)
    found = calibration.reliability(logits, labels)
    scores = calibration.scores(logits, labels)
    half = len(labels) // 2  # held out from what the temperature is judged on
    fitted = calibration.fit_temperature(logits[:half], labels[:half])
    t = float(fitted.temperature)
    after = calibration.scores(logits[half:] / t, labels[half:])
    text = (
        f"expected calibration error {100 * float(scores.ece):.2f} %; at temperature "
        f"{t:.3f}, fitted to half of the images, {100 * float(after.ece):.2f} % on the "
        "other half"
    )
    return Findings(
        {"": found, "scores": scores, "temperature": fitted},
        {
            "": calibration.plot_reliability(found),
            "scores": calibration.plot_scores(scores),
            "temperature": calibration.plot_temperature(fitted),
        },
        text,
    )


def _logits(studies: tuple[Study, ...], options: Options):
    batches = studies[0].test_batches(forward_batch(studies[0], options))
    labels = np.concatenate([batch["label"] for batch in batches])
    shared = not studies[0].network.batch_stats
    objective = studies[0].objective(options.norms or "frozen")
    found = [
        ensembles.logits_of(
            objective if shared else s.objective(options.norms or "frozen"),
            device(s.network.params),
            batches,
        )
        for s in studies
    ]
    return np.stack(found), labels
