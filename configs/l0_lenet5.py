"""LeNet-5 on MNIST: L0 by hard concrete gates (Louizos et al. 2018).

    python -m lottery_flow.main --config=configs/l0_lenet5.py

The sparsity follows from l0_scale, a price for each weight: sparsity.sparsity marks
layers alone.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("l0_lenet5")
    config.sparsity.parameterization = "l0_hard_concrete"
    config.sparsity.parameterization_options = "l0_scale=2e-6"
    config.optim.name = "adam"
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.0
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
