"""Paths from a network of a run to another."""

import jax
import numpy as np
import optax
import pandas as pd

from lottery_flow.analysis import alignment, autoneb, curves, interpolation
from lottery_flow.errors import UserError
from lottery_flow.studies.common import Findings, Options, device, forward_batch
from lottery_flow.study import Study


def interpolate(study: Study, options: Options) -> Findings:
    """Loss and accuracy on the straight line to another network."""
    other = options.against[0]
    objective, batches = _path(study, options)
    start, end = _ends(study, options)
    found = interpolation.linear(objective, start, end, batches, mask="none")
    text = f"to {other.name} (step {other.step}): {_barrier(found)}"
    text += _cut(study, options)
    return Findings({"": found}, {"": interpolation.plot_paths(found)}, text)


def align(study: Study, options: Options) -> Findings:
    """The same after the units of the other network are put in this one's order."""
    other = options.against[0]
    if study.config.model.name not in ("lenet5", "mlp"):
        raise UserError(
            f"alignment: {study.config.model.name} is no plain chain of layers; use "
            "lottery_flow.analysis.alignment with a specification of its own"
        )
    # Permuted units have other masks: each network keeps its own.
    start, end = device(study.network.params), device(other.network.params)
    spec = alignment.chain(start, list(study.job.model.positions))
    permutations = alignment.weight_matching(spec, start, end)
    moved = alignment.permute(spec, permutations, end)
    objective, batches = _path(study, options)
    paths = {
        name: interpolation.linear(objective, start, to, batches, mask="none")
        for name, to in (("as they are", end), ("aligned", moved))
    }
    frame, text = _side_by_side(other, paths)
    distances = alignment.compare(spec, start, end, permutations)
    return Findings(
        {"": frame, "distances": distances},
        {
            "": interpolation.plot_paths(paths),
            "distances": alignment.plot_compare(distances),
        },
        text,
    )


def curve(study: Study, options: Options) -> Findings:
    """A Bezier curve of low loss to another network, in the sparse space."""
    other = options.against[0]
    start, end = _ends(study, options)
    # After both ends have one mask, that mask is the space.
    masks = _masks_of_ends(study, options)
    trained, training = curves.fit(
        study.objective("batch", options.weight_decay),
        start,
        end,
        _shuffled(study, options),
        optax.sgd(
            optax.cosine_decay_schedule(0.02, max(options.train_steps, 1)), momentum=0.9
        ),
        key=jax.random.key(options.seed),
        n_steps=options.train_steps,
        start_masks=masks[0],
        end_masks=masks[1],
    )
    objective, batches = _path(study, options)
    paths = {
        "curve": curves.evaluate(objective, trained, batches),
        "line": curves.evaluate(objective, curves.straight(start, end), batches),
    }
    frame, text = _side_by_side(other, paths)
    text += _cut(study, options)
    return Findings(
        {"": frame, "training": training},
        {
            "": interpolation.plot_paths(paths),
            "training": curves.plot_training(training),
        },
        text,
    )


def neb(study: Study, options: Options) -> Findings:
    """A chain of low loss to another network, by AutoNEB."""
    other = options.against[0]
    start, end = _ends(study, options)
    masks = _masks_of_ends(study, options)
    n_steps = sum(n for n, _ in autoneb.PAPER_CYCLES)
    cycles = tuple(
        (max(n * options.train_steps // n_steps, 1), rate)
        for n, rate in autoneb.PAPER_CYCLES
    )
    batches = _shuffled(study, options)
    objective, measured = _path(study, options)
    chain, history = autoneb.connect(
        study.objective("batch", options.weight_decay),
        start,
        end,
        batches,
        masks=curves.union(*masks),
        cycles=cycles,
        measured=objective,
    )
    path = curves.evaluate(objective, chain, measured, abscissa="length")
    text = f"to {other.name}: {_barrier(path)}" + _cut(study, options)
    return Findings(
        {"": path, "cycles": history},
        {"": interpolation.plot_paths(path), "cycles": autoneb.plot_cycles(history)},
        text,
    )


def _ends(study: Study, options: Options):
    other = options.against[0]
    ends = interpolation.masked_ends(
        study.network.params,
        other.network.params,
        mask=options.mask,
        start_masks=study.network.masks,
        end_masks=other.network.masks,
    )
    return tuple(map(device, ends))


def _masks_of_ends(study: Study, options: Options):
    """The masks that the ends have got."""
    first, second = study.network.masks, options.against[0].network.masks
    if options.mask == "none":
        # Each is as sparse as its own weights.
        return first, second
    return {
        "start": (first, first),
        "end": (second, second),
        "own": (first, second),
    }[options.mask]


def _path(study: Study, options: Options):
    """What to measure along a path, and on which batches."""
    n = max(options.examples, 0)
    batches = study.train_batches(n, forward_batch(study, options))
    if not study.network.batch_stats or options.norms == "batch":
        norms = "batch" if options.norms == "batch" else "frozen"
        return study.objective(norms, options.weight_decay), batches
    if options.norms == "frozen":
        raise UserError(
            "--norms=frozen: the networks on a path have statistics of their own; "
            "write recomputed or batch"
        )

    def objective_at(stats):
        at = study._replace(network=study.network._replace(batch_stats=stats))
        return at.objective("frozen", options.weight_decay)

    stats = device(study.network.batch_stats)
    measured = interpolation.recomputed_norms(
        objective_at, study.job.model.apply, stats, preprocess=study.preprocess
    )
    return measured, batches


def _shuffled(study: Study, options: Options):
    """Training batches of the run's own size in a random order, an epoch of them."""
    n = max(options.examples, 0)
    (data,) = study.train_batches(n, n or study.job.spec.n_train)
    order = np.random.default_rng(options.seed).permutation(len(data["label"]))
    size = options.batch_size or study.job.batch_size
    cut = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    return [jax.tree.map(lambda x, i=i: x[i], data) for i in cut or [order]]


def _side_by_side(
    other: Study, paths: dict[str, interpolation.Path]
) -> tuple[pd.DataFrame, str]:
    """Several paths to the same network as one table, and their barriers."""
    frames = [path.frame().assign(path=name) for name, path in paths.items()]
    barriers = (f"{name}: {_barrier(path)}" for name, path in paths.items())
    text = f"to {other.name}: " + "; ".join(barriers)
    return pd.concat(frames, ignore_index=True), text


def _cut(study: Study, options: Options) -> str:
    """What the mask has taken from the ends, if anything."""
    whole = study.network.params, options.against[0].network.params
    names = study.name, options.against[0].name
    text = ""
    for name, own, end in zip(names, whole, _ends(study, options), strict=True):
        n, left = (
            sum(int(np.count_nonzero(w)) for w in jax.tree.leaves(tree))
            for tree in (own, end)
        )
        if left < n:
            text += f"; --mask={options.mask} leaves {left} of {n} weights of {name}"
    return text


def _barrier(path: interpolation.Path) -> str:
    text = f"barrier {interpolation.barrier(path):.4g}"
    return text + f", instability {100 * interpolation.instability(path):.2f} %"
