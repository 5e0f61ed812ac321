"""LeNet-5 on MNIST: SNIP in 100 rounds before training (de Jorge et al. 2021).

    python -m lottery_flow.main --config=configs/snip_iterative_lenet5.py

95 % sparsity; `:sparsity=0.9` for another.
One ranking of all layers on 100 training images in each round.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("snip_iterative_lenet5")
    config.sparsity.at_init = "snip_iterative"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
