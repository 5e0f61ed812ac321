"""WRN-22-2 on CIFAR-10: discovering neural wirings (Wortsman et al. 2019).

    python -m lottery_flow.main --config=configs/dnw_wrn22_2.py

90 % sparsity, uniform, the first layer dense; `:sparsity=0.9` for another.
The largest weights of each layer, chosen anew at each step; all are trained.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("dnw_wrn22_2")
    config.sparsity.parameterization = "dnw"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
