"""The 300-100 MLP on MNIST: RigL.

    python -m lottery_flow.main --config=configs/rigl_mlp.py \
        --config.sparsity.masks_from=RUN

RUN is the seed directory of a run of prune_mlp; without it the masks are random, at
98 % sparsity.
Add --config.model.init=per_neuron for the sparsity-aware initialisation (the
paper's RigL+).
Settings: those of the paper's released code.
Some 40 seconds of CPU time. On pruned masks 97.8 % test accuracy, per neuron 97.7 %
(five seeds).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_mlp


def get_config(arg: str = "") -> ConfigDict:
    config = paper_mlp("rigl_mlp")
    config.sparsity.rule = "rigl"
    config.sparsity.sparsity = 0.98
    return finish(config, arg)
