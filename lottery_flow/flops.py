"""What the training of a configuration costs: operations, bytes, and both by layer.

    python -m lottery_flow.flops --config=configs/rigl_lenet5.py
    python -m lottery_flow.flops --config=... --csv=layers.csv

counts (see `counting`) the network at the sparsity that the configuration asks for,
and puts its training beside that of the other kinds of methods at that sparsity.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from absl import flags
from ml_collections import ConfigDict

from lottery_flow import command, counting
from lottery_flow.build import Layers, layers
from lottery_flow.errors import UserError
from lottery_flow.sparsity import schedules

# What the published table of ResNet-50 differs in from the network: it counts the
# first convolution on images that are padded already, 115 x 115 outputs, not 112.
PUBLISHED_POSITIONS = {"resnet50": {"conv1": 115**2}}


def by_layer(own: Layers) -> pd.DataFrame:
    """A row for each layer, by name, and one for all.

    Columns: layer, shape, positions, weights, active, sparsity (fraction), flops and
    dense_flops (for one image), megabytes.
    """
    sparse = counting.inference_flops(own.shapes, own.positions, own.n_active)
    dense = counting.inference_flops(own.shapes, own.positions)
    rows = []
    for name in own.positions:
        shape, n = own.shapes[name], own.n_active[name]
        size = int(np.prod(shape))
        rows.append(
            {
                "layer": name,
                "shape": "x".join(map(str, shape)),
                "positions": own.positions[name],
                "weights": size,
                "active": n,
                "sparsity": 1 - n / size,
                "flops": sparse[name],
                "dense_flops": dense[name],
                "megabytes": counting.model_megabytes({name: shape}, {name: n}),
            }
        )
    found = pd.DataFrame(rows)
    sums = found[["weights", "active", "flops", "dense_flops", "megabytes"]].sum()
    total = {"layer": "all", "shape": "", "positions": 0, **sums}
    total["sparsity"] = 1 - sums["active"] / sums["weights"]
    found = pd.concat([found, pd.DataFrame([total])], ignore_index=True)
    return found.astype({"weights": int, "active": int})


def by_method(config: ConfigDict, f: float) -> pd.DataFrame:
    """Training at the final sparsity by each kind of method, over dense training.

    Args:
      config: gives the steps, the interval between rewires and the pruning schedule.
      f: operations for inference over those of the dense network.

    Columns: method, ratio. Pruning is there where the configuration prunes.
    """
    sparsity, n_steps = config.sparsity, config.train.total_steps
    interval = sparsity.interval_steps
    rows = {
        "dense": 1.0,
        "fixed mask, SET": counting.training_flops(f),
        "SNIP (one dense gradient, then fixed)": counting.training_flops(
            [1.0] + [f] * (n_steps - 1)
        ),
        f"RigL, every {interval} steps": counting.training_flops(f, interval),
    }
    if sparsity.rule == "gradual_pruning":
        progress = schedules.cubic_sparsity(
            0.0, 1.0, sparsity.begin_steps, sparsity.end_steps
        )
        # Weights are removed after a step: the next one is the first without them.
        last = np.arange(n_steps) - 1
        last -= (last - sparsity.begin_steps) % interval
        done = [progress(step) for step in last.tolist()]
        ratios = [1 - share * (1 - f) for share in done]
        rows["gradual pruning"] = counting.training_flops(ratios)
    return pd.DataFrame({"method": list(rows), "ratio": list(rows.values())})


def describe(config: ConfigDict, own: Layers) -> str:
    """Both tables and the totals, as text."""
    table = by_layer(own)
    total = table.iloc[-1]
    f = total["flops"] / total["dense_flops"]
    shown = table.assign(
        positions=[*table["positions"].astype(str)[:-1], ""],
        sparsity=table["sparsity"].map("{:.2%}".format),
        flops=table["flops"].map("{:,.0f}".format),
        dense_flops=table["dense_flops"].map("{:,.0f}".format),
        megabytes=table["megabytes"].map("{:.4f}".format),
    )
    methods = by_method(config, f)
    methods["ratio"] = methods["ratio"].map("{:.4f}".format)
    dense = counting.dense_training_flops(
        total["dense_flops"], config.train.total_steps, config.train.batch_size
    )
    return "\n".join(
        [
            shown.to_string(index=False),
            "",
            f"inference: {f:.5f} of the dense network",
            f"dense training: {dense:.4g} operations, {config.train.total_steps:,} "
            f"steps of {config.train.batch_size} images; relative to it:",
            methods.to_string(index=False, header=False),
        ]
    )


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    command.define_config(values)
    flags.DEFINE_string("csv", "", "Write the rows by layer there.", flag_values=values)
    flags.DEFINE_bool(
        "as_published",
        False,
        "Count what the published tables of this network count.",
        flag_values=values,
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; flags begin with --")
    config = command.load_config()
    own = layers(config)
    if flags.FLAGS.as_published:
        if config.model.name not in PUBLISHED_POSITIONS:
            raise UserError(
                f"--as_published: of {config.model.name} no table is known; there is "
                f"one of {', '.join(PUBLISHED_POSITIONS)}"
            )
        published = PUBLISHED_POSITIONS[config.model.name]
        own = own._replace(positions=own.positions | published)
    print(describe(config, own))
    if flags.FLAGS.csv:
        by_layer(own).to_csv(flags.FLAGS.csv, index=False)


def cli() -> None:
    """The command, from the shell."""
    define_flags(flags.FLAGS)
    command.run(main)


if __name__ == "__main__":
    cli()
