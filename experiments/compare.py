"""Finished or unfinished runs side by side: one figure and one tidy table.

    python -m experiments.compare --out=compare runs/prune_lenet5-*/seed_0 ...

writes `compare.png` (gradient norm over the steps, as in the paper's figure 2, and test
accuracy) and `compare.csv`, one row for each run and step.
"""

import argparse
import csv
from pathlib import Path

from lottery_flow import metrics
from lottery_flow.analysis import figures
from lottery_flow.errors import UserError
from lottery_flow.runs import RunPaths, read_object

COLUMNS = (
    "step",
    "seed",
    "loss",
    "accuracy",
    "probe_loss",
    "probe_accuracy",
    "gradient_norm",
    "gradient_norm_before",
    "gradient_norm_after",
    "learning_rate",
    "drop_fraction",
    "density",
    "test_loss",
    "test_accuracy",
)


def collect(directories: list[Path]) -> list[dict]:
    """One dict for each run and row of metrics; `run` names the run."""
    rows = []
    for directory in directories:
        paths = RunPaths(directory)
        found = metrics.read(paths.metrics)
        if not found:
            raise SystemExit(
                f"error: {directory} has no metrics; give the seed_N directory of a run"
            )
        try:
            config = read_object(paths.config)
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"error: {paths.config} cannot be read ({error}); give the seed_N "
                "directory of a run"
            ) from error
        label = config["name"]
        if config["model.init"] != "masked_dense":
            label += f" ({config['model.init']})"
        rows += [{"run": label} | {k: r.get(k) for k in COLUMNS} for r in found]
    return rows


def table(rows: list[dict], path: Path) -> None:
    """Writes the rows as CSV; empty where a row has no such value."""
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, ["run", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict], path: Path) -> None:
    """Draws gradient norm (log-log) and test accuracy of every run."""
    fig, axes = figures.new(1, 2)
    runs = list(dict.fromkeys((r["run"], r["seed"]) for r in rows))
    for i, (run, seed) in enumerate(runs):
        own = [r for r in rows if (r["run"], r["seed"]) == (run, seed)]
        style = {"color": f"C{i % 10}", "lw": 1.3, "ls": "-" if i < 10 else "--"}
        # Step 0 has no place on a logarithmic axis.
        norms = [(r["step"], r["gradient_norm"]) for r in own if r["step"] > 0]
        axes[0].plot(*zip(*norms, strict=True), **style)
        tested = [r for r in own if r["test_accuracy"] is not None]
        steps = [r["step"] for r in tested]
        accuracy = [100 * r["test_accuracy"] for r in tested]
        axes[1].plot(steps, accuracy, label=f"{run}, seed {seed}", **style)
    axes[0].set(xscale="log", yscale="log", xlabel="step", ylabel="gradient norm")
    axes[1].set(xlabel="step", ylabel="test accuracy (%)", ylim=(90, 100))
    axes[1].legend(fontsize=7, loc="lower right")
    fig.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="seed_N directories")
    parser.add_argument("--out", default="compare", help="path without its ending")
    args = parser.parse_args()
    try:
        rows = collect(args.runs)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    table(rows, Path(args.out + ".csv"))
    plot(rows, Path(args.out + ".png"))
    print(f"{args.out}.png  {args.out}.csv")


if __name__ == "__main__":
    main()
