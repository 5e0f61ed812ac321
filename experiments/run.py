"""Makes the figures and tables of the paper again.

    python -m experiments.run accuracy_table --data_dir=DATA
    python -m experiments.run all --smoke

trains what is missing (as populations, a core each), collects tidy tables, draws the
figures and prints ours beside the paper's. A run that stopped goes on. A finished one
is not repeated, nor one of which rows are enough and stand in `<out>/runs/`. `--smoke`
does everything small, on the digits data: most of its time goes into compiling.
"""

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

from experiments import launch, paper, publish, tables
from experiments.trainings import Setup
from lottery_flow import command
from lottery_flow.errors import UserError
from lottery_flow.stopping import Stopped

EXPERIMENTS = (
    "calibration",
    "signal_propagation",
    "gradient_flow_training",
    "rewire_gain",
    "accuracy_table",
    "hessian_spectrum",
    "interpolation",
    "mds",
    "ensembles",
    "fashion",
    "fashion_interpolation",
    "method_table",
)
# Those that look at weights; the others are made of rows of metrics.
OF_WEIGHTS = frozenset(
    {"hessian_spectrum", "interpolation", "mds", "ensembles", "fashion_interpolation"}
)


def load(name: str) -> ModuleType:
    """The module of an experiment."""
    return importlib.import_module(f"experiments.{name}")


def beside(name: str, found: publish.Tables) -> str:
    """Ours beside the paper's, as Markdown: a table, and what the paper shows."""
    text = tables.markdown(load(name).beside(found))
    if name in paper.EXPECTED:
        text += f"\n\nThe paper: {paper.EXPECTED[name]}."
    return text


def run(names: list[str], setup: Setup, out: Path) -> None:
    """Trains for all of the experiments, then makes their results one by one.

    Raises:
      UserError: runs failed.
    """
    modules = {name: load(name) for name in names}
    runs = {name: module.runs(setup) for name, module in modules.items()}
    trainings = [t for own in runs.values() for t in own]
    whole = {t for name in OF_WEIGHTS & runs.keys() for t in runs[name]}
    launch.launch(trainings, setup, [t for t in trainings if t not in whole])
    for name, module in modules.items():
        began = time.monotonic()
        found = publish.write(out, name, module, setup)
        print(f"\n## {name}: {module.ABOUT}\n")
        print(beside(name, found))
        print(f"\n{out / name}/  ({time.monotonic() - began:.0f} s)")


def main() -> None:
    """The command."""
    about = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about.add_argument("name", choices=[*EXPERIMENTS, "all"], nargs="+")
    about.add_argument("--smoke", action="store_true", help="small, on digits")
    about.add_argument("--workdir", help="of the runs (runs, or runs/smoke)")
    about.add_argument("--out", type=Path, help="(results, or runs/smoke/results)")
    about.add_argument("--data_dir", default="", help="of TFDS")
    about.add_argument("--jobs", type=int, default=0, help="processes; 0: one a core")
    args = about.parse_args()
    workdir = args.workdir or ("runs/smoke" if args.smoke else "runs")
    out = args.out or Path("runs/smoke/results" if args.smoke else "results")
    setup = Setup(workdir, args.data_dir, args.smoke, args.jobs, str(out / "runs"))
    command.prepare()
    # As for Ctrl-C, where nothing is trained that would have to be saved.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = list(EXPERIMENTS) if "all" in args.name else args.name
    try:
        run(names, setup, out)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}; the same command goes on\n")
        sys.exit(command.AGAIN)


if __name__ == "__main__":
    main()
