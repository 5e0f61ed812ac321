"""LeNet-5 on MNIST: pruning by standard deviation and retraining (Han et al. 2015).

    python -m lottery_flow.main --config=configs/prune_retrain_lenet5.py

Prunes what is below a share of its layer's standard deviation, four times; the
sparsity follows from the weights, and sparsity.sparsity marks layers alone.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("prune_retrain_lenet5")
    config.sparsity.rule = "han_pruning"
    config.sparsity.rule_options = "quality=1.0"
    config.sparsity.sparsity = 0.95
    config.sparsity.begin_steps = 3000
    config.sparsity.end_steps = 7500
    config.sparsity.interval_steps = 1500
    return finish(config, arg)
