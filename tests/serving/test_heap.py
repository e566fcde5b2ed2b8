"""Large blocks go back to the system, however many were freed before."""

from __future__ import annotations

import os
import subprocess
import sys

# mallinfo2: hblkhd is the fifth number, bytes of the blocks that are mapped apart from the heap.
PROGRAM = """
import ctypes, sys
from deepen_ext.serving.heap import return_large_blocks

class Info(ctypes.Structure):
    _fields_ = [(f"n{i}", ctypes.c_size_t) for i in range(10)]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
if "call" in sys.argv:
    return_large_blocks()
for size in (9 << 20, 8 << 20, 8 << 20):
    before = libc.mallinfo2().n4
    block = libc.malloc(size)
    print((libc.mallinfo2().n4 - before) >> 20)
    libc.free(block)
"""


def mapped(*arguments: str, **environment: str) -> list[int]:
    """MiB that lie apart from the heap, for each of three blocks one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in done.stdout.split()]


def test_each_large_block_is_mapped_apart() -> None:
    assert mapped("call") == [9, 8, 8]
    assert mapped() == [9, 0, 0]  # glibc by itself
    assert mapped("call", MALLOC_MMAP_THRESHOLD_=str(16 << 20)) == [0, 0, 0]  # the user's own
