"""Training steps and exported networks, sparse over masked dense."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Ratio, again, compare
from lottery_flow import config as config_lib
from lottery_flow import inference as inference_lib
from lottery_flow import plans, storage
from lottery_flow.build import build

# Name, widths, side of the images (digits at 28), batch; and what a step should not
# exceed, by sparsity.
_DENSE = {0.5: 1.03}
NETWORKS = (
    ("mlp", (300, 100), 28, 128, {0.9: 0.70, 0.95: 0.55, 0.98: 0.40}),
    ("mlp", (1024, 1024), 28, 128, {0.95: 0.45, 0.98: 0.37}),
    ("lenet5", (), 28, 128, {}),
    ("wrn22_2", (), 32, 32, {}),
    ("resnet50", (), 128, 8, {}),
)
INFERENCE = (("mlp", 28), ("lenet5", 28), ("resnet50", 224))
SPARSITIES = (0.5, 0.9, 0.95, 0.98)


def keep(names: list[str]) -> None:
    """Leaves the other networks out."""
    global NETWORKS, INFERENCE
    NETWORKS = tuple(n for n in NETWORKS if n[0] in names)
    INFERENCE = tuple(n for n in INFERENCE if n[0] in names)


def setting(name: str, side: int, batch: int, sparsity: float, widths=(), **train: Any):
    """The job of RigL on a network, and its state before the first step."""
    config = config_lib.default()
    data = "digits" if side == 28 else "synthetic"
    own = {
        "model.name": name,
        "model.widths": widths,
        "data.name": data,
        "data.image_size": 0 if data == "digits" else side,
        "sparsity.rule": "rigl",
        "sparsity.sparsity": sparsity,
        "sparsity.distribution": "erdos_renyi_kernel",
        "train.batch_size": batch,
        "train.probe_examples": 10,
        "sparsity.grow_examples": 10,
    }
    own |= {f"train.{k}": v for k, v in train.items()}
    config.update_from_flattened_dict(own)
    job = build(config, 0)
    create = jax.jit(job.create)
    return job, create(job.make_network(), job.rewire_key, job.step_key, job.knobs)


def steps(rounds: int) -> Iterator[Ratio]:
    """Steps between rewires: what `train.execution=auto` takes over masked dense."""
    for name, widths, side, batch, targets in NETWORKS:
        for sparsity in SPARSITIES:
            own = {"widths": widths, "execution": "auto"}
            job, state = setting(name, side, batch, sparsity, **own)
            paths = plans.choose(job, state, Path("no record"))
            compact = job._replace(storage="compact")
            kept = storage.make(compact, [job.knobs], state.params)
            train = jax.jit(job.make_steps().train)
            label = f"{name} {'-'.join(map(str, widths))}".rstrip()
            label += f", {side} px, batch {batch}, {100 * sparsity:g} %"
            data = plans.noise(job)
            plan = plans.of_masks(paths, state.masks)
            small_plan = plans.of_masks(paths, state.masks, compact=True)
            (small,) = kept.pack([state], [small_plan])
            ways = {
                f"{label}: masked dense": (state, {}),
                f"{label}: chosen": (state, plan),
                f"{label}: chosen, compact": (small, small_plan),
            }
            calls = {
                k: again(train, own, job.knobs, data, None, p)
                for k, (own, p) in ways.items()
            }
            target = (_DENSE | targets).get(sparsity)
            aims = {k: target for k in ways if target and k.endswith("chosen")}
            yield from compare(
                calls, f"{label}: masked dense", targets=aims, rounds=rounds
            )


def inference(rounds: int) -> Iterator[Ratio]:
    """Exported networks: the latency of a batch, chosen over dense."""
    for name, side in INFERENCE:
        for sparsity in SPARSITIES[1:]:
            job, state = setting(name, side, 8, sparsity)
            spec = job.spec
            make = functools.partial(
                inference_lib.make,
                *(job.model, state.params, state.masks, state.batch_stats),
                image_shape=spec.image_shape,
                mean=spec.mean,
                std=spec.std,
            )
            for batch in (1, 16, 128):
                label = f"{name}, {side} px, batch {batch}, {100 * sparsity:g} %"
                images = plans.noise(job._replace(batch_size=batch))["image"]
                nets = {
                    f"{label}: dense": make(execution="dense"),
                    f"{label}: chosen": make(batch_size=batch),
                }
                ways = {
                    k: again(net.apply, net.variables, images)
                    for k, net in nets.items()
                }
                yield from compare(ways, f"{label}: dense", rounds=rounds)
