"""LeNet-5 on MNIST: SNIP, pruned once before training by |w g| (Lee et al. 2019).

    python -m lottery_flow.main --config=configs/snip_lenet5.py

95 % sparsity; `:sparsity=0.9` for another.
One ranking of all layers on 100 training images; add
--config.sparsity.at_init=snip_layerwise for a ranking of each layer.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("snip_lenet5")
    config.sparsity.at_init = "snip"
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
