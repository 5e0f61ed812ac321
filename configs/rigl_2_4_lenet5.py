"""LeNet-5 on MNIST: RigL under two of every four weights.

    python -m lottery_flow.main --config=configs/rigl_2_4_lenet5.py

50 % sparsity by its kind; both convolutions, whose fan-in no four divide, are dense.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("rigl_2_4_lenet5")
    config.sparsity.rule = "rigl"
    config.sparsity.granularity = "2:4"
    config.sparsity.dense_layers = "conv1,conv2"
    config.sparsity.sparsity = 0.5
    return finish(config, arg)
