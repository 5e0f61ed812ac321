"""Configurations that nobody should write, as hypothesis strategies.

An example starts from a small run that works and spoils one to three of its fields, in
a configuration file (Python values) or on the command line (text). Half of the values
are such as the field might take, so that many examples pass the first checks and reach
the later ones.
"""

from typing import Any, NamedTuple

from hypothesis import strategies as st

from lottery_flow import augment, check, data, models, population
from lottery_flow.build import flat_fields
from lottery_flow.config import default
from lottery_flow.sparsity import at_init, distributions, initializers
from lottery_flow.sparsity.methods import RULES
from lottery_flow.sparsity.parameterizations import PARAMETERIZATIONS
from lottery_flow.sparsity.ticket_criteria import TICKET_CRITERIA
from lottery_flow.sparsity.ticket_weights import TREATMENTS

FIELDS = tuple(flat_fields(default()))

_PRUNING = {"sparsity.begin_steps": 0, "sparsity.end_steps": 3}
# Small runs that work, of every family of methods, over `run_cli.SMALL`.
BASES: tuple[dict[str, Any], ...] = (
    {},
    {"sparsity.rule": "rigl"},
    {"sparsity.rule": "set", "optim.name": "adam", "train.ema_decay": 0.9},
    {"sparsity.rule": "snfs", "sparsity.timing": "instead"},
    {"sparsity.rule": "dsr", "sparsity.rule_options": "n_prune=3"},
    {"sparsity.rule": "gradual_pruning", **_PRUNING},
    {"sparsity.rule": "han_pruning", "sparsity.rule_options": "quality=0.5"},
    {"sparsity.at_init": "snip"},
    {"sparsity.parameterization": "str"},
    {"sparsity.parameterization": "edge_popup"},
    {"tickets.rounds": 2, "tickets.treatment": "shuffle"},
    {"model.name": "lenet5", "model.widths": (2, 2, 3, 3), "sparsity.rule": "rigl"},
    {"data.name": "synthetic", "data.image_size": 8, "data.order_seed": 0},
    {"train.accumulate_steps": 2, "train.on_nonfinite": "skip"},
    {"optim.schedule": "step", "optim.milestone_steps": (2, 3)},
    {"train.seeds": (0, 1), "train.vary": "optim.learning_rate=0.1|0.2"},
)

_HUGE = (2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(2**31), -(10**30))
_NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 1000, 10**6, 10**9, *_HUGE)
_FLOATS = (
    *(-0.0, 0.0, 0.1, 0.5, 0.9, 1.0, 1.5, -0.1, 5e-324, 1e-300, 1e-40, 1e-8),
    *(0.9999999999, 1e9, 1e38, 1e39, 1e300, float("nan"), float("inf"), -float("inf")),
)
_TEXTS = (
    *("", " ", "None", "nan", "x", "ü", "模型", "\0", "\n", "\ud800", "a" * 5000),
    *("..", "../..", "/", "/etc/passwd", "~", "~nobody/x", "{seed}", "{0}", "%s"),
    *("=", ",", ";", "|", "a=b", "a=1,a=2", "fc1=0.5", "fc9=0.5", "fc1=nan", "fc1"),
    *("(", "((((" * 999, "'", '"', "`x`", "$(x)", "<script>", "a:b", "a/b", "-x"),
    *("huggingface:x", "mnist", "mnist/data_dir=x", "imagenet2012", "folder:"),
    *("folder:/", "folder:\0", "folder:none", "s3://x/y", "http://127.0.0.1:9/x"),
    *("2:4", "0:0", "4:2", "9:999999999", "block4x4", "block0x1", "channel"),
    *("block999999x1", "1e400", "9" * 5000, "fc1=csr_gathered", "fc1=x", "auto"),
    *("optim.learning_rate=0.1|0.2", "optim.learning_rate=nan", "model.name=a|b"),
    *("sparsity.sparsity=0.1|2", "data.order_seed=1|2", "data.order_seed=-9"),
    *("train.seeds=1", "sparsity.shuffle_masks=True|False", "optim=1", "=|="),
)
_TUPLES = (
    *((), (0,), (1,), (-1,), (5, 3), (3, 5), (1, 2, 3), (2, 2, 2, 2), ("a",), (None,)),
    *((float("nan"),), (True,), (1.5,), (10**9,), (10**30,), ((),), tuple(range(99))),
    *((1, 1), (2**32 - 1,), (2**32,), ("1",), (b"x",)),
)
_OTHERS = (None, True, False, [], [1], {}, {"a": 1}, b"x", 1j, {1}, ...)
_LITERALS = (
    *("1", "0", "-1", "3", "0.5", "-0.5", "1.0", "nan", "inf", "1e400", "True", "None"),
    *("()", "[]", "{}", "'a'", "x", "layer", "global", "after", "instead", "9" * 99),
    *("1e-300", "1e300", "-5", "100000000000", "b''", "((", "\0"),
)
_WORDS = st.sampled_from(
    [
        *("smoke", "length=5", "length=nan", "length=1e300", "length=-1", "length=0.1"),
        *("sparsity=0.5", "sparsity=2", "sparsity=1e400", "distribution=x"),
        *("x", "=", "smoke=1", "ü", "distribution=erdos_renyi", "\0"),
    ]
)

_KNOWN: dict[str, Any] = {
    "model.name": list(models.MODELS),
    "model.norm": ["", *models.NORMS],
    "model.kernel_init": ["", *models.KERNEL_INITS],
    "model.dtype": ["float32", "bfloat16"],
    "model.lowering": list(models.LOWERINGS),
    "model.init": list(initializers.INITIALIZERS),
    "model.init_fan": ["fan_in", "fan_out", "fan_avg"],
    "model.init_distribution": ["normal", "uniform", "truncated"],
    "data.name": [*data.DATASETS, "synthetic"],
    "data.augment": list(augment.AUGMENTATIONS),
    "optim.name": list(check.OPTIMIZERS),
    "optim.schedule": ["cosine", "constant", "step"],
    "sparsity.rule": list(RULES),
    "sparsity.at_init": list(at_init.METHODS),
    "sparsity.parameterization": list(PARAMETERIZATIONS),
    "sparsity.distribution": list(distributions.DISTRIBUTIONS),
    "sparsity.drop_schedule": list(check.DROP_SCHEDULES),
    "sparsity.timing": ["after", "instead"],
    "sparsity.grow_init": [
        "zeros",
        "initial_dist",
        "random_normal",
        "grad_scale",
        "grad_sign",
    ],
    "tickets.scope": ["global", "layer"],
    "tickets.criterion": list(TICKET_CRITERIA),
    "tickets.rewind": ["weights", "learning_rate", "fine_tune"],
    "tickets.treatment": [*TREATMENTS, "reinit"],
    "train.population": list(population.WAYS),
    "train.on_nonfinite": ["stop", "skip"],
    "train.execution": ["dense", "auto"],
}


class Input(NamedTuple):
    """A start of the program.

    Attributes:
      base: fields of the configuration file, over the small run's.
      values: fields that the file sets after them.
      texts: `(field, text)` that the command line sets.
      argument: after the colon behind the file, "" for none.
    """

    base: dict[str, Any]
    values: dict[str, Any]
    texts: list[tuple[str, str]]
    argument: str


def _options() -> st.SearchStrategy[str]:
    """Texts of options: names of arguments of methods, with any values."""
    makers = [*RULES.values(), *PARAMETERIZATIONS.values(), *TREATMENTS.values()]
    names = {n for make in makers for n in make.__code__.co_varnames if n[0] != "_"}
    names |= {*at_init.PruneAtInit._fields, "foo", ""}
    part = st.builds(
        "{}={}".format, st.sampled_from(sorted(names)), st.sampled_from(_LITERALS)
    )
    return st.lists(part, min_size=1, max_size=2).map(",".join)


def _likely(name: str) -> st.SearchStrategy[Any]:
    """Values of a field's own kind."""
    group, _, field = name.rpartition(".")
    like = default()[group][field] if group else default()[field]
    if name.endswith("_options"):
        return _options()
    if name in _KNOWN:
        return st.sampled_from(_KNOWN[name])
    if isinstance(like, bool):
        return st.booleans()
    if isinstance(like, int):
        return st.sampled_from(_NUMBERS) | st.integers(0, 20)
    if isinstance(like, float):
        return st.sampled_from(_FLOATS) | st.floats(0, 1)
    return st.sampled_from(_TUPLES if isinstance(like, tuple) else _TEXTS)


def _any() -> st.SearchStrategy[Any]:
    own = (*_NUMBERS, *_FLOATS, *_TEXTS, *_TUPLES, *_OTHERS)
    return st.sampled_from(own) | st.text(max_size=8) | st.floats() | st.integers()


def _value_of(name: str) -> st.SearchStrategy[tuple[str, Any]]:
    likely = _likely(name)
    return st.tuples(st.just(name), likely | likely | likely | _any())


_CHANGE = st.sampled_from(FIELDS).flatmap(_value_of)
# What is no field, and groups as a whole.
_ODD_NAMES = st.sampled_from(
    [
        *("optim", "optim.", ".", "", "x", "optim.x", "optim.name.x", "name.", "a b"),
        *("model.widths[0]", "train.seeds[9]", "train.seeds[", "train.seeds[:]"),
        *("optim.__class__", "lock", "optim.unlock", "(", "ü", "\0"),
    ]
)


def inputs() -> st.SearchStrategy[Input]:
    """Starts of the program with one to three fields spoilt."""
    text = st.tuples(st.just(None), _CHANGE | _CHANGE | st.tuples(_ODD_NAMES, _any()))

    def make(base, file_changes, flags, argument, by_file):
        values = dict(file_changes) if by_file else {}
        texts = [] if by_file else [(k, _text(v)) for _, (k, v) in flags]
        return Input(base, values, texts, argument)

    return st.builds(
        make,
        st.sampled_from(BASES),
        st.lists(_CHANGE, min_size=1, max_size=3),
        st.lists(text, min_size=1, max_size=3),
        st.just("") | st.just("") | st.just("") | st.just("") | _WORDS,
        st.booleans(),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
