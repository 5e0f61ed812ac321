"""Files that are written whole or not at all, and never through a link."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# What file systems say that cannot sync a directory.
_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """A path beside the file, which takes its place when all is written.

    Whatever happens, a loss of power too, there is the old file or the new one. What
    was written goes when anything fails. A link in the file's place is replaced; what
    it points to is left alone.

    Args:
      path: the file.
      writer: tells apart those that write it at the same time; "" where there is one.

    Raises:
      OSError: the disk is full, for instance.
    """
    # The ending stays: some writers go by it.
    temporary = path.with_name(f".partial{writer}-{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        _sync(path.parent)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def write(path: Path, content: str | bytes) -> None:
    """Writes the file by `replacing` it."""
    with replacing(path) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content)


def _sync(path: Path) -> None:
    """Forces what was written there to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
