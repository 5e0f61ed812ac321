"""ResNet-20 on CIFAR-10: a narrow dense network with as few parameters.

    python -m lottery_flow.main --config=configs/small_dense_resnet20.py
    python -m lottery_flow.main --config=configs/small_dense_resnet20.py:smoke

0.335 times as many channels: the size of 90 % sparsity. CIFAR-10 is read from TFDS,
with random crops and flips; `smoke` is a narrow network on the digits.
Settings: those of He et al. 2015 (arXiv 1512.03385, section 4.2).
Not yet run at full length; 64,000 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_resnet20


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_resnet20("small_dense_resnet20")
    config.model.width = 0.335
    return finish(config, arg)
