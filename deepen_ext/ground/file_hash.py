"""The hash of a file's content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from deepen_ext.errors import InputError


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
