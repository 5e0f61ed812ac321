"""LeNet-5 on MNIST: GraSP, pruned before training (Wang et al. 2020).

    python -m lottery_flow.main --config=configs/grasp_lenet5.py

95 % sparsity; `:sparsity=0.9` for another.
One ranking of all layers on 100 training images.
Settings: those of the other configurations of this network, but for the rate and
its warm-up. GraSP keeps what raises the gradient, and this network has no batch norm
as its source's do: at 90 % it starts at a loss of 5 to 11 and a gradient norm of 10 to
30, and the first steps of a rate of 0.05 left no unit of a layer alive.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("grasp_lenet5")
    config.sparsity.at_init = "grasp"
    config.sparsity.sparsity = 0.95
    config.optim.learning_rate = 0.02
    config.optim.warmup_steps = 3000
    return finish(config, arg)
