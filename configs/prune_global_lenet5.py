"""LeNet-5 on MNIST: gradual magnitude pruning, one ranking of all layers.

    python -m lottery_flow.main --config=configs/prune_global_lenet5.py

95 % sparsity; `:sparsity=0.9` for another.
The schedule of prune_lenet5.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import gradual_pruning, paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(paper_lenet5("prune_global_lenet5"), sparsity=0.95)
    config.sparsity.rule = "global_gradual_pruning"
    return finish(config, arg)
