"""LeNet-5 on MNIST: pruned at once, trained again with its weights.

    python -m lottery_flow.main --config=configs/learning_rate_rewinding_lenet5.py

95 % sparsity by one ranking of all layers; the weights stay and the learning rate
starts anew (Renda et al. 2020); `:sparsity=0.9` for another.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; two trainings of 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("learning_rate_rewinding_lenet5")
    config.sparsity.sparsity = 0.95
    config.tickets.rounds = 1
    config.tickets.rewind = "learning_rate"
    return finish(config, arg)
