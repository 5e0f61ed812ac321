"""LeNet-5 on MNIST: static sparse training from a fresh initialisation.

    python -m lottery_flow.main --config=configs/scratch_lenet5.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_lenet5; without it the masks are random, at
95 % sparsity.
Add --config.model.init=per_neuron for the sparsity-aware initialisation (the
paper's Scratch+).
Settings: those of the paper's released code.
A minute and a half of CPU time. On pruned masks 98.0 % test accuracy, two seeds of five
at chance (11.35 %); per neuron 97.0 % (95.4 to 97.8).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("scratch_lenet5")
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
