"""ResNet-50 on ImageNet: gradual magnitude pruning, dense to sparse.

    python -m lottery_flow.main --config=configs/prune_resnet50.py
    python -m lottery_flow.main --config=configs/prune_resnet50.py:smoke

80 % sparsity, uniform, the first layer dense; Erdos-Renyi-Kernel with
`distribution=erdos_renyi_kernel` and --config.sparsity.dense_layers=''. ImageNet is
read from TFDS, `smoke` is a narrow network on noise.
Settings: those of the paper's released code.
Not yet run at full length; 32,000 steps of 4096 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import gradual_pruning, paper_resnet50


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(
        paper_resnet50("prune_resnet50"), 0.8, 10_000, 25_000, 1000
    )
    config.sparsity.dense_layers = "conv1"
    # All of them, for tickets go back to an early one.
    config.train.checkpoint_every_steps = 2000
    config.train.keep_checkpoints = 0
    return finish(config, arg)
