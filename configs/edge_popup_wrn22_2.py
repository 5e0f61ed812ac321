"""WRN-22-2 on CIFAR-10: edge-popup in a random network (Ramanujan et al. 2020).

    python -m lottery_flow.main --config=configs/edge_popup_wrn22_2.py

90 % sparsity, uniform, the first layer dense; `:sparsity=0.9` for another.
Scores are trained; weights stay as they were drawn.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("edge_popup_wrn22_2")
    config.sparsity.parameterization = "edge_popup"
    config.sparsity.parameterization_options = "scale_fan=True"
    config.optim.learning_rate = 0.1
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
