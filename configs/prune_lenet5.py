"""LeNet-5 on MNIST: gradual magnitude pruning to 95 %.

    python -m lottery_flow.main --config=configs/prune_lenet5.py
Settings: those of the paper's released code.
Two minutes of CPU time; 98.6 % test accuracy (five seeds).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import gradual_pruning, paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(paper_lenet5("prune_lenet5"), sparsity=0.95)
    return finish(config, arg)
