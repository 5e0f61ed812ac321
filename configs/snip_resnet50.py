"""ResNet-50 on ImageNet: SNIP, pruned once before training by |w g|.

    python -m lottery_flow.main --config=configs/snip_resnet50.py
    python -m lottery_flow.main --config=configs/snip_resnet50.py:smoke

80 % sparsity, the first layer dense; `sparsity=0.9` behind the colon for another and
`length=5` to train five times as long.
One ranking of all layers on 100 training images (Lee et al. 2019);
--config.sparsity.at_init=snip_layerwise ranks each layer by itself, as the paper's
released code does. ImageNet is read
from TFDS, `smoke` is a narrow network on noise.
Settings: those of the other configurations of this network.
Not yet run at full length; 32,000 steps of 4096 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_resnet50


def get_config(arg: str = "") -> ConfigDict:
    config = paper_resnet50("snip_resnet50")
    config.sparsity.at_init = "snip"
    config.sparsity.sparsity = 0.8
    config.sparsity.dense_layers = "conv1"
    return finish(config, arg)
