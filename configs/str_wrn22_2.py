"""WRN-22-2 on CIFAR-10: soft thresholds (STR, Kusupati et al. 2020).

    python -m lottery_flow.main --config=configs/str_wrn22_2.py

Weight decay drives a threshold for each layer; the sparsity follows from
optim.weight_decay and sparsity.parameterization_options=init=..., and
sparsity.sparsity marks layers alone.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("str_wrn22_2")
    config.sparsity.parameterization = "str"
    config.sparsity.parameterization_options = "init=-8.0"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
