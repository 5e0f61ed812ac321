"""LeNet-5 on MNIST: iterative magnitude pruning, rewound to step 0.

    python -m lottery_flow.main --config=configs/imp_lenet5.py

95 % sparsity in ten rounds, one ranking of all layers (Frankle & Carbin 2019; the
ranking of Frankle et al. 2020); `:sparsity=0.9` for another.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; eleven trainings of 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("imp_lenet5")
    config.sparsity.sparsity = 0.95
    config.tickets.rounds = 10
    return finish(config, arg)
