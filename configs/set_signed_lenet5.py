"""LeNet-5 on MNIST: SET that drops of each sign alike (Mocanu et al. 2018).

    python -m lottery_flow.main --config=configs/set_signed_lenet5.py

95 % sparsity, uniform; `:sparsity=0.9` for another.
From random masks.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("set_signed_lenet5")
    config.sparsity.rule = "set_signed"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
