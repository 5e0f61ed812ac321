"""WRN-22-2 on CIFAR-10: Top-KAST (Jayakumar et al. 2020).

    python -m lottery_flow.main --config=configs/top_kast_wrn22_2.py

90 % sparsity, uniform, the first layer dense; `:sparsity=0.9` for another.
The largest weights are active, twice as many are trained.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("top_kast_wrn22_2")
    config.sparsity.parameterization = "top_kast"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
