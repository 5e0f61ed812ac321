"""A disk that takes no more, full or read-only, is told in one sentence.

Such an error comes from us, from orbax or from what writes its arrays, in threads
beside, with another one that follows it. Nothing on the disk is lost by it: rows and
checkpoints are appended or renamed whole, and what is half written does not count.
"""

import contextlib
import errno
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lottery_flow.errors import DiskError

# Of these the first are only ever met in writing.
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG
_OTHERS = errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE
# As tensorstore ends its messages.
_CODE = re.compile(r"os_error_code='(\d+)'")


@contextlib.contextmanager
def told(roots: Sequence[Path]) -> Iterator[None]:
    """What goes wrong in writing to run directories becomes a user's mistake.

    Raises:
      DiskError: there is no room, or no right to write; says what is to be done.
    """
    try:
        yield
    except Exception as error:  # of many types
        reason = _reason(error, roots)
        if reason is None:
            raise
        # Of what orbax did not get to any more.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        more = f" and {len(roots) - 1} more" if len(roots) > 1 else ""
        raise DiskError(
            f"cannot write to {roots[0]}{more} ({reason}); nothing that was there is "
            "lost: mend that, and the same command goes on from the newest checkpoint"
        ) from error


def _reason(error: BaseException, roots: Sequence[Path]) -> str | None:
    """What the system said; None if the error is no such one."""
    link: BaseException | None = error
    while link is not None:
        text, number = str(link), getattr(link, "errno", None)
        if (found := _CODE.search(text)) is not None:
            number = int(found[1])
        ours = any(str(root.absolute()) in text for root in roots)
        if number in _FULL or (number in _OTHERS and ours):
            return os.strerror(number)
        link = link.__cause__ or link.__context__
    return None
