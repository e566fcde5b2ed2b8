"""Builds and installs libdeepen (csrc/embed), and programs against the installed tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]


def install(*options: str, name: str = "embed") -> Path:
    """The prefix that libdeepen is installed to, up to date."""
    build, prefix = ROOT / "build" / name, ROOT / "build" / f"{name}-installed"
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / "lock"):
        # Without Python's and pybind11's folders: the library must not need them.
        cmake("-S", str(ROOT), "-B", str(build), *ninja(), "-DDEEPEN_PYTHON=OFF", *options)
        cmake("--build", str(build))
        shutil.rmtree(prefix, ignore_errors=True)
        cmake("--install", str(build), "--prefix", str(prefix))
    return prefix


def build_against(prefix: Path, source: Path, build: Path, *options: str) -> Path:
    """The folder with the programs of a CMake project that uses the installed library."""
    cmake("-S", str(source), "-B", str(build), *ninja(), f"-DCMAKE_PREFIX_PATH={prefix}", *options)
    cmake("--build", str(build))
    return build


def ninja() -> tuple[str, ...]:
    return ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release")


def cmake(*arguments: str) -> None:
    done = subprocess.run([_tool("cmake"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cmake {' '.join(arguments)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")


def _tool(name: str) -> str:
    # The ones beside Python first: their versions are pinned.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    found = shutil.which(name, path=search)
    if found is None:
        raise RuntimeError(f"libdeepen needs {name}; install it with pip")
    return found
