"""LeNet-5 on MNIST: RigL whose new weights start at the sign of their gradient.

    python -m lottery_flow.main --config=configs/rigl_grad_sign_lenet5.py

95 % sparsity, uniform; `:sparsity=0.9` for another.
From random masks; grad_sign is one of the growth initialisations of the released
code, here over 100: over 10, the third of the weights that is new after a rewire is on
the scale of the others, and most runs stay at chance.
Settings: those of the other configurations of this network, for comparison.
Not yet run at full length; 11,719 steps.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish
from lottery_flow.settings import paper_lenet5


def get_config(arg: str = "") -> ConfigDict:
    config = paper_lenet5("rigl_grad_sign_lenet5")
    config.sparsity.rule = "rigl"
    config.sparsity.grow_init = "grad_sign"
    config.sparsity.grow_init_divisor = 100.0
    config.sparsity.sparsity = 0.95
    return finish(config, arg)
