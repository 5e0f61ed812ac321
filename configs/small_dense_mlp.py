"""The 300-100 MLP on MNIST: a dense network with as few parameters.

    python -m lottery_flow.main --config=configs/small_dense_mlp.py
Settings: those of the paper's released code.
Some 40 seconds of CPU time; 92.1 % test accuracy (five seeds).
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_mlp


def get_config(arg: str = "") -> ConfigDict:
    config = paper_mlp("small_dense_mlp")
    config.model.widths = (8, 8)
    return finish(config, arg)
