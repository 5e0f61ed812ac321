"""VGG-16 on ImageNet, dense.

    python -m lottery_flow.main --config=configs/dense_vgg16.py
    python -m lottery_flow.main --config=configs/dense_vgg16.py:smoke

ImageNet is read from TFDS, `smoke` is a narrow network on noise.
Settings: those of the paper's released code, where it has them.
Not yet run at full length; 128,000 steps of 1024 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_vgg16


def get_config(arg: str = "") -> ConfigDict:
    return finish(paper_vgg16("dense_vgg16"), arg)
