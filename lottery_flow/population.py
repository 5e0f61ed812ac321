"""One network, or many at once: the compiled steps of a population.

A population of S members is advanced in one of two ways, which do the same:

- `one_by_one`: one compiled step of one member, dispatched for each, on all devices of
  the mesh. Nothing is gained from the others, and nothing lost: on one device, a member
  has the bits of a run of its own. The choice on CPUs, whose cores one network keeps
  busy, and for a single member.
- `together`: every leaf of the state but `step` has a leading axis S and the step is
  `vmap`ped, on one device or with the members spread over several. The choice on
  accelerators, which one small network leaves idle. `step` is the same for all and
  stays unbatched. Where all members see the same batches, what depends on nothing else
  is done once for all.

Likewise a *chunk* of steps is one program (`lax.scan`) where dispatching small steps
would cost more than they do, on accelerators, and a loop of steps on CPUs.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lottery_flow import parallel
from lottery_flow.errors import UserError
from lottery_flow.parallel import Devices
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
    ema=0,
    skipped=0,
)


class Population(NamedTuple):
    """Compiled functions of all members; those that train consume their state.

    Attributes:
      mesh: the devices, see `parallel`.
      join: `(members' states or knobs) -> those of the population`.
      split: `(state or metrics of the population) -> [those of each member]`.
      train: as `Steps.train`, for all members; `indices` have an axis s before the
        others, but where the batches are shared. Those that take turns take `plans=`,
        a list of those of each.
      chunk: the same for n steps; `indices` has an axis n before the others, and so
        have the metrics of each member.
      rewire: as `Steps.rewire`; `grow` is the same for all members.
      probe: as `Steps.probe`.
      evaluate: as `Steps.evaluate`.
    """

    mesh: Mesh
    join: Callable
    split: Callable
    train: Callable
    chunk: Callable
    rewire: Callable
    probe: Callable
    evaluate: Callable


def make(
    steps: Steps, n: int, *, way: str, devices: Devices, batch_size: int, shared: bool
) -> Population:
    """The population of `n` members, in the way that suits the backend.

    Args:
      steps: of one member.
      n: number of members.
      way: `auto`, or one of the two above.
      devices: asked for, see `parallel.make_mesh`.
      batch_size: of a step, which is cut along the devices.
      shared: whether all members see the same batches.

    Raises:
      UserError: the devices cannot be had so.
    """
    way = "one_by_one" if takes_turns(way, n, devices) else "together"
    if way == "one_by_one":
        mesh = parallel.make_mesh(1, batch_size, devices._replace(member=1))
        return one_by_one(steps, mesh=mesh, shared=shared)
    mesh = parallel.make_mesh(n, batch_size, devices)
    return together(steps, mesh=mesh, shared=shared)


def takes_turns(way: str, n: int, devices: Devices) -> bool:
    """Whether `n` members are trained one by one; see `make`."""
    if way != "auto":
        return way == "one_by_one"
    cpu = jax.default_backend() == "cpu"
    return n == 1 or (cpu and devices.member <= 1)


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


def one_by_one(steps: Steps, *, mesh: Mesh, shared: bool = False) -> Population:
    """The population as a list of members."""
    on_mesh = partial(_on_mesh, mesh)
    train_ = on_mesh(steps.train)
    train = jax.jit(train_, donate_argnums=0)
    chunk = jax.jit(_chunk(train_), donate_argnums=0)
    rewire = jax.jit(
        on_mesh(steps.rewire), donate_argnums=0, compiler_options=less_memory()
    )
    probe, evaluate = jax.jit(on_mesh(steps.probe)), jax.jit(on_mesh(steps.evaluate))

    def advance(step, axis, states, knobs, data, indices, *more, plans=None):
        if shared and mesh.size == 1:
            # On the device, so that the same batch is sent once for all.
            indices = jax.tree.map(jnp.asarray, indices)
        n = len(states)
        own = [indices] * n if shared else [indices.take(i, axis) for i in range(n)]
        planned = [()] * n if plans is None else [(plan,) for plan in plans]
        done = [
            step(*each, data, batch, *more, *plan)
            for *each, batch, plan in zip(states, knobs, own, planned, strict=True)
        ]
        return tuple(list(column) for column in zip(*done, strict=True))

    def each(fn):
        return lambda states, batch: [fn(state, batch) for state in states]

    return Population(
        mesh=mesh,
        join=list,
        split=list,
        train=lambda *args, **plans: advance(train, 0, *args, **plans),
        chunk=lambda *args, **plans: advance(chunk, 1, *args, **plans),
        rewire=lambda *args: advance(rewire, 0, *args),
        probe=each(probe),
        evaluate=each(evaluate),
    )


def together(steps: Steps, *, mesh: Mesh, shared: bool = False) -> Population:
    """The population as one state with an axis of members."""
    batches = None if shared else 0
    train = jax.vmap(steps.train, (_AXES, 0, None, batches), (_AXES, 0))
    rewire = jax.vmap(steps.rewire, (_AXES, 0, None, batches, None), (_AXES, 0, _AXES))
    probe = jax.vmap(steps.probe, (_AXES, None))
    evaluate = jax.vmap(steps.evaluate, (_AXES, None))

    def chunk(*args):
        state, metrics = _chunk(train)(*args)
        return state, jax.tree.map(lambda m: m.swapaxes(0, 1), metrics)

    state, each, all_ = _specs(_AXES), P("member"), P()
    own, own_chunk = (all_, all_) if shared else (each, P(None, "member"))
    # The compiler cuts along the others, where there are more devices.
    cut = mesh.size > mesh.shape["member"]
    by_hand = {"member"} if cut else set(parallel.AXES)

    def spread(fn, *specs, out, options: Any = None):
        """Each device takes its members; none of them ever speaks to another."""
        # What is not spread is the same everywhere, as far as we can see it.
        mapped = jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=specs,
            out_specs=out,
            axis_names=by_hand,
            check_vma=False,
        )
        donated = () if out is each else 0
        placed = _on_mesh(mesh, mapped, member=True)
        return jax.jit(placed, donate_argnums=donated, compiler_options=options)

    def join(members: Sequence[Any]):
        structures = {str(jax.tree.structure(m)) for m in members}
        if len(structures) > 1:
            raise UserError(
                "members that are trained together need the same layers to be sparse; "
                "train those with other dense layers apart, or with "
                "train.population=one_by_one"
            )
        if not isinstance(members[0], TrainState):
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
            return parallel.put(stacked, parallel.sharding(mesh, "member"))
        return stack(list(members))

    @jax.jit
    def stack(members):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        stacked = _with_steps(stacked, lambda step: step[0])
        return _settle(mesh, stacked, member=True)

    @jax.jit
    def unstack(tree):
        n = len(tree.key)
        tree = _with_steps(tree, lambda step: jnp.broadcast_to(step, (n,)))
        members = [jax.tree.map(operator.itemgetter(i), tree) for i in range(n)]
        return [_settle(mesh, member) for member in members]

    def split(tree):
        if isinstance(tree, TrainState):
            return unstack(tree)
        tree = jax.device_get(tree)
        n = len(jax.tree.leaves(tree)[0])
        return [jax.tree.map(operator.itemgetter(i), tree) for i in range(n)]

    return Population(
        mesh=mesh,
        join=join,
        split=split,
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

    def chunk(state, knobs, data, indices, *plans):
        return lax.scan(lambda s, i: train(s, knobs, data, i, *plans), state, indices)

    return chunk


def _on_mesh(mesh: Mesh, fn: Callable, *, member: bool = False) -> Callable:
    """`fn` with its batch cut, and results that lie where the next step wants them."""
    if mesh.size == 1:
        return fn

    def cut(indices):
        where = parallel.batch_sharding(mesh, indices.shape[-1], indices.ndim - 1)
        return lax.with_sharding_constraint(indices, where)

    def placed(state, *args):
        if len(args) > 1:  # not only a batch, which was cut on the host
            # Plans come only where there is one device.
            knobs, data, indices, *grow = args
            args = knobs, data, jax.tree.map(cut, indices), *grow
        out = fn(state, *args)
        if type(out) is not tuple:
            return _settle(mesh, out, member=member)
        return tuple(_settle(mesh, one, member=member) for one in out)

    return placed


def _settle(mesh: Mesh, tree: Any, *, member: bool = False) -> Any:
    """A state as `parallel.state_sharding` says, metrics where each process reads."""
    if mesh.size == 1:
        return tree
    if not isinstance(tree, TrainState):
        apart = mesh.size == mesh.shape["member"] and jax.process_count() == 1
        whole = parallel.sharding(mesh)
        return tree if apart else lax.with_sharding_constraint(tree, whole)
    axes = _AXES if member else jax.tree.map(lambda _: None, _AXES, is_leaf=_is_axis)

    def settle(axis, part):
        return jax.tree.map(
            lambda leaf: lax.with_sharding_constraint(
                leaf, parallel.state_sharding(mesh, leaf, axis is not None)
            ),
            part,
        )

    return jax.tree.map(settle, axes, tree, is_leaf=_is_axis)


def _is_axis(axis: Any) -> bool:
    return axis is None


def _specs(axes) -> Any:
    return jax.tree.map(
        lambda axis: P() if axis is None else P("member"), axes, is_leaf=_is_axis
    )


def _with_steps(state: TrainState, fn: Callable) -> TrainState:
    """`fn` of the two counters that have no axis of members."""
    opt_state = state.opt_state
    return state._replace(
        step=fn(state.step), opt_state=opt_state._replace(step=fn(opt_state.step))
    )
