"""VGG-16 on ImageNet: a narrow dense network with as few parameters.

    python -m lottery_flow.main --config=configs/small_dense_vgg16.py
    python -m lottery_flow.main --config=configs/small_dense_vgg16.py:smoke

0.438 times as many channels: the size of 80 % sparsity. ImageNet is read from TFDS,
`smoke` is a narrower network on noise.
Settings: those of the paper's released code, where it has them.
Not yet run at full length; 128,000 steps of 1024 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_vgg16


def get_config(arg: str = "") -> ConfigDict:
    config = paper_vgg16("small_dense_vgg16")
    config.model.width = 0.438
    return finish(config, arg)
