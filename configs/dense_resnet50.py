"""ResNet-50 on ImageNet, dense.

    python -m lottery_flow.main --config=configs/dense_resnet50.py
    python -m lottery_flow.main --config=configs/dense_resnet50.py:smoke

ImageNet is read from TFDS, `smoke` is a narrow network on noise.
Settings: those of the paper's released code.
Not yet run at full length; 32,000 steps of 4096 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_resnet50


def get_config(arg: str = "") -> ConfigDict:
    return finish(paper_resnet50("dense_resnet50"), arg)
