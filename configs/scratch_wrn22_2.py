"""WRN-22-2 on CIFAR-10: a fixed sparse network from a fresh start.

    python -m lottery_flow.main --config=configs/scratch_wrn22_2.py \
        --config.sparsity.masks_from=RUN
    python -m lottery_flow.main --config=configs/scratch_wrn22_2.py:smoke

90 % sparsity, uniform, the first layer dense. RUN is the seed directory of a run of
prune_wrn22_2; without it the masks are random. --config.model.init=per_neuron takes the
sparsity-aware initialisation, layer_scaled that of Liu et al. CIFAR-10 is read from
TFDS, with random crops and flips; `smoke` is a narrow network on the digits.
Settings: those for wide residual networks in the paper's released code.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_wrn22_2("scratch_wrn22_2")
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
