"""LeNet-5 on MNIST: SET.

    python -m lottery_flow.main --config=configs/set_lenet5.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_lenet5; without it the masks are random, at
95 % sparsity.
Add --config.model.init=per_neuron for the sparsity-aware initialisation (the
paper's SET+).
Settings: those of the paper's released code.
Two minutes of CPU time. On pruned masks 98.0 % test accuracy, two seeds of five at
chance (11.35 %); per neuron 97.6 % (97.0 to 98.0).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("set_lenet5")
    config.sparsity.rule = "set"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
