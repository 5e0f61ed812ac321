"""WRN-22-2 on CIFAR-10, dense.

    python -m lottery_flow.main --config=configs/dense_wrn22_2.py
    python -m lottery_flow.main --config=configs/dense_wrn22_2.py:smoke

CIFAR-10 is read from TFDS, with random crops and flips; `smoke` is a narrow network on
the digits.
Settings: those for wide residual networks in the paper's released code.
Not yet run at full length; 97,656 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_wrn22_2


def get_config(arg: str = "") -> ConfigDict:
    return finish(cifar_wrn22_2("dense_wrn22_2"), arg)
