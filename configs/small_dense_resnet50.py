"""ResNet-50 on ImageNet: a narrow dense network with as few parameters.

    python -m lottery_flow.main --config=configs/small_dense_resnet50.py
    python -m lottery_flow.main --config=configs/small_dense_resnet50.py:smoke

0.465 times as many channels: the size of 80 % sparsity. ImageNet is read from TFDS,
`smoke` is a narrower network on noise.
Settings: those of the paper's released code.
Not yet run at full length; 32,000 steps of 4096 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_resnet50


def get_config(arg: str = "") -> ConfigDict:
    config = paper_resnet50("small_dense_resnet50")
    config.model.width = 0.465
    return finish(config, arg)
