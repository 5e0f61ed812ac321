"""LeNet-5 on MNIST: RigL of whole output units.

    python -m lottery_flow.main --config=configs/rigl_channel_lenet5.py

50 % sparsity: half of the units of each layer but the last, from random masks.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("rigl_channel_lenet5")
    config.sparsity.rule = "rigl"
    config.sparsity.granularity = "channel"
    config.sparsity.dense_layers = "fc3"
    config.sparsity.sparsity = 0.5
    return finish(config, arg)
