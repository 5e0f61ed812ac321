"""ResNet-20 on CIFAR-10: RigL inverted.

    python -m lottery_flow.main --config=configs/rigl_inverted_resnet20.py \
        --config.sparsity.masks_from=RUN
    python -m lottery_flow.main --config=configs/rigl_inverted_resnet20.py:smoke

90 % sparsity, uniform, the first layer dense. RUN is the seed directory of a run of
prune_resnet20; without it the masks are random. --config.model.init=per_neuron takes
the sparsity-aware initialisation. CIFAR-10 is read from TFDS, with random crops and
flips; `smoke` is a narrow network on the digits.
Settings: those of He et al. 2015 (arXiv 1512.03385, section 4.2).
Not yet run at full length; 64,000 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_resnet20


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_resnet20("rigl_inverted_resnet20")
    config.sparsity.rule = "rigl_inverted"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
