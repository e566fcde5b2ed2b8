"""The cache folder, and writing to it so that a killed process leaves nothing that looks whole."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path

_STALE_SECONDS = 3600.0  # no write takes so long: its process was killed


def cache_dir(*parts: str) -> Path:
    """Folder for deepen-ext's own files under the Hugging Face assets cache; created when missing.

    ``cache_dir("models", "abc")`` is ``$HF_ASSETS_CACHE/deepen_ext/models/abc``. Characters that a path
    cannot hold are replaced by ``huggingface_hub``. At least two parts.
    """
    namespace, subfolder, *rest = parts
    folder = Path(cached_assets_path("deepen_ext", namespace=namespace, subfolder=subfolder)).joinpath(*rest)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(target: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of ``target`` across processes; ``on_wait()`` is called once if another process has it.

    The lock is a file beside the target and ends with the process that holds it, however that ends.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes ``target`` at once; an error removes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        with suppress(FileNotFoundError):  # another process may sweep, or finish, at the same time
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                stale.unlink()
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes ``target`` at once, on an error it is removed.

    Call it with ``locked(target)`` held: what an earlier process left behind when it was killed is swept
    first. ``target`` must not exist yet.
    """
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(stale)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def _temporary(target: Path) -> Path:
    """A free name beside the target. Not `tempfile`, whose files only their owner could read."""
    return target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a rename never gets there before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
