"""How much the Python part of the fuzzing does, and what it did.

DEEPEN_FUZZ_SCALE=100 makes each test a hundred times as long (`make fuzz`). DEEPEN_FUZZ_RECORD is a file that
gets a line of JSON for each test.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

SCALE = float(os.environ.get("DEEPEN_FUZZ_SCALE", "1"))
SEED = int(os.environ.get("DEEPEN_FUZZ_SEED", "0"))


@contextmanager
def counted(target: str, short: int) -> Iterator[range]:
    """The seeds of a run that is `short` calls long in `make test`; a line of the record at its end."""
    calls = max(int(short * SCALE), 1)
    started = time.monotonic()
    yield range(SEED, SEED + calls)
    if path := os.environ.get("DEEPEN_FUZZ_RECORD"):
        row = {
            "target": target,
            "calls": calls,
            "seconds": round(time.monotonic() - started, 1),
            "finding": "",
        }
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
