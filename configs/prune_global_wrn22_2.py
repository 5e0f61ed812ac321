"""WRN-22-2 on CIFAR-10: gradual magnitude pruning, one ranking of all layers.

    python -m lottery_flow.main --config=configs/prune_global_wrn22_2.py

90 % sparsity, the first layer dense; `:sparsity=0.9` for another.
The schedule of prune_wrn22_2.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2, gradual_pruning


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(
        cifar_wrn22_2("prune_global_wrn22_2"), 0.9, 20_000, 75_000, 1000
    )
    config.sparsity.rule = "global_gradual_pruning"
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
