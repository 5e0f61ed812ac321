"""Freed memory is kept."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, threading
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def touch():
    p = c.malloc(ctypes.c_size_t(1 << 27))
    ctypes.memset(p, 1, 1 << 27)
    c.free(p)

def in_a_thread():
    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()

def repeat(fn):
    for _ in range(5):
        fn()

repeat(FN)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
repeat(FN)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from lottery_flow import allocator; assert allocator.keep_freed_memory()"

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")


def faults(first: str, fn: str) -> int:
    """Pages that are mapped for five blocks after `first`, and five others."""
    program = f"{first}\n{COUNT.replace('FN', fn)}"
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@on_glibc
def test_pages_are_mapped_once():
    assert faults(KEEP, "touch") < 100
    assert faults("", "touch") > 1000


@on_glibc
@pytest.mark.parametrize("package", ["experiments", "benchmarks"])
def test_threads_of_commands_keep_their_memory(package):
    first = f"import {package}, pandas  # in the order of the commands"
    assert faults(first, "in_a_thread") < 1000
