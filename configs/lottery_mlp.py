"""The 300-100 MLP on MNIST: a lottery ticket (pruned masks, weights of step 0).

    python -m lottery_flow.main --config=configs/lottery_mlp.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_mlp; without it the masks are random, at
98 % sparsity. The weights come from step 0 of the same run, or from
sparsity.weights_from; without either they are a fresh initialisation.
Settings: those of the paper's released code.
Some 40 seconds of CPU time; 97.8 % test accuracy (five seeds).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_mlp


def get_config(arg: str = "") -> ConfigDict:
    config = paper_mlp("lottery_mlp")
    config.sparsity.sparsity = 0.98
    config.sparsity.weights_from = config.sparsity.get_ref("masks_from")
    config.sparsity.weights_step = 0
    return finish(config, arg)
