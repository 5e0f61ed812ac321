"""Memory that was freed is kept for the next step.

A compiled step asks for its temporary buffers anew each time. From 32 MB on, the C
library maps fresh pages for them and returns them after the step, and the kernel fills
every page with zeros at its first touch: for a population of five LeNet-5 that took a
third of the step.
"""

import ctypes
import platform

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Asks glibc never to return memory; says whether it does as it was asked.

    To be called before any thread takes memory: what threads of an earlier arena take
    is returned. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_ARENA_MAX, 1),
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, 2**31 - 1),
        (_TOP_PAD, 64 << 20),
    )
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
