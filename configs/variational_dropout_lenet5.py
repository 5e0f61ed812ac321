"""LeNet-5 on MNIST: sparse variational dropout (Molchanov et al. 2017).

    python -m lottery_flow.main --config=configs/variational_dropout_lenet5.py

The sparsity follows from the data: sparsity.sparsity marks layers alone.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("variational_dropout_lenet5")
    config.sparsity.parameterization = "variational_dropout"
    config.sparsity.penalty_warmup_steps = 3000
    config.optim.name = "adam"
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.0
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
