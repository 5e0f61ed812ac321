"""One network, or many at once: the compiled steps of a population.

A population of S members is advanced in one of two ways, which do the same:

- `one_by_one`: one compiled step of one member, dispatched for each. Nothing is gained
  from the others, and nothing lost: a member has the bits of a run of its own. The
  choice on CPUs, whose cores one network keeps busy, and for a single member.
- `together`: every leaf of the state but `step` has a leading axis S and the step is
  `vmap`ped, on one device or with the members spread over several. The choice on
  accelerators, which one small network leaves idle. `step` is the same for all and
  stays unbatched. Where all members see the same batches, what depends on nothing else
  is done once for all.

Likewise a *chunk* of steps is one program (`lax.scan`) where dispatching small steps
would cost more than they do, on accelerators, and a loop of steps on CPUs.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lottery_flow.errors import UserError
from lottery_flow.sparsity.transform import SparseState
from lottery_flow.state import TrainState
from lottery_flow.steps import Steps

WAYS = ("auto", "one_by_one", "together")
# Steps of a chunk on accelerators, where nobody asks for another number.
_CHUNK = 100

_SHARED: Any = None
# The axis of the members in every part of a population's state.
_AXES = TrainState(
    step=_SHARED,
    params=0,
    batch_stats=0,
    opt_state=SparseState(step=_SHARED, key=0, masks=0, rule_state=0, inner_state=0),
    key=0,
)


class Population(NamedTuple):
    """Compiled functions of all members; those that train consume their state.

    Attributes:
      join: `(members' states or knobs) -> those of the population`.
      split: `(state or metrics of the population) -> [those of each member]`.
      place: `(data) -> data` on the devices of the population.
      train: as `Steps.train`, for all members; `indices` int32 [s b], or [b] or None
        where the batches are shared.
      chunk: the same for n steps; `indices` has an axis n before the others, and so
        have the metrics of each member.
      rewire: as `Steps.rewire`; `grow` is the same for all members.
      probe: as `Steps.probe`.
      evaluate: as `Steps.evaluate`.
    """

    join: Callable
    split: Callable
    place: Callable
    train: Callable
    chunk: Callable
    rewire: Callable
    probe: Callable
    evaluate: Callable


def make(steps: Steps, n: int, *, way: str, n_devices: int, shared: bool) -> Population:
    """The population of `n` members, in the way that suits the backend.

    Args:
      steps: of one member.
      n: number of members.
      way: `auto`, or one of the two above.
      n_devices: to spread the members over; 0 chooses.
      shared: whether all members see the same batches.

    Raises:
      UserError: more devices than there are.
    """
    cpu, there = jax.default_backend() == "cpu", jax.local_device_count()
    if n_devices > there:
        raise UserError(
            f"train.member_devices={n_devices}: there are {there} devices; give at "
            "most as many, or 0"
        )
    if way == "auto":
        single = n == 1 or (cpu and n_devices <= 1)
        way = "one_by_one" if single else "together"
    if way == "one_by_one":
        return one_by_one(steps, shared=shared)
    if not n_devices:
        n_devices = 1 if cpu else there
    # Where some members are finished already, the others may be fewer than devices.
    return together(steps, n_devices=math.gcd(n, n_devices), shared=shared)


def chunk_steps(asked: int) -> int:
    """Steps that one program takes; `asked` is the number given, 0 chooses."""
    return asked or (1 if jax.default_backend() == "cpu" else _CHUNK)


def less_memory() -> dict[str, str] | None:
    """Compiler options for a program that holds many buffers, as a rewire does.

    XLA's CPU compiler orders operations so that as many as possible can run at once,
    which for a rewire of ResNet-50 takes twice the memory and saves no time.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def one_by_one(steps: Steps, *, shared: bool = False) -> Population:
    """The population as a list of members."""
    train = jax.jit(steps.train, donate_argnums=0)
    chunk = jax.jit(_chunk(steps.train), donate_argnums=0)
    rewire = jax.jit(steps.rewire, donate_argnums=0, compiler_options=less_memory())
    probe, evaluate = jax.jit(steps.probe), jax.jit(steps.evaluate)

    def advance(step, axis, states, knobs, data, indices, *grow):
        # On the device, so that the same batch is sent once for all.
        split = [jax.tree.map(jnp.asarray, indices)] * len(states) if shared else None
        own = split or [indices.take(i, axis) for i in range(len(states))]
        done = [
            step(*each, data, batch, *grow)
            for *each, batch in zip(states, knobs, own, strict=True)
        ]
        return tuple(list(column) for column in zip(*done, strict=True))

    def each(fn):
        return lambda states, batch: [fn(state, batch) for state in states]

    return Population(
        join=list,
        split=list,
        place=lambda data: jax.tree.map(jnp.asarray, data),
        train=lambda *args: advance(train, 0, *args),
        chunk=lambda *args: advance(chunk, 1, *args),
        rewire=lambda *args: advance(rewire, 0, *args),
        probe=each(probe),
        evaluate=each(evaluate),
    )


def together(steps: Steps, *, n_devices: int = 1, shared: bool = False) -> Population:
    """The population as one state with an axis of members."""
    batches = None if shared else 0
    train = jax.vmap(steps.train, (_AXES, 0, None, batches), (_AXES, 0))
    rewire = jax.vmap(steps.rewire, (_AXES, 0, None, batches, None), (_AXES, 0, _AXES))
    probe = jax.vmap(steps.probe, (_AXES, None))
    evaluate = jax.vmap(steps.evaluate, (_AXES, None))

    def chunk(*args):
        state, metrics = _chunk(train)(*args)
        return state, jax.tree.map(lambda m: m.swapaxes(0, 1), metrics)

    mesh = Mesh(np.array(jax.local_devices()[:n_devices]), ("member",))
    state, each, all_ = _specs(_AXES), P("member"), P()
    own, own_chunk = (all_, all_) if shared else (each, P(None, "member"))

    def spread(fn, *specs, out, options: Any = None):
        """Each device takes its members; none of them ever speaks to another."""
        # What is not spread is the same everywhere, as far as we can see it.
        mapped = jax.shard_map(
            fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
        )
        donated = () if out is each else 0
        return jax.jit(mapped, donate_argnums=donated, compiler_options=options)

    def place(tree, specs):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.device_put(tree, shardings)

    def join(members: Sequence[Any]):
        structures = {str(jax.tree.structure(m)) for m in members}
        if len(structures) > 1:
            raise UserError(
                "members that are trained together need the same layers to be sparse; "
                "train those with other dense layers apart, or with "
                "train.population=one_by_one"
            )
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        if not isinstance(stacked, TrainState):
            return place(stacked, each)
        return place(_with_steps(stacked, lambda step: step[0]), state)

    def split(tree):
        if isinstance(tree, TrainState):
            n = len(tree.key)
            tree = _with_steps(tree, lambda step: jnp.broadcast_to(step, (n,)))
            # One device: what a checkpoint says of many, others could not restore.
            tree = jax.device_put(tree, jax.local_devices()[0])
        else:
            tree = jax.device_get(tree)
            n = len(jax.tree.leaves(tree)[0])
        return [jax.tree.map(operator.itemgetter(i), tree) for i in range(n)]

    return Population(
        join=join,
        split=split,
        place=lambda data: place(data, all_),
        train=spread(train, state, each, all_, own, out=(state, each)),
        chunk=spread(chunk, state, each, all_, own_chunk, out=(state, each)),
        rewire=spread(
            *(rewire, state, each, all_, own, all_),
            out=(state, each, state),
            options=less_memory(),
        ),
        probe=spread(probe, state, all_, out=each),
        evaluate=spread(evaluate, state, all_, out=each),
    )


def _chunk(train: Callable) -> Callable:
    """`train` for every row of `indices`, in one program."""

    def chunk(state, knobs, data, indices):
        return lax.scan(lambda s, i: train(s, knobs, data, i), state, indices)

    return chunk


def _specs(axes) -> Any:
    return jax.tree.map(
        lambda axis: P() if axis is None else P("member"),
        axes,
        is_leaf=lambda axis: axis is None,
    )


def _with_steps(state: TrainState, fn: Callable) -> TrainState:
    """`fn` of the two counters that have no axis of members."""
    opt_state = state.opt_state
    return state._replace(
        step=fn(state.step), opt_state=opt_state._replace(step=fn(opt_state.step))
    )
