"""LeNet-5 on MNIST: RigL (Inverted), growing the smallest gradients.

    python -m lottery_flow.main --config=configs/rigl_inverted_lenet5.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_lenet5; without it the masks are random, at
95 % sparsity.
Settings: those of the paper's released code.
Two minutes of CPU time. On pruned masks 86.9 to 96.9 % test accuracy, two seeds of five
at chance (11.35 %).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("rigl_inverted_lenet5")
    config.sparsity.rule = "rigl_inverted"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
