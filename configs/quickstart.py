"""RigL on LeNet-5 at 90 % sparsity on scikit-learn's digits.

    python -m lottery_flow.main --config=configs/quickstart.py

Needs no data but scikit-learn's own. A minute and a half of CPU time; 97 % test
accuracy.
"""

from ml_collections import ConfigDict

from lottery_flow.config import default, finish


def get_config(arg: str = "") -> ConfigDict:
    config = default()
    config.name = "quickstart"
    config.optim.weight_decay = 1e-3
    config.model.init = "per_neuron"
    config.sparsity.rule = "rigl"
    config.sparsity.sparsity = 0.9
    config.sparsity.interval_steps = 100
    config.sparsity.grow_examples = 300
    config.train.total_steps = 800
    config.train.probe_examples = 300
    config.train.log_every_steps = 50
    config.eval.every_steps = 100
    return finish(config, arg)
