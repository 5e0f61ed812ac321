"""SIGTERM: a run that is asked to end saves where it stands, and can go on.

Clusters send it before they take a machine away. All processes stop after the same
step: what one of them was asked reaches the others with a sum over all devices, which
each reads one step late, so that no device waits for it.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Stopped(Exception):
    """The run was asked to end and has saved what it needs to go on."""


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Takes note of SIGTERM instead of ending at once.

    Yields:
      `() -> bool`, whether any process was asked; all processes call it equally often
      and get the same answers. Elsewhere than in the main thread, which alone can watch
      for signals, this process never was.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield _shared(asked)
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield _shared(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def _shared(asked: threading.Event) -> Callable[[], bool]:
    if jax.process_count() == 1:
        return asked.is_set
    mesh = Mesh(np.array(jax.devices()), ("device",))
    each = NamedSharding(mesh, P("device"))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
    n = jax.local_device_count()

    def count() -> jax.Array:
        own = np.full(n, asked.is_set(), np.int32)
        return total(jax.make_array_from_process_local_data(each, own))

    waiting = [count()]

    def any_asked() -> bool:
        waiting.append(count())
        return bool(jax.device_get(waiting.pop(0)))

    return any_asked
