"""LeNet-5 on MNIST: sparse momentum (Dettmers & Zettlemoyer 2019).

    python -m lottery_flow.main --config=configs/snfs_lenet5.py

95 % sparsity, uniform; `:sparsity=0.9` for another.
From random masks; half of each layer is dropped at first, and layers of much
momentum take more of it back. --config.sparsity.rule_options=redistribute=False
keeps each layer's share.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("snfs_lenet5")
    config.sparsity.rule = "snfs"
    config.sparsity.sparsity = 0.95
    config.sparsity.drop_fraction = 0.5
    config.sparsity.drop_schedule = "cosine"
    return finish(config, arg)
