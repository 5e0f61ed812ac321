"""Analysis of sparse networks: functions of a loss, parameters, masks and batches.

They know no configuration and no training loop, and take any model. A *batch* is a
pytree of arrays whose first axis counts examples, *batches* a sequence of them
(`batches`); a loss is `(params, batch) -> scalar`, and an `objective.Objective` where
the logits are needed too. Results are NamedTuples of arrays with a method `frame()`, or
tidy frames; `results.save` and `results.load` keep them, and `plot_...` beside each
function makes a figure of its result.

| module | |
|---|---|
| `gradient_flow`, `gradient_noise` | norms of the gradient, rewires, noise |
| `signal` | forward and backward signals at initialisation |
| `curvature`, `lanczos`, `spectrum`, `class_structure` | Hessian of active weights |
| `interpolation`, `curves`, `autoneb`, `alignment` | paths between networks |
| `geometry`, `mds`, `surface` | distances, masks, pictures |
| `ensembles`, `calibration` | predictions |
"""

from lottery_flow.analysis import (
    alignment,
    autoneb,
    batches,
    calibration,
    class_structure,
    curvature,
    curves,
    ensembles,
    geometry,
    gradient_flow,
    gradient_noise,
    interpolation,
    lanczos,
    mds,
    objective,
    results,
    signal,
    spectrum,
    surface,
)

__all__ = [
    "alignment",
    "autoneb",
    "batches",
    "calibration",
    "class_structure",
    "curvature",
    "curves",
    "ensembles",
    "geometry",
    "gradient_flow",
    "gradient_noise",
    "interpolation",
    "lanczos",
    "mds",
    "objective",
    "results",
    "signal",
    "spectrum",
    "surface",
]
