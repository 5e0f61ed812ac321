"""The table of parameterizations: methods whose trained values are not the weights.

Each function takes the options of its method and returns a
`parameterization.Parameterization`.
"""

from collections.abc import Callable

from lottery_flow.sparsity.l0_parameterization import l0_hard_concrete
from lottery_flow.sparsity.parameterization import Parameterization
from lottery_flow.sparsity.score_parameterizations import edge_popup, supermask
from lottery_flow.sparsity.variational_parameterizations import (
    bayesian_compression,
    variational_dropout,
)
from lottery_flow.sparsity.weight_parameterizations import (
    dnw,
    magnitude_ste,
    str_,
    top_kast,
)

PARAMETERIZATIONS: dict[str, Callable[..., Parameterization]] = {
    "dnw": dnw,
    "magnitude_ste": magnitude_ste,
    "top_kast": top_kast,
    "str": str_,
    "edge_popup": edge_popup,
    "supermask": supermask,
    "variational_dropout": variational_dropout,
    "l0_hard_concrete": l0_hard_concrete,
    "bayesian_compression": bayesian_compression,
}
