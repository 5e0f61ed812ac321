"""LeNet-5 on MNIST: pruned before training by magnitude.

    python -m lottery_flow.main --config=configs/magnitude_lenet5.py

95 % sparsity; `:sparsity=0.9` for another.
A ranking for each layer. The usual one of all layers (`scope='global'`) empties conv2
from 90 % on: the bound of the uniform weights of a layer falls with its fan, and there
it lies below the common threshold.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("magnitude_lenet5")
    config.sparsity.at_init = "magnitude"
    config.sparsity.at_init_options = "scope='layer'"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
