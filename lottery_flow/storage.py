"""How the weights and slots of a run are kept from one rewire to the next.

`train.storage=compact` keeps parameters, their average and the optimizer's slots on the
active positions alone from one event (rewire, row of metrics, checkpoint) to the next;
everything but the steps in between sees the network as it ever is. See
`sparsity.compact`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lottery_flow.job import Job
from lottery_flow.sparsity import compact
from lottery_flow.sparsity import masks as masks_lib
from lottery_flow.sparsity.masks import Params


class Storage(NamedTuple):
    """How the network is kept between rewires, see `train.storage`.

    Attributes:
      is_compact: whether on the active positions alone.
      pack: `(members' states, their plans) -> states` as the steps of the training
        want them.
      unpack: the other way round, as everything else wants them.
    """

    is_compact: bool
    pack: Callable
    unpack: Callable


def make(job: Job, knobs: Sequence[Any], params: Params) -> Storage:
    """How the networks of a run are kept.

    Args:
      job: of the run; `job.storage` is `train.storage`.
      knobs: of each member.
      params: of a network, or their shapes.
    """
    if job.storage == "masked":
        return Storage(False, lambda states, _: states, lambda states, _: states)
    leaves = masks_lib.named_leaves(params)
    shapes = {k: v.shape for k, v in leaves.items()}

    def positions_in(plan):
        alone = plan.get("csr_gathered", {})
        return plan["positions"] | {k: own.positions for k, own in alone.items()}

    @jax.jit
    def pack(state, knobs, plan):
        inner, positions = job.make_method(knobs)[0], positions_in(plan)
        params = compact.pack(state.params, positions)
        opt_state = state.opt_state._replace(
            masks=masks_lib.dense(state.params),
            inner_state=compact.pack_slots(
                inner, state.opt_state.inner_state, positions, state.params
            ),
        )
        ema = compact.pack(state.ema, positions)
        return state._replace(params=params, opt_state=opt_state, ema=ema)

    @jax.jit
    def unpack(state, knobs, plan):
        inner, positions = job.make_method(knobs)[0], positions_in(plan)
        params = compact.unpack(state.params, positions, shapes)
        masks = {k: compact.mask_of(v, shapes[k]) for k, v in positions.items()}
        opt_state = state.opt_state._replace(
            masks=masks_lib.from_named(masks, params),
            inner_state=compact.unpack_slots(
                inner, state.opt_state.inner_state, positions, state.params, shapes
            ),
        )
        ema = compact.unpack(state.ema, positions, shapes)
        return state._replace(params=params, opt_state=opt_state, ema=ema)

    def each(fn, is_done):
        def of(states, plans):
            members = zip(states, knobs, plans, strict=True)
            return [s if is_done(s) else fn(s, k, plan) for s, k, plan in members]

        return of

    def is_packed(state):
        return not jax.tree.leaves(state.masks)

    return Storage(
        True, each(pack, is_packed), each(unpack, lambda s: not is_packed(s))
    )
