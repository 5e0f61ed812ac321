"""LeNet-5 on MNIST: discovering neural wirings (Wortsman et al. 2019).

    python -m lottery_flow.main --config=configs/dnw_lenet5.py

95 % sparsity, uniform; `:sparsity=0.9` for another.
The largest weights of each layer, chosen anew at each step; all are trained.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("dnw_lenet5")
    config.sparsity.parameterization = "dnw"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
