"""Freed memory is kept."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from lottery_flow import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed_memory()
import ctypes, resource
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def touch():
    p = c.malloc(ctypes.c_size_t(1 << 27))
    ctypes.memset(p, 1, 1 << 27)
    c.free(p)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


IN_THREADS = """
import experiments, pandas  # in the order of the commands
import ctypes, resource, threading
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def touch():
    p = c.malloc(ctypes.c_size_t(1 << 27))
    ctypes.memset(p, 1, 1 << 27)
    c.free(p)

def in_threads():
    for _ in range(4):
        thread = threading.Thread(target=touch)
        thread.start()
        thread.join()

in_threads()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_threads()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")


@on_glibc
def test_pages_are_mapped_once():
    def faults(how):
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert faults("keep") < 100
    assert faults("leave") > 1000


@on_glibc
def test_threads_of_experiments_keep_their_memory():
    command = [sys.executable, "-c", IN_THREADS]
    told = subprocess.run(command, capture_output=True, check=True)
    assert int(told.stdout) < 1000
