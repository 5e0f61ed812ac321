"""ResNet-18 of half the width on Imagenette: RigL.

    python -m lottery_flow.main --config=configs/rigl_resnet18_imagenette.py

80 % sparsity, Erdos-Renyi-Kernel, from random masks; images of ten classes, 9,469 of
them, at 64 x 64, in five epochs: small enough for a CPU. The dense network of the same
size: --config.sparsity.rule=static --config.sparsity.sparsity=0.0
Test accuracy 9.3 % at first, 33.5, 47.7, 53.7, 61.2 and 62.5 % after each epoch
(seed 0; images resized to 160 x 160 and compressed anew before), in 18 minutes on two
cores of a shared x86-64 machine beside other work (jax 0.10.2).
"""

from ml_collections import ConfigDict

from lottery_flow.config import default, finish


def get_config(arg: str = "") -> ConfigDict:
    config = default()
    config.name = "rigl_resnet18_imagenette"
    config.model.name = "resnet18"
    config.model.width = 0.5
    config.model.init = "module"
    config.data.name = "imagenette/160px-v2"
    config.data.image_size = 64
    config.optim.name = "momentum"
    config.optim.nesterov = True
    config.optim.learning_rate = 0.05
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 1e-4
    config.loss.label_smoothing = 0.1
    config.sparsity.rule = "rigl"
    config.sparsity.sparsity = 0.8
    config.sparsity.distribution = "erdos_renyi_kernel"
    config.sparsity.end_steps = 555
    config.sparsity.interval_steps = 50
    config.sparsity.drop_schedule = "cosine"
    config.sparsity.grow_examples = 0
    config.train.total_steps = 740  # 148 each epoch
    config.train.batch_size = 64
    config.train.probe_examples = 100
    config.train.log_every_steps = 50
    config.train.checkpoint_every_steps = 148
    config.train.keep_checkpoints = 1
    config.eval.every_steps = 148
    config.eval.batch_size = 250
    return finish(config, arg)
