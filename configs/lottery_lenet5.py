"""LeNet-5 on MNIST: a lottery ticket (pruned masks, weights of step 0).

    python -m lottery_flow.main --config=configs/lottery_lenet5.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_lenet5; without it the masks are random, at
95 % sparsity. The weights come from step 0 of the same run, or from
sparsity.weights_from; without either they are a fresh initialisation.
Settings: those of the paper's released code.
A minute and a half of CPU time; 98.4 to 98.7 % test accuracy, one seed of five 95.7 %.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("lottery_lenet5")
    config.sparsity.sparsity = 0.95
    config.sparsity.weights_from = config.sparsity.get_ref("masks_from")
    config.sparsity.weights_step = 0
    return finish(config, arg)
