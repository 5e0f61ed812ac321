"""The 300-100 MLP on MNIST: RigL (Inverted), growing the smallest gradients.

    python -m lottery_flow.main --config=configs/rigl_inverted_mlp.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_mlp; without it the masks are random, at
98 % sparsity.
Settings: those of the paper's released code.
Some 40 seconds of CPU time. On pruned masks 96.8 % test accuracy (five seeds).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_mlp


def get_config(arg: str = "") -> ConfigDict:
    config = paper_mlp("rigl_inverted_mlp")
    config.sparsity.rule = "rigl_inverted"
    config.sparsity.sparsity = 0.98
    return finish(config, arg)
