"""VGG-16 on ImageNet: gradual magnitude pruning, dense to sparse.

    python -m lottery_flow.main --config=configs/prune_vgg16.py
    python -m lottery_flow.main --config=configs/prune_vgg16.py:smoke

80 % sparsity, uniform, all layers; others by the arguments `sparsity` and
`distribution`. ImageNet is read from TFDS, `smoke` is a narrow network on noise.
Settings: those of the paper's released code, where it has them.
Not yet run at full length; 128,000 steps of 1024 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import gradual_pruning, paper_vgg16


def get_config(arg: str = "") -> ConfigDict:
    config = gradual_pruning(paper_vgg16("prune_vgg16"), 0.8, 40_000, 100_000, 4000)
    # All of them, for tickets go back to an early one.
    config.train.checkpoint_every_steps = 8000
    config.train.keep_checkpoints = 0
    return finish(config, arg)
