"""LeNet-5 on MNIST: edge-popup in a random network (Ramanujan et al. 2020).

    python -m lottery_flow.main --config=configs/edge_popup_lenet5.py

95 % sparsity, uniform; `:sparsity=0.9` for another.
Scores are trained; weights stay as they were drawn.
Settings: those of the other configurations of this network, for comparison, but for the
rate and its warm-up. The source's rate, 0.1, is for networks with batch norm: here it
left no unit of a layer alive in two of five seeds at 90 %, and so did 0.02 at once.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("edge_popup_lenet5")
    config.sparsity.parameterization = "edge_popup"
    config.sparsity.parameterization_options = "scale_fan=True"
    config.optim.learning_rate = 0.02
    config.optim.warmup_steps = 3000
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
