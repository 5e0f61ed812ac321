"""WRN-22-2 on CIFAR-10: GraSP, pruned before training (Wang et al. 2020).

    python -m lottery_flow.main --config=configs/grasp_wrn22_2.py

90 % sparsity, the first layer dense; `:sparsity=0.9` for another.
One ranking of all layers on 100 training images.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("grasp_wrn22_2")
    config.sparsity.at_init = "grasp"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
