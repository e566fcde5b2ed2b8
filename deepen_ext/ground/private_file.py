"""Files that may hold prompts, or what was written for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def open_private(path: Path, mode: str, **options: Any) -> IO[Any]:
    """As `open`, but nobody except its owner can read a file that is new. An old one keeps its mode.

    Raises:
        OSError: as `open`.
    """
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600), **options)
