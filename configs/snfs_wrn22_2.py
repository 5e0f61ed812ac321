"""WRN-22-2 on CIFAR-10: sparse momentum (Dettmers & Zettlemoyer 2019).

    python -m lottery_flow.main --config=configs/snfs_wrn22_2.py

90 % sparsity, uniform, the first layer dense; `:sparsity=0.9` for another.
From random masks; half of each layer is dropped at first, and layers of much
momentum take more of it back. --config.sparsity.rule_options=redistribute=False
keeps each layer's share.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("snfs_wrn22_2")
    config.sparsity.rule = "snfs"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    config.sparsity.drop_fraction = 0.5
    return finish(config, arg)
