"""ResNet-20 on CIFAR-10: SNIP, pruned once before training by |w g|.

    python -m lottery_flow.main --config=configs/snip_resnet20.py
    python -m lottery_flow.main --config=configs/snip_resnet20.py:smoke

90 % sparsity, the first layer dense; `sparsity=0.8` behind the colon for another.
One ranking of all layers on 100 training images (Lee et al. 2019);
--config.sparsity.at_init=snip_layerwise ranks each layer by itself, as the paper's
released code does. CIFAR-10 is
read from TFDS, with random crops and flips.
Settings: those of the other configurations of this network.
Not yet run at full length; 64,000 steps of 128 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import cifar_resnet20


def get_config(arg: str = "") -> ConfigDict:
    config = cifar_resnet20("snip_resnet20")
    config.sparsity.at_init = "snip"
    config.sparsity.sparsity = 0.9
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
