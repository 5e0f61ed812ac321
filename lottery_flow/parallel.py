"""Devices: one mesh, what of a run lies where on it, and many processes.

    mesh = (member, data, model)

`member` has the members of a population, which never speak to each other. Every batch
is cut along `data` and `model` together. Along `model` the state itself is cut, too:
each device keeps a part of every large array of parameters, slots of the optimizer and
masks, and the whole of it only while a step needs it ("fully sharded", Rajbhandari et
al. 2020, arXiv 1910.02054). Along `data` every device keeps all of the state.

What is computed does not depend on the mesh, only the order of its sums does. With many
processes each runs the same program, on devices of its own; masks are decided in it, by
numbers that all of them have.
"""

import logging
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from lottery_flow.errors import UserError

_LOG = logging.getLogger(__name__)

AXES = ("member", "data", "model")
# Smaller arrays lie whole on every device: to bring them together would cost more.
_SMALLEST_CUT = 1024
# Seconds without a sign of life after which a process counts as lost; and for which one
# waits for the others, at the start and at the end.
_LOST, _START, _END = 20, 120, 20


class Devices(NamedTuple):
    """How many devices along each axis of the mesh; 0 chooses.

    Attributes:
      member: to spread the members of a population over.
      data: to cut batches along.
      model: to cut batches and the state along.
    """

    member: int = 0
    data: int = 0
    model: int = 1


def start(
    coordinator: str = "", n_processes: int | None = None, process: int | None = None
) -> None:
    """Joins the processes of this run; before anything else is done with devices.

    Args:
      coordinator: `host:port` of the first process; "" finds out, with the two others,
        from Cloud TPU, Slurm or Open MPI.
      n_processes: how many there are.
      process: which of them this one is, from 0.

    Raises:
      UserError: they do not find each other.
    """
    given = (coordinator or None, n_processes, process)
    if any(v is None for v in given) and any(v is not None for v in given):
        raise UserError(
            f"--coordinator={coordinator!r}, --n_processes={n_processes} and "
            f"--process={process}: give all three or, on Cloud TPU, under Slurm and "
            "Open MPI, none"
        )
    try:
        jax.distributed.initialize(
            *given,
            heartbeat_timeout_seconds=_LOST,
            initialization_timeout=_START,
            shutdown_timeout_seconds=_END,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--distributed: the processes did not find each other ({reason}); give "
            "--coordinator, --n_processes and --process"
        ) from error
    _LOG.info(
        "process %d of %d, %d of %d devices",
        *(jax.process_index(), jax.process_count()),
        *(jax.local_device_count(), jax.device_count()),
    )


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_mesh(n_members: int, batch_size: int, asked: Devices) -> Mesh:
    """The mesh for members that are trained together, or 1.

    Nobody asking, all devices are used that can be: those for the members first, then
    as many along `data` as divide the batch. Only one is on a CPU, whose simulated
    devices share its cores, unless there are many processes.

    Raises:
      UserError: more devices than there are, numbers that do not divide the members or
        the batch, or a process without work.
    """
    n_devices, many = jax.device_count(), jax.process_count() > 1
    free = n_devices if many or jax.default_backend() != "cpu" else 1
    member, data, model = asked
    member = member or math.gcd(n_members, max(1, free // (max(data, 1) * model)))
    # Where some members are finished already, the others may be fewer than devices.
    member = math.gcd(member, n_members)
    if not data:
        able = range(1, free // (member * model) + 1)
        data = max((d for d in able if not batch_size % (d * model)), default=1)
    shape = member, data, model
    used = math.prod(shape)
    if used > n_devices:
        for name, n in zip(AXES, asked, strict=True):
            if n > n_devices:
                raise UserError(
                    f"train.{name}_devices={n}: there are {n_devices} devices; give "
                    "at most as many"
                )
        raise UserError(
            f"train.member_devices={member} times train.data_devices={data} times "
            f"train.model_devices={model} are more than the {n_devices} devices that "
            "there are; give fewer"
        )
    if batch_size % (data * model):
        raise UserError(
            f"train.batch_size={batch_size} cannot be cut into train.data_devices="
            f"{data} times train.model_devices={model} equal parts; give a multiple "
            f"of {data * model}"
        )
    if many and used < n_devices:
        raise UserError(
            f"train.batch_size={batch_size} occupies {used} of the {n_devices} devices "
            f"of {jax.process_count()} processes; give a multiple of {n_devices}"
        )
    # Those of a process side by side, so that its part of a batch is in one piece.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))[:used]
    if used > 1:
        _LOG.info("devices: %s", ", ".join(map("{} {}".format, AXES, shape)))
    if not asked.data and used < free:
        _LOG.warning(
            "%d of %d devices have nothing to do; a multiple of %d as "
            "train.batch_size would occupy them",
            *(free - used, free, free // member),
        )
    return Mesh(np.array(devices).reshape(shape), AXES)


def one_device() -> Mesh:
    """The mesh of what is computed by this process alone."""
    return Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1), AXES)


def sharding(mesh: Mesh, *spec: Any) -> Sharding:
    """The sharding of a partition spec; whole on every device without one."""
    if mesh.size == 1:
        return SingleDeviceSharding(mesh.devices.flat[0])
    return NamedSharding(mesh, P(*spec))


def batch_sharding(mesh: Mesh, n_examples: int, axis: int = 0) -> Sharding:
    """Examples along `axis`, cut if they can be, else whole on every device."""
    parts = mesh.shape["data"] * mesh.shape["model"]
    cut = ("data", "model") if n_examples % parts == 0 else None
    return sharding(mesh, *(None,) * axis, cut)


def state_sharding(mesh: Mesh, leaf: Any, member: bool = False) -> Sharding:
    """Where an array of the state lies.

    Args:
      mesh: of the run.
      leaf: the array, or its shape and dtype.
      member: whether its first axis is that of the members.
    """
    n, lead = mesh.shape["model"], ("member",) * member
    shape = leaf.shape[len(lead) :]
    able = [i for i, size in enumerate(shape) if size % n == 0]
    if n == 1 or not able or math.prod(shape) < _SMALLEST_CUT:
        return sharding(mesh, *lead)
    axis = max(able, key=lambda i: shape[i])
    return sharding(mesh, *lead, *(None,) * axis, "model")


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Where the state of one member lies, see `state_sharding`."""
    return jax.tree.map(partial(state_sharding, mesh), state)


def state_like(mesh: Mesh, state: PyTree) -> PyTree:
    """Shapes and dtypes of a member's state, on their shardings, to restore into."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        state,
        state_shardings(mesh, state),
    )


def put(tree: PyTree, where: PyTree) -> PyTree:
    """Arrays that every process has, on the shardings `where`, a prefix of the tree."""

    def place(own: Sharding, leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(own, jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        # From the host: to cut what lies on a device is a program for each shape.
        whole = np.asarray(leaf) if len(own.device_set) > 1 else leaf
        if jax.process_count() == 1:
            return jax.device_put(whole, own)
        return jax.make_array_from_callback(whole.shape, own, whole.__getitem__)

    return jax.tree.map(
        lambda own, part: jax.tree.map(partial(place, own), part), where, tree
    )


def own_part(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(i, n): this process needs the i-th of n equal parts of every batch."""
    where = batch_sharding(mesh, batch_size)
    rows: Any = where.addressable_devices_indices_map((batch_size,)).values()
    starts, ends = zip(*(own[0].indices(batch_size)[:2] for own in rows), strict=True)
    first, size = min(starts), max(ends) - min(starts)
    if first % size or batch_size % size:
        return 0, 1  # members that begin within a process: it has all
    return first // size, batch_size // size


def join_parts(mesh: Mesh, batch: PyTree, n: int) -> PyTree:
    """A batch of `n` examples of which each process has its own part."""
    where = batch_sharding(mesh, n)

    def join(leaf):
        shape = (n, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(where, leaf, shape)

    return jax.tree.map(join, batch)
