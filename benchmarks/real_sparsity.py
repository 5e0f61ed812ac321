"""Does sparsity save time here? Compressed rows over the masked dense products.

taskset -c 0 python -m benchmarks.real_sparsity curves     # layers, by sparsity
taskset -c 0 python -m benchmarks.real_sparsity steps      # of training, by network
taskset -c 0 python -m benchmarks.real_sparsity inference  # exported networks
taskset -c 0 python -m benchmarks.real_sparsity memory     # of ResNet-50 in training
taskset -c 0 python -m benchmarks.real_sparsity run --data_dir=DIR     # RigL on MNIST

Tables and the figure of the curves go to `--out`, by default `benchmarks/results`.
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from benchmarks import sparse_layers, sparse_memory, sparse_networks, sparse_run
from benchmarks.measure import Ratio
from benchmarks.run import about, write

PARTS = {
    "curves": sparse_layers.curves,
    "steps": sparse_networks.steps,
    "inference": sparse_networks.inference,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=(*PARTS, "run", "memory"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--data_dir", default="", help="of TFDS, for MNIST")
    parser.add_argument("--n_steps", type=int, default=1000, help="of the run")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--only", nargs="*", help="networks of steps and inference")
    args = parser.parse_args()
    if args.only:
        sparse_networks.keep(args.only)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("lottery_flow").setLevel(logging.INFO)
    header = about("benchmarks.real_sparsity")
    print("\n".join(header), flush=True)
    if args.part == "memory":
        table = sparse_memory.memory().to_csv(index=False)
        path = args.out / "real_sparsity_memory.csv"
        path.write_text("\n".join([*header, table]))
        return
    if args.part == "run":
        rows = list(sparse_run.whole_run(args.data_dir, args.n_steps))
    else:
        rows = list(_shown(PARTS[args.part](args.rounds)))
    write(args.out / f"real_sparsity_{args.part}.csv", header, rows)
    if args.part == "curves":
        figure = sparse_layers.plot(rows)
        figure.savefig(args.out / "real_sparsity_curves.png", dpi=150)


def _shown(rows: Iterator[Ratio]) -> Iterator[Ratio]:
    for r in rows:
        numbers = f"{r.ratio:.3f} ({r.low:.3f}-{r.high:.3f})"
        aim = "" if r.target is None else f"   target {r.target:.2f}"
        print(f"{r.name:<66}{numbers}  {r.milliseconds:.3f} ms{aim}", flush=True)
        yield r


if __name__ == "__main__":
    main()
