"""Every option of a run, with its default: the reference of the configuration.

A config file starts from one of the functions of `settings`, changes what it is about,
and ends with `finish`, which understands the `smoke` argument:

    def get_config(arg: str = ""):
        config = paper_lenet5("rigl_lenet5")
        config.sparsity.rule = "rigl"
        return finish(config, arg)

Durations are in steps (optimizer updates). An empty string, and -1 for a duration,
mean "not given".
"""

import math

from ml_collections import ConfigDict

from lottery_flow.errors import UserError


def default() -> ConfigDict:
    """All fields at their defaults; runs are named by what differs from these."""
    return ConfigDict(
        {
            # What the run directory is called; main.py adds a hash of the rest.
            "name": "custom",
            "model": {
                # lenet5, mlp; for small images resnet20, wrn16_4, wrn22_2; resnet18,
                # resnet34, resnet50, resnet101, vgg16, vgg16_bn, mobilenet_v1, vit_s16.
                "name": "lenet5",
                # Of the hidden layers of lenet5 and mlp; () is the model's own.
                "widths": (),
                "width": 1.0,  # multiplies the channels of all other networks
                # Of resnets: batch, or fixup, which is none; '' is the model's own.
                "norm": "",
                # Images whose statistics batch normalisation shares in training: 0:
                # all of the step (of a part of it with train.accumulate_steps), on
                # whatever devices; 32: as on replicas of 32 images each.
                "norm_examples": 0,
                # What the network itself draws for its convolutions, see
                # init=module: he_fan_out, delta_orthogonal; '' is the model's own.
                "kernel_init": "",
                # To compute in, float32 or bfloat16; parameters stay in float32.
                "dtype": "float32",
                # Of networks of blocks: compute each block again for its gradient
                # instead of keeping what is inside; accelerators save memory by it.
                "remat": False,
                # How convolutions are computed, see models/layers.py: convolution,
                # patches; auto chooses by the backend and the shape.
                "lowering": "auto",
                # Initialisation of the kernels, see sparsity/initializers.py:
                # masked_dense, layer_scaled, per_neuron; module is the network's own.
                "init": "masked_dense",
                "init_fan": "",  # fan_in, fan_out, fan_avg; '' is the init's own
                "init_distribution": "",  # normal, uniform, truncated
                "init_gain": 0.0,  # variance times fan; 0 is the init's own
            },
            "data": {
                # In memory: digits, which comes with scikit-learn, and through TFDS
                # mnist, fashion_mnist, cifar10, cifar100. Decoded on the way: any
                # other of TFDS (imagenet2012, imagenette/160px-v2), folder:DIR with
                # DIR/<train, val or test>/<class>/ of image files, synthetic noise.
                "name": "digits",
                "dir": "",  # of TFDS; '' is TFDS_DATA_DIR or its own default
                # Height and width for the network of what is decoded on the way; 0:
                # 224. Processes that decode; 0: threads of the one that trains.
                "image_size": 0,
                "workers": 0,
                # Seed of the order of the examples; -1 is the run's own. One order
                # for several members lets them share the work on their batches.
                "order_seed": -1,
                # Of training images in memory: crop_flip, see augment.py, or ''.
                "augment": "",
            },
            "optim": {
                # keras_momentum: v = m v - lr g, w += v, the paper's on MNIST;
                # momentum: v = m v + g, w -= lr v; adam; adamw.
                "name": "keras_momentum",
                "learning_rate": 0.05,
                # cosine (to zero), constant, or step: times decay_factor from each of
                # milestone_steps on.
                "schedule": "cosine",
                "milestone_steps": (),
                "decay_factor": 0.1,
                # Steps until the schedule's end, which a run may stop short of;
                # 0: train.total_steps.
                "schedule_steps": 0,
                "warmup_steps": 0,  # linear, from zero
                "momentum": 0.9,
                "nesterov": False,
                # The gradient of a kernel grows by weight_decay * w (adamw: the
                # step does). Keras' l2(c) adds c w^2 to the loss: write 2 c.
                "weight_decay": 0.0,
            },
            "loss": {
                # The share of the target that is spread evenly over all classes.
                "label_smoothing": 0.0,
            },
            "sparsity": {
                # How masks change in training, see RULES of sparsity/methods.py, and
                # options of that rule: 'quality=0.5'.
                "rule": "static",
                "rule_options": "",
                # How masks are chosen before training, see METHODS of
                # sparsity/at_init.py, '' for random ones: 'snip', and its options:
                # 'rounds=10,invert=True'.
                "at_init": "",
                "at_init_options": "",
                # What is trained instead of the weights, see PARAMETERIZATIONS of
                # sparsity/parameterizations.py, '' for the weights: 'str', and its
                # options: 'init=-8.0'. Steps over which its penalty rises to its
                # scale.
                "parameterization": "",
                "parameterization_options": "",
                "penalty_warmup_steps": 0,
                # Share of the kernels' weights that are inactive, from 0 to below
                # 1; what a random mask starts with or gradual pruning ends with.
                "sparsity": 0.0,
                "distribution": "uniform",  # uniform, erdos_renyi, erdos_renyi_kernel
                "dense_layers": "",  # kept dense: 'conv1,fc3'
                "layer_sparsity": "",  # of single layers: 'fc3=0.5'
                # An earlier run (its seed_N directory) to take masks from, instead
                # of random ones, and weights; {seed} in it stands for the run's own
                # seed, and step -1 for the last one.
                "masks_from": "",
                "masks_step": -1,
                "shuffle_masks": False,  # permute each layer's mask
                # Draw the weights anew after pruning at initialisation.
                "fresh_weights": False,
                "weights_from": "",
                "weights_step": 0,
                # Rewires at begin, begin + interval, ... up to end (-1: forever).
                "begin_steps": 0,
                "end_steps": -1,
                "interval_steps": 100,
                "drop_fraction": 0.3,
                # learning_rate (in proportion to it), cosine (to zero at
                # end_steps, else with optim.schedule_steps), constant.
                "drop_schedule": "learning_rate",
                "timing": "after",  # after the gradient step, or instead of it
                # Of newly grown weights: zeros, initial_dist, random_normal,
                # random_uniform, grad_scale, grad_sign; the others over the divisor.
                "grow_init": "zeros",
                "grow_init_divisor": 1.0,
                # What is kept or dropped as one: '' single weights, '2:4' two of four
                # inputs, 'block4x4' of inputs and outputs, 'channel' whole outputs.
                "granularity": "",
                # Growth scores are taken on this many training images of their
                # own, at the new weights; 0: the training batch of the step.
                "grow_examples": 1000,
            },
            # Training, pruning and going back, in rounds; see levels.py.
            "tickets": {
                "rounds": 0,  # of pruning, each followed by a training; 0: none
                # The share of the active weights that a round removes; 0.0: what
                # reaches sparsity.sparsity after all of them.
                "rate": 0.0,
                "layer_rates": "",  # of single layers: 'fc3=0.1'
                "scope": "global",  # one ranking of all layers, or of each: layer
                "criterion": "large_final",  # TICKET_CRITERIA of ticket_criteria.py
                # Each training starts from the weights of a step (weights), or from
                # the last ones with the schedule of that step on (learning_rate) or
                # with its last learning rate (fine_tune), for as many steps.
                "rewind": "weights",
                "rewind_steps": 0,
                # What is done to these: nothing (rewind), or another of TREATMENTS
                # of ticket_weights.py.
                "treatment": "rewind",
                "treatment_options": "",  # of it: 'scale=0.5'
                "level": 0,  # rounds before this training, set by the program
            },
            "train": {
                "seeds": (0,),  # trained together, each in a directory of its own
                # Fields that differ between members, for every seed:
                # 'model.init=masked_dense|per_neuron; optim.learning_rate=0.1|0.2'.
                "vary": "",
                # How members are trained, see population.py: one_by_one, together;
                # auto chooses by the backend. Steps that one program takes at most; 0
                # chooses.
                "population": "auto",
                "chunk_steps": 0,
                # The mesh, see parallel.py: devices to spread members over, to cut
                # batches along, and to cut batches and the state along; 0 chooses.
                "member_devices": 0,
                "data_devices": 0,
                "model_devices": 1,
                "total_steps": 1000,
                "batch_size": 128,
                # Parts in which the gradient of a step is computed, one after another;
                # those of the probe and of the growth batch in as many or more.
                "accumulate_steps": 1,
                # At an update that is not finite: stop, or skip it and count.
                "on_nonfinite": "stop",
                # How layers are computed: dense products under masks, or by the active
                # weights alone: where measured to be faster (auto), in all that are
                # sparse (csr, csr_gathered), or by name: 'fc1=csr'; see plans.py.
                "execution": "dense",
                # Weights and slots between rewires: whole, or of active weights alone
                # (compact), which saves memory.
                "storage": "masked",
                # Of a running average of the weights, evaluated beside; 0: none.
                "ema_decay": 0.0,
                # The first training images, on which gradient flow is measured.
                "probe_examples": 1000,
                "log_every_steps": 100,
                "checkpoint_every_steps": 500,
                "keep_checkpoints": 0,  # newest ones, beside step 0; 0 keeps all
                "tensorboard": False,
                "figure": True,  # figure.png at the end
            },
            "eval": {
                "every_steps": 500,  # 0: after the last step alone
                "batch_size": 1000,
            },
        },
        type_safe=True,
    )


def finish(config: ConfigDict, arg: str = "") -> ConfigDict:
    """Applies the config's argument and locks the fields.

    Args:
      config: all fields set.
      arg: words with commas between them: `smoke` shrinks the run to seconds on the
        digits or on noise; `sparsity=0.9` and `distribution=erdos_renyi_kernel` are
        the fields of that name; `length=5` trains five times as long, with all
        milestones and the steps between which masks change, but not their interval.
    """
    words = [word for word in arg.split(",") if word]
    for word in sorted(words, key="smoke".__eq__):  # what is long is shrunk last
        key, _, value = word.partition("=")
        if word == "smoke":
            _shrink(config)
        elif key == "distribution" and value:
            config.sparsity.distribution = value
        elif key == "sparsity" and _is_number(value):
            config.sparsity.sparsity = float(value)
        elif key == "length" and _is_number(value) and float(value) > 0:
            _stretch(config, float(value))
        else:
            raise UserError(
                f"--config: {word!r} after the colon is unknown; write smoke, "
                "sparsity=0.9, distribution=erdos_renyi_kernel or length=5"
            )
    config.lock()
    return config


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _stretch(config: ConfigDict, factor: float) -> None:
    """All steps of the schedules but the interval between rewires."""
    optim, sparsity = config.optim, config.sparsity
    config.train.total_steps = round(config.train.total_steps * factor)
    optim.schedule_steps = round(optim.schedule_steps * factor)
    optim.warmup_steps = round(optim.warmup_steps * factor)
    optim.milestone_steps = tuple(round(s * factor) for s in optim.milestone_steps)
    sparsity.penalty_warmup_steps = round(sparsity.penalty_warmup_steps * factor)
    sparsity.begin_steps = round(sparsity.begin_steps * factor)
    if sparsity.end_steps > 0:
        sparsity.end_steps = round(sparsity.end_steps * factor)


def _shrink(config: ConfigDict) -> None:
    if config.data.name == "imagenet2012":
        config.data.name = "synthetic"
        config.data.image_size = 32
        config.data.workers = 0
        config.eval.batch_size = 500
    else:
        config.data.name = "digits"
        config.data.image_size = 0  # they have a size of their own
    config.data.dir = ""
    if config.model.name not in ("lenet5", "mlp"):
        config.model.width = 1 / 16
    if config.optim.milestone_steps:
        config.optim.milestone_steps = (4, 8)
    config.train.total_steps = 12
    config.train.batch_size = 32
    config.train.log_every_steps = 4
    config.train.checkpoint_every_steps = 6
    config.train.probe_examples = 100
    config.eval.every_steps = 6
    config.sparsity.grow_examples = min(config.sparsity.grow_examples, 100)
    config.sparsity.interval_steps = 3
    config.sparsity.penalty_warmup_steps = min(3, config.sparsity.penalty_warmup_steps)
    config.tickets.rounds = min(config.tickets.rounds, 2)
    if config.tickets.rewind_steps:
        config.tickets.rewind_steps = 6
    if config.sparsity.begin_steps:
        config.sparsity.begin_steps = 2
    if config.sparsity.end_steps >= 0:
        config.sparsity.end_steps = 8
    if config.optim.warmup_steps:
        config.optim.warmup_steps = 2
