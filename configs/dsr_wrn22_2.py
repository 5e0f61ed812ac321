"""WRN-22-2 on CIFAR-10: dynamic sparse reparameterization (DSR, 2019).

    python -m lottery_flow.main --config=configs/dsr_wrn22_2.py

90 % sparsity, uniform, the first layer dense; `:sparsity=0.9` for another.
From random masks; about 4000 weights move at each rewire, of all layers together.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("dsr_wrn22_2")
    config.sparsity.rule = "dsr"
    config.sparsity.rule_options = "n_prune=4000"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
