"""Megabytes of ResNet-50 in training: masked, and on the active positions alone."""

from typing import Any

import jax
import pandas as pd

from benchmarks.sparse_networks import setting
from lottery_flow import plans, storage
from lottery_flow.sparsity import masks as masks_lib

SPARSITIES = (0.9, 0.95)
# By name: the path of all masked layers, None for the masked network.
WAYS = {"masked": None, "compact": "dense", "compact, csr_gathered": "csr_gathered"}


def memory() -> pd.DataFrame:
    """A row for each sparsity and way to keep and compute the network.

    Columns in megabytes: weights and momentum; masks, or positions; structures of the
    compressed rows; and, by the compiler's own account, what goes into the compiled
    step and what it needs beside (at 64 px and a batch of 8).
    """
    rows = []
    for sparsity in SPARSITIES:
        job, state = setting("resnet50", 64, 8, sparsity)
        compact = job._replace(storage="compact")
        kept = storage.make(compact, [job.knobs], state.params)
        masks = masks_lib.named_leaves(state.masks)
        masked = [k for k in job.model.layers if masks[k] is not None]
        for way, path in WAYS.items():
            plan: dict[str, Any] = {}
            own = state
            if path is not None:
                paths = dict.fromkeys(masked, path)
                plan = plans.of_masks(paths, state.masks, compact=True)
                (own,) = kept.pack([state], [plan])
            program = jax.jit(job.make_steps().train, donate_argnums=0)
            compiled = program.lower(
                own, job.knobs, plans.noise(job), None, plan
            ).compile()
            use: Any = compiled.memory_analysis()
            positions = plan.get("positions", {})
            structures = {k: v for k, v in plan.items() if k != "positions"}
            sizes = {
                "weights_and_momentum": _bytes((own.params, own.opt_state.inner_state)),
                "masks_or_positions": _bytes((own.opt_state.masks, positions)),
                "structures": _bytes(structures),
                "arguments": use.argument_size_in_bytes,
                "temporaries": use.temp_size_in_bytes,
            }
            row = {k: round(v / 1e6, 2) for k, v in sizes.items()}
            rows.append({"sparsity": sparsity, "kept": way, **row})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _bytes(tree: Any) -> int:
    return sum(v.nbytes for v in jax.tree.leaves(tree))
