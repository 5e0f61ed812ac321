"""LeNet-5 on MNIST: soft thresholds (STR, Kusupati et al. 2020).

    python -m lottery_flow.main --config=configs/str_lenet5.py

Weight decay drives a threshold for each layer; the sparsity follows from
optim.weight_decay and sparsity.parameterization_options=init=..., and
sparsity.sparsity marks layers alone.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("str_lenet5")
    config.sparsity.parameterization = "str"
    config.sparsity.parameterization_options = "init=-8.0"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
