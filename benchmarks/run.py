"""Ratios against the dense step and the obvious alternatives, one command.

python -m benchmarks.run                 # or: make bench
python -m benchmarks.run mlp topk_2e6    # some of them
python -m benchmarks.run --out=benchmarks/results/cpu.csv
"""

import argparse
import csv
import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

import flax
import jax
import jaxlib
import optax

from benchmarks.cases import CASES
from benchmarks.measure import Ratio

_LINE = "{:<48}{:>9}{:>18}{:>11}{:>11}{:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    args = parser.parse_args()
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; {', '.join(CASES)}")
    header = about()
    print("\n".join(header), flush=True)
    print(_LINE.format("what", "ratio", "quartiles", "ms", "over ms", "target"))
    rows = []
    for name in args.cases or CASES:
        for row in CASES[name]():
            rows.append(row)
            print(_line(row), flush=True)
    missed = [r.name for r in rows if r.target is not None and r.ratio > r.target]
    print(f"{len(missed)} of {sum(r.target is not None for r in rows)} targets missed")
    if args.out is not None:
        write(args.out, header, rows)


def about(module: str = "benchmarks.run") -> list[str]:
    """Where and when: the device, the versions, the command that runs `module`."""
    device = jax.devices()[0]
    return [
        f"# {datetime.date.today()}  {device.platform}: {device.device_kind}, "
        f"{_cores()} cores, {platform.machine()}",
        f"# Python {platform.python_version()}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}, flax {flax.__version__}, "
        f"optax {optax.__version__}",
        f"# python -m {module} {shlex.join(sys.argv[1:])}".rstrip(),
        "# time: "
        + ("of the process" if device.platform == "cpu" else "of the wall")
        + "; ratios: median over alternating rounds",
    ]


def write(path: Path, header: list[str], rows: list[Ratio]) -> None:
    """The table as CSV, below lines that begin with #."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        f.write("\n".join(header) + "\n")
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(Ratio._fields)
        for row in rows:
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in row])


def _line(row: Ratio) -> str:
    target = "" if row.target is None else f"{row.target:.3g}"
    mark = "" if row.target is None or row.ratio <= row.target else "  missed"
    if mark and row.low <= row.target < row.ratio:
        mark = "  missed, within the spread"
    spread = f"{row.low:.3f}-{row.high:.3f}"
    numbers = f"{row.ratio:.3f}", spread, f"{row.milliseconds:.2f}"
    other = f"{row.reference_milliseconds:.2f}"
    return _LINE.format(row.name, *numbers, other, target) + mark


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
