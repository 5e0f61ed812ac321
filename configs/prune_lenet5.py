"""LeNet-5 on MNIST: gradual magnitude pruning to 95 %.

    python -m lottery_flow.main --config=configs/prune_lenet5.py
Settings: paper.md 4.1 (the paper's released configuration).
EXPECTED
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish, gradual_pruning, paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(paper_lenet5("prune_lenet5"), sparsity=0.95)
    return finish(config, arg)
