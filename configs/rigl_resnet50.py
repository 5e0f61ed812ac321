"""ResNet-50 on ImageNet: RigL.

    python -m lottery_flow.main --config=configs/rigl_resnet50.py
    python -m lottery_flow.main --config=configs/rigl_resnet50.py:smoke
    python -m lottery_flow.main \
        --config=configs/rigl_resnet50.py:sparsity=0.9,distribution=uniform,length=5

80 % sparsity by default, Erdos-Renyi-Kernel; `distribution=uniform` also wants
--config.sparsity.dense_layers=conv1. ImageNet is read from TFDS, `smoke` is a narrow
network on noise.
Settings: those of the paper's released code, but for the cosine drop fraction of the
RigL paper.
Not yet run at full length; 32,000 steps of 4096 images.
"""

from ml_collections import ConfigDict

from lottery_flow.config import finish, paper_resnet50


def get_config(arg: str = "") -> ConfigDict:
    config = paper_resnet50("rigl_resnet50")
    config.sparsity.rule = "rigl"
    config.sparsity.sparsity = 0.8
    config.sparsity.distribution = "erdos_renyi_kernel"
    return finish(config, arg)
