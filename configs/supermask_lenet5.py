"""LeNet-5 on MNIST: supermasks of a random network (Zhou et al. 2019).

    python -m lottery_flow.main --config=configs/supermask_lenet5.py

Probabilities of being active are trained; weights stay as they were drawn, and the
sparsity is not chosen: sparsity.sparsity marks layers alone. The rate is its source's.
At 20, two of five seeds hardly left chance in 1,172 steps.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("supermask_lenet5")
    config.sparsity.parameterization = "supermask"
    config.sparsity.parameterization_options = "rescale=True"
    config.optim.learning_rate = 100.0
    config.optim.weight_decay = 0.0
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
