"""LeNet-5 on MNIST: Top-KAST (Jayakumar et al. 2020).

    python -m lottery_flow.main --config=configs/top_kast_lenet5.py

95 % sparsity, uniform; `:sparsity=0.9` for another.
The largest weights are active, twice as many are trained.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("top_kast_lenet5")
    config.sparsity.parameterization = "top_kast"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
