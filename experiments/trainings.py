"""Which networks the experiments train: a value for each setting.

    Training("lenet5", "rigl", init="per_neuron", masks="pruned")

is the configuration `configs/rigl_lenet5.py` with that initialisation, on the masks of
the pruning run of the same seed. Its directory follows from its fields, so experiments
that need the same networks share them.
"""

import functools
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lottery_flow import config as config_lib
from lottery_flow import runs
from lottery_flow.build import flat_fields

CONFIGS = Path(__file__).parents[1] / "configs"
INITS = ("masked_dense", "layer_scaled", "per_neuron")
# Of which masks a sparse network starts from: those of the pruning run, the same
# permuted within each layer, or random ones of the same sparsity.
MASKS = ("pruned", "shuffled", "random")
# Of the pruning run whose tickets are compared with one another.
TICKET_SEED = 1


class Setup(NamedTuple):
    """Where the networks live, and how large everything is.

    Attributes:
      workdir: of all runs; part of the identity of those that take masks from another,
        see `anywhere`.
      data_dir: of TFDS; "" is its own default.
      smoke: seconds on the digits data instead of the paper's sizes.
      jobs: processes that train at the same time; 0 chooses.
      records: of rows of finished runs, see `records`; "" keeps none.
    """

    workdir: str = "runs"
    data_dir: str = ""
    smoke: bool = False
    jobs: int = 0
    records: str = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of every experiment."""
        return (0, 1) if self.smoke else (0, 1, 2, 3, 4)

    @property
    def anywhere(self) -> "Setup":
        """In the usual workdir, as what is kept and published names runs."""
        return self._replace(workdir=Setup().workdir)

    @property
    def programs(self) -> Path:
        """Compiled programs, for all processes."""
        return Path(self.workdir) / "programs"


class Training(NamedTuple):
    """A setting that is trained once for each seed.

    Attributes:
      network: `lenet5` or `mlp`.
      method: the first part of the name of its file in `configs/`.
      init: of the kernels, one of `INITS`; lottery tickets have that of their run.
      masks: one of `MASKS`, or "" for a method that starts from full ones.
      data: name of the data set.
      source_seed: of the pruning run that masks come from; None: the run's own.
      fields: what else differs from the file, as (field, value).
      only_seed: the one seed to train; None: those of the setup.
      arg: what goes behind the colon of the configuration: 'sparsity=0.9,length=0.2'.
    """

    network: str
    method: str
    init: str = "masked_dense"
    masks: str = ""
    data: str = "mnist"
    source_seed: int | None = None
    fields: tuple[tuple[str, Any], ...] = ()
    only_seed: int | None = None
    arg: str = ""

    def seeds(self, setup: Setup) -> tuple[int, ...]:
        """What it is trained with."""
        return setup.seeds if self.only_seed is None else (self.only_seed,)

    @property
    def source(self) -> "Training | None":
        """The pruning runs that its masks come from."""
        if self.masks not in ("pruned", "shuffled"):
            return None
        return Training(self.network, "prune", data=self.data)

    @property
    def kind(self) -> str:
        """Its data, where they are not MNIST, and its file."""
        own = "" if self.data == "mnist" else f"{self.data} "
        return f"{own}{self.method}_{self.network}"

    @property
    def label(self) -> str:
        """For people."""
        init = "" if self.init == "masked_dense" else f" {self.init}"
        masks = f" {self.masks}" if self.masks in ("shuffled", "random") else ""
        more = "".join(f" {k.partition('.')[2]}={v}" for k, v in self.fields)
        arg = f" {self.arg}" if self.arg else ""
        return f"{self.kind}{arg}{init}{masks}{more}"

    def columns(self, setup: Setup) -> dict[str, str]:
        """What a table says of it."""
        return {
            "data": self.config(setup).data.name,
            "network": self.network,
            "method": self.method,
            "init": self.init,
            "masks": self.masks,
            "config": self.digest(setup),
        }

    def config(self, setup: Setup) -> ConfigDict:
        """The whole configuration."""
        name = f"{self.method}_{self.network}"
        get_config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]
        args = [self.arg] * bool(self.arg) + ["smoke"] * setup.smoke
        config = get_config(",".join(args))
        with config.unlocked():
            config.data.dir = setup.data_dir
            if not setup.smoke:
                config.data.name = self.data
            config.model.init = self.init
            if self.source is not None:
                seed = "{seed}" if self.source_seed is None else self.source_seed
                directory = self.source.directory(setup)
                config.sparsity.masks_from = f"{directory.as_posix()}/seed_{seed}"
            config.sparsity.shuffle_masks = self.masks == "shuffled"
            # Fields may refer to the directory of the masks, as weights do.
            config.update_from_flattened_dict(dict(self.fields))
        return config.lock()

    def directory(self, setup: Setup) -> Path:
        """Where main.py keeps the runs of all its seeds."""
        return _directory(self, setup)

    def digest(self, setup: Setup) -> str:
        """The hash in the name of its directory, in the usual workdir."""
        return self.directory(setup.anywhere).name.rpartition("-")[2]

    def run(self, setup: Setup, seed: int) -> Path:
        """The directory of one run."""
        return self.directory(setup) / f"seed_{seed}"


@functools.cache
def _directory(training: Training, setup: Setup) -> Path:
    fields = flat_fields(training.config(setup))
    default = flat_fields(config_lib.default())
    return runs.run_paths(setup.workdir, fields, default, 0).root.parent


def tickets(setup: Setup) -> dict[str, list[Training]]:
    """Networks around one pruning solution, that of `TICKET_SEED`: rows of a table.

    Lottery tickets differ in the order of the data alone; so do those that share one
    fresh initialisation and those that start again from the pruning solution.
    """
    own: Any = {"masks": "pruned", "source_seed": TICKET_SEED}
    restart = (("sparsity.weights_step", -1),)
    return {
        "lottery": [Training("lenet5", "lottery", **own)],
        "scratch": [
            Training(
                "lenet5",
                "scratch",
                only_seed=setup.seeds[0],
                fields=(("data.order_seed", order),),
                **own,
            )
            for order in setup.seeds
        ],
        "scratch, other inits": [Training("lenet5", "scratch", **own)],
        "scratch+, other inits": [Training("lenet5", "scratch", "per_neuron", **own)],
        "prune restart": [Training("lenet5", "lottery", fields=restart, **own)],
        "other pruning solutions": [Training("lenet5", "prune")],
    }


Member = tuple[Training, int]  # with a seed


def with_sources(trainings: list[Training]) -> list[Training]:
    """Each training once, after the one that its masks come from."""
    pairs = ((t.source, t) for t in trainings)
    return list(dict.fromkeys(t for pair in pairs for t in pair if t is not None))


def members(trainings: Iterable[Training], setup: Setup) -> list[Member]:
    """Every training with each of its seeds."""
    return [(t, seed) for t in trainings for seed in t.seeds(setup)]
