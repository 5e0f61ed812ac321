"""WRN-22-2 on CIFAR-10: gradual magnitude pruning, dense to sparse.

    python -m lottery_flow.main --config=configs/prune_wrn22_2.py
    python -m lottery_flow.main --config=configs/prune_wrn22_2.py:smoke

90 % sparsity, uniform, the first layer dense. CIFAR-10 is read from TFDS, with random
crops and flips; `smoke` is a narrow network on the digits.
Settings: those for wide residual networks in the paper's released code.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2, gradual_pruning


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(cifar_wrn22_2("prune_wrn22_2"), 0.9, 20_000, 74_000, 1000)
    config.sparsity.dense_layers = "conv1"
    # All of them, for tickets go back to an early one.
    config.train.checkpoint_every_steps = 2000
    config.train.keep_checkpoints = 0
    return finish(config, arg)
