"""What is free in the heap goes back to the system, also where something that is used lies behind it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import ctypes
from pathlib import Path
from deepen_ext.serving.heap import return_free_memory

def resident():  # MiB
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(64 << 10) for _ in range(1600)]  # 100 MiB
for block in blocks:
    ctypes.memset(block, 1, 64 << 10)
behind = libc.malloc(64 << 10)
before = resident()
for block in blocks:
    libc.free(block)
print(before - resident())
return_free_memory()
print(before - resident())
"""


def test_free_memory_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    by_itself, returned = map(int, done.stdout.split())
    assert by_itself < 20
    assert returned > 80
