"""ResNet-20 on CIFAR-10: gradual magnitude pruning, dense to sparse.

    python -m lottery_flow.main --config=configs/prune_resnet20.py
    python -m lottery_flow.main --config=configs/prune_resnet20.py:smoke

90 % sparsity, uniform, the first layer dense. CIFAR-10 is read from TFDS, with random
crops and flips; `smoke` is a narrow network on the digits.
Settings: those of He et al. 2015 (arXiv 1512.03385, section 4.2).
Not yet run at full length; 64,000 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_resnet20, gradual_pruning


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(
        cifar_resnet20("prune_resnet20"), 0.9, 13_000, 49_000, 1000
    )
    config.sparsity.dense_layers = "conv1"
    # All of them, for tickets go back to an early one.
    config.train.checkpoint_every_steps = 2000
    config.train.keep_checkpoints = 0
    return finish(config, arg)
