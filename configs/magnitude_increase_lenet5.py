"""LeNet-5 on MNIST: the mask criterion magnitude increase.

    python -m lottery_flow.main --config=configs/magnitude_increase_lenet5.py

95 % sparsity in one round of layer-wise rankings by how far magnitudes grew, rewound
to signs times a constant (Zhou et al. 2019); `:sparsity=0.9` for another.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; two trainings of 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("magnitude_increase_lenet5")
    config.sparsity.sparsity = 0.95
    config.tickets.rounds = 1
    config.tickets.scope = "layer"
    config.tickets.criterion = "magnitude_increase"
    config.tickets.treatment = "sign_constant"
    return finish(config, arg)
