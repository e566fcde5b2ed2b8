"""The cache folder, and writing to it so that a killed process leaves nothing that looks whole."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError

from deepen_ext.errors import ModelError

_STEM = 200  # bytes of a file's name in the names of those beside it: a file system takes 255
_STALE_SECONDS = 3600.0  # no write takes so long: its process was killed
_WRITE_FAILURES = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # no right
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),  # a file in a folder's place
}


class Unwritable(ModelError):
    """The cache cannot be written to."""


def cache_dir(*parts: str) -> Path:
    """Folder for deepen-ext's own files under the Hugging Face assets cache; created when missing.

    ``cache_dir("models", "abc")`` is ``$HF_ASSETS_CACHE/deepen_ext/models/abc``. Characters that a path
    cannot hold are replaced by ``huggingface_hub``. At least two parts.

    Raises:
        ModelError: it cannot be made. The message names it and the variable that moves it.
    """
    namespace, subfolder, *rest = parts
    try:
        found = cached_assets_path("deepen_ext", namespace=namespace, subfolder=subfolder)
        folder = Path(found).joinpath(*rest)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error.filename, error.strerror) from error
    except ValueError as error:  # huggingface_hub's, of a file in a folder's place; it names the path
        raise _unwritable("Hugging Face assets", error) from error
    return folder


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """A failure to write into the cache is a ModelError that names the folder and what to do.

    Raises:
        ModelError: see above; everything else passes.
    """
    try:
        yield
    except Exception as error:
        if (reason := write_failure(error)) is not None:
            raise _unwritable(folder, reason) from error
        raise


def write_failure(error: BaseException) -> str | None:
    """Why the system did not take what was written, where that is what went wrong; else None.

    Libraries hide it behind errors of their own: what they were raised from is looked at too.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if isinstance(seen, SafetensorError) and (found := re.search(r"os error (\d+)", str(seen))):
            number = int(found[1])
        if number in _WRITE_FAILURES:
            return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    return None


def _unwritable(folder: object, reason: object) -> Unwritable:
    return Unwritable(
        f"{folder}: the cache cannot be written to ({reason}); make room or give the right to write there, "
        "or set the environment variable HF_ASSETS_CACHE to another folder"
    )


def sweep(folder: Path, pattern: str, seconds: float = _STALE_SECONDS) -> None:
    """Remove what killed processes left behind: the folder's files and folders of this name.

    Args:
        folder: where to look.
        pattern: of their names.
        seconds: how old they must be. What is as far in the future is from before the clock was set back.
    """
    for stale in folder.glob(pattern):
        with suppress(OSError):  # another process may sweep, or finish, at the same time
            if abs(time.time() - stale.lstat().st_mtime) < seconds or _is_in_use(stale):
                continue
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale)
            else:
                stale.unlink()


def sweep_temporaries(folder: Path, seconds: float = _STALE_SECONDS, name: str = "*") -> None:
    """`sweep` what `atomic_write` and `atomic_directory` leave there of this target when they are killed."""
    sweep(folder, f".{name}.tmp-{'[0-9a-f]' * 32}", seconds)


def _stem(target: Path) -> str:
    """What the names of files beside the target begin with: its own name, cut off where that is long."""
    return os.fsencode(target.name)[:_STEM].decode(errors="ignore")


def _is_in_use(temporary: Path) -> bool:
    """Whether a process that lives still writes there (see `_temporary_folder`)."""
    try:
        # Not waiting: in a folder that others write to it may be a pipe.
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # a link, or another user's
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: by its age alone
        return False
    finally:
        os.close(handle)
    return False


@contextmanager
def locked(target: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of ``target`` across processes; ``on_wait()`` is called once if another process has it.

    The lock is a file beside the target and ends with the process that holds it, however that ends.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{_stem(target)}.lock")
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


def is_no_file(target: Path) -> bool:
    """Whether it, or what a link leads to, is a pipe, a device or a socket, which root can replace."""
    return target.exists() and not target.is_file() and not target.is_dir()


@contextmanager
def atomic_write(target: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes ``target`` at once; an error removes it.

    The path is in a temporary folder: libraries write temporaries of their own beside what they are given,
    and these too are gone with it when the process is killed and a later one sweeps.

    Args:
        target: the file; its folder is made where it is missing.
        private: nobody but the owner can read it, at any moment: for what may hold prompts.

    Raises:
        OSError: the system's; or the target is a pipe or a device, such as /dev/null.
    """
    if is_no_file(target):
        raise OSError(errno.EINVAL, "a pipe or a device, in whose place a file would be put", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(target.parent)
    with _temporary_folder(target, 0o700 if private else 0o777) as folder:
        temporary = folder / target.name
        yield temporary
        _share(temporary, folder)
        _sync(temporary)
        os.replace(temporary, target)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes ``target`` at once, on an error it is removed.

    Call it with ``locked(target)`` held: what an earlier process left behind when it was killed is swept
    first. ``target`` must not exist yet.
    """
    sweep_temporaries(target.parent, 0.0, glob.escape(_stem(target)))
    with _temporary_folder(target) as temporary:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                _share(path, temporary)
            _sync(path)
        os.rename(temporary, target)


@contextmanager
def _temporary_folder(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """A folder beside the target, gone afterwards. Not by `tempfile`: only the owner could read its files.

    It is locked meanwhile, so that no other process sweeps it: its age is no proof where a clock is set.
    """
    folder = target.with_name(f".{_stem(target)}.tmp-{uuid.uuid4().hex}")
    folder.mkdir(mode)
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)
    _sync(target.parent)


def _share(file: Path, folder: Path) -> None:
    """Who may use the folder may use the file. safetensors lets only the owner read what it writes."""
    if not file.is_symlink():
        file.chmod(folder.stat().st_mode & 0o666)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a rename never gets there before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems (SMB, 9P) flush files alone.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)
