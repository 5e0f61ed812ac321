"""ResNet-20 on CIFAR-10, dense.

    python -m lottery_flow.main --config=configs/dense_resnet20.py
    python -m lottery_flow.main --config=configs/dense_resnet20.py:smoke

CIFAR-10 is read from TFDS, with random crops and flips; `smoke` is a narrow network on
the digits.
Settings: those of He et al. 2015 (arXiv 1512.03385, section 4.2).
Not yet run at full length; 64,000 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_resnet20


def get_config(arg: str = "") -> ConfigDict:
    return finish(cifar_resnet20("dense_resnet20"), arg)
