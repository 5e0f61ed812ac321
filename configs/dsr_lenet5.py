"""LeNet-5 on MNIST: dynamic sparse reparameterization (DSR, 2019).

    python -m lottery_flow.main --config=configs/dsr_lenet5.py

95 % sparsity, uniform; `:sparsity=0.9` for another.
From random masks; about 600 weights move at each rewire, of all layers together.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("dsr_lenet5")
    config.sparsity.rule = "dsr"
    config.sparsity.rule_options = "n_prune=600"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
