"""Settings of networks on their data sets, from which the files of configs/ start."""

from ml_collections import ConfigDict

from lottery_flow.config import default


def paper_lenet5(name: str) -> ConfigDict:
    """LeNet-5 on MNIST with the settings of the released code, dense."""
    config = default()
    config.name = name
    config.data.name = "mnist"
    config.optim.weight_decay = 1e-3  # Keras' l2(5e-4)
    config.train.total_steps = 11_719  # 25 epochs
    config.eval.every_steps = 1000
    return config


def paper_mlp(name: str) -> ConfigDict:
    """The 300-100 MLP on MNIST with the settings of the released code, dense."""
    config = paper_lenet5(name)
    config.model.name = "mlp"
    config.optim.learning_rate = 0.2
    config.optim.weight_decay = 2e-4  # Keras' l2(1e-4)
    config.sparsity.interval_steps = 500
    return config


def paper_resnet50(name: str) -> ConfigDict:
    """ResNet-50 on ImageNet with the settings of the released code, dense."""
    config = _convolutional(name, "resnet50", "imagenet2012")
    config.data.workers = 16
    config.optim.learning_rate = 1.6  # 0.1 for each 256 images of the batch
    # Epochs 30, 70 and 90 of 1,281,167 images.
    config.optim.milestone_steps = (9383, 21_894, 28_150)
    config.optim.weight_decay = 1e-4
    config.loss.label_smoothing = 0.1
    config.sparsity.end_steps = 25_000
    config.train.total_steps = 32_000
    config.train.batch_size = 4096
    config.train.checkpoint_every_steps = 1000
    config.eval.every_steps = 1000
    return config


def paper_vgg16(name: str) -> ConfigDict:
    """VGG-16 on ImageNet with the settings of the released code, dense."""
    config = paper_resnet50(name)
    config.model.name = "vgg16"
    config.optim.learning_rate = 0.4
    config.optim.milestone_steps = (37_534, 87_580, 112_603)  # the same epochs
    config.sparsity.end_steps = 100_000
    config.train.total_steps = 128_000
    config.train.batch_size = 1024
    config.train.checkpoint_every_steps = 4000
    config.eval.every_steps = 4000
    return config


def cifar_wrn22_2(name: str) -> ConfigDict:
    """WRN-22-2 on CIFAR-10 with the settings of the paper's released code, dense."""
    config = _convolutional(name, "wrn22_2", "cifar10")
    config.data.augment = "crop_flip"
    config.optim.learning_rate = 0.1
    config.optim.milestone_steps = (30_000, 60_000, 90_000)
    config.optim.decay_factor = 0.2
    config.optim.weight_decay = 5e-4
    config.sparsity.end_steps = 75_000
    config.train.total_steps = 97_656
    config.train.checkpoint_every_steps = 2000
    config.eval.every_steps = 2000
    return config


def cifar_resnet20(name: str) -> ConfigDict:
    """ResNet-20 on CIFAR-10 as He et al. 2015 (arXiv 1512.03385, 4.2), dense."""
    config = cifar_wrn22_2(name)
    config.model.name = "resnet20"
    config.optim.nesterov = False
    config.optim.milestone_steps = (32_000, 48_000)
    config.optim.decay_factor = 0.1
    config.optim.weight_decay = 1e-4
    config.sparsity.end_steps = 48_000
    config.train.total_steps = 64_000
    return config


def gradual_pruning(
    config: ConfigDict,
    sparsity: float,
    begin_steps: int = 3000,
    end_steps: int = 7000,
    interval_steps: int = 100,
) -> ConfigDict:
    """Pruning, by default as both MNIST networks in the paper's released code."""
    config.sparsity.rule = "gradual_pruning"
    config.sparsity.sparsity = sparsity
    config.sparsity.begin_steps = begin_steps
    config.sparsity.end_steps = end_steps
    config.sparsity.interval_steps = interval_steps
    return config


def _convolutional(name: str, model: str, data: str) -> ConfigDict:
    """What the recipes for ImageNet and CIFAR-10 share."""
    config = default()
    config.name = name
    config.model.name = model
    config.model.init = "module"
    config.data.name = data
    config.optim.name = "momentum"
    config.optim.nesterov = True
    config.optim.schedule = "step"
    config.sparsity.drop_schedule = "cosine"
    config.sparsity.grow_examples = 0
    config.train.keep_checkpoints = 3
    return config
