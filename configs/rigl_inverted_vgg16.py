"""VGG-16 on ImageNet: RigL that grows weights of the smallest gradient.

    python -m lottery_flow.main --config=configs/rigl_inverted_vgg16.py \
        --config.sparsity.masks_from=RUN
    python -m lottery_flow.main --config=configs/rigl_inverted_vgg16.py:smoke

80 % sparsity, uniform, all layers; others by the arguments `sparsity` and
`distribution`. RUN is the seed directory of a run of prune_vgg16; without it the
masks are random. ImageNet is read from TFDS, `smoke` is a narrow network on noise.
Settings: those of the paper's released code, where it has them.
Not yet run at full length; 128,000 steps of 1024 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_vgg16


def get_config(arg: str = "") -> ConfigDict:
    config = paper_vgg16("rigl_inverted_vgg16")
    config.sparsity.rule = "rigl_inverted"
    config.sparsity.sparsity = 0.8
    return finish(config, arg)
