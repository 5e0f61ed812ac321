"""The 300-100 MLP on MNIST: static sparse training from a fresh initialisation.

    python -m lottery_flow.main --config=configs/scratch_mlp.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_mlp; without it the masks are random, at
98 % sparsity.
Add --config.model.init=per_neuron for the sparsity-aware initialisation (the
paper's Scratch+).
Settings: those of the paper's released code.
Some 40 seconds of CPU time. On pruned masks 97.5 % test accuracy, per neuron 97.3 %
(five seeds).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_mlp


def get_config(arg: str = "") -> ConfigDict:
    config = paper_mlp("scratch_mlp")
    config.sparsity.sparsity = 0.98
    return finish(config, arg)
