"""One process for each run directory: a lock that the kernel gives back.

    <run>/lock        {"host": "node7", "pid": 4711}, while the run is trained

It is `flock` on that file, which ends with the process that holds it, killed or not: a
file that a killed process left is no obstacle and is taken over. What it says is only
for the message. NFS passes `flock` on to its server, so that processes on many hosts
see each other, where its lock service runs; on a file system without locks the holder's
process id is looked at instead, which cannot tell whether a process of another host
still runs: its file has to be deleted by hand.

Only what writes a run locks it, in a distributed job the first process alone. Reading
never does.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lottery_flow.errors import UserError

_LOG = logging.getLogger(__name__)

_NO_LOCKS = errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Nobody else trains the run of this directory meanwhile.

    The directory is made if need be; one that is still empty goes with the lock.

    Raises:
      UserError: another process holds it, or the directory cannot be written.
    """
    path = directory / "lock"
    try:
        made = _make(directory)
        file = _take(path)
    except OSError as error:
        raise UserError(
            f"--workdir: cannot write to {directory} ({error.strerror}); give a "
            "directory that you may write to"
        ) from error
    try:
        with contextlib.suppress(OSError):  # of a full disk; it is only for the message
            os.write(file, json.dumps(_me()).encode())
        yield
    finally:
        # Before it is given back: whoever opened it meanwhile sees that it is gone.
        # A file that cannot be deleted any more is no obstacle.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(file)
        for own in made:
            with contextlib.suppress(OSError):
                own.rmdir()


def _make(directory: Path) -> list[Path]:
    """Makes a directory; returns those of it that were not there, the deepest first."""
    made = []
    for own in directory, *directory.parents:
        if own.exists():
            break
        made.append(own)
    directory.mkdir(parents=True, exist_ok=True)
    return made


def _take(path: Path) -> int:
    """Opens and locks the file."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the last holder took its empty directory along
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            os.close(file)
            raise _refusal(path, holder) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise
            holder = _read(file)
            if _may_live(holder):
                os.close(file)
                raise _refusal(path, holder) from None
            _LOG.warning(
                "%s: this file system has no locks (%s); see that no other host "
                "trains this run",
                *(path, error.strerror),
            )
        with contextlib.suppress(FileNotFoundError):
            # Otherwise its holder deleted it after we opened it, and it locks nothing.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                os.ftruncate(file, 0)
                return file
        os.close(file)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _read(file: int) -> dict[str, Any]:
    """What the holder wrote, {} if it did not yet."""
    try:
        found = json.loads(os.pread(file, 1000, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether a holder may be another process that still runs."""
    if not holder or holder == _me():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError, TypeError):
        return False
    except PermissionError:
        return True
    return True


def _refusal(path: Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
    return UserError(
        f"{path.parent} is being trained by {who}, which holds {path}; wait for it or "
        "end it, or give another --workdir"
    )
