"""VGG-16 on ImageNet: a lottery ticket (pruned masks, early weights).

    python -m lottery_flow.main --config=configs/lottery_vgg16.py \
        --config.sparsity.masks_from=RUN
    python -m lottery_flow.main --config=configs/lottery_vgg16.py:smoke

80 % sparsity, uniform, all layers; others by the arguments `sparsity` and
`distribution`. RUN is the seed directory of a run of prune_vgg16; without it the
masks are random. The weights are those of an early step of the same run (late
rewinding), 8,000 by default: --config.sparsity.weights_step. The paper gives no
number. ImageNet is read from TFDS, `smoke` is a narrow network on noise.
Settings: those of the paper's released code, where it has them.
Not yet run at full length; 128,000 steps of 1024 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_vgg16


def get_config(arg: str = "") -> ConfigDict:
    config = paper_vgg16("lottery_vgg16")
    config.sparsity.sparsity = 0.8
    config.sparsity.weights_from = config.sparsity.get_ref("masks_from")
    config.sparsity.weights_step = 8000
    return finish(config, arg)
