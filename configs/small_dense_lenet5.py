"""LeNet-5 on MNIST: a dense network of about as many parameters as the sparse one.

    python -m lottery_flow.main --config=configs/small_dense_lenet5.py
Settings: paper.md 4.1 (the paper's released configuration).
EXPECTED
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish, paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("small_dense_lenet5")
    config.model.widths = (3, 3, 27, 20)
    return finish(config, arg)
