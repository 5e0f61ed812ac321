"""ResNet-50 on ImageNet: a lottery ticket (pruned masks, early weights).

    python -m lottery_flow.main --config=configs/lottery_resnet50.py \
        --config.sparsity.masks_from=RUN
    python -m lottery_flow.main --config=configs/lottery_resnet50.py:smoke

80 % sparsity, uniform, the first layer dense; Erdos-Renyi-Kernel with
`distribution=erdos_renyi_kernel` and --config.sparsity.dense_layers=''. RUN is the
seed directory of a run of prune_resnet50; without it the masks are random. The
weights are those of an early step of the same run (late rewinding), 2,000 by default:
--config.sparsity.weights_step. The paper gives no number. ImageNet is read from TFDS,
`smoke` is a narrow network on noise.
Settings: those of the paper's released code.
Not yet run at full length; 32,000 steps of 4096 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_resnet50


def get_config(arg: str = "") -> ConfigDict:
    config = paper_resnet50("lottery_resnet50")
    config.sparsity.sparsity = 0.8
    config.sparsity.dense_layers = "conv1"
    config.sparsity.weights_from = config.sparsity.get_ref("masks_from")
    config.sparsity.weights_step = 2000
    return finish(config, arg)
