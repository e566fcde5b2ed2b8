"""Builds the compiled core with CMake. All other metadata is in pyproject.toml.

Environment: DEEPEN_CUDA=AUTO|ON|OFF is handed to CMake (see CMakeLists.txt), and so is
DEEPEN_CUDA_ARCHITECTURES, for example "90-real" for one card alone; unset, the declared list is built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
# One build folder per interpreter, kept: a rebuild compiles only what was edited.
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
# What CMake takes from the environment when it configures a folder for the first time.
TAKEN_BY_CMAKE = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX")


class CMakeBuild(build_ext):
    """Configure and build `deepen_ext._core` with CMake and Ninja, and put it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        cmake, ninja = _tool("cmake", path), _tool("ninja", path)
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDEEPEN_CUDA={os.environ.get('DEEPEN_CUDA', 'AUTO')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        if architectures := os.environ.get("DEEPEN_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        # CMake caches its tools and flags and never looks at them again. A folder configured with others (the
        # tools of an isolated build are gone afterwards) starts over, which compiles everything.
        taken = [f"{name}={os.environ.get(name, '')}" for name in TAKEN_BY_CMAKE]
        signature = "\n".join([*configure, *taken])
        stamp = BUILD / "configured-with.txt"
        if not stamp.is_file() or stamp.read_text() != signature:
            configure.append("--fresh")
        subprocess.run(configure, check=True)
        stamp.write_text(signature)
        subprocess.run([cmake, "--build", str(BUILD), "--target", "_core"], check=True)
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        subprocess.run([cmake, "--install", str(BUILD), "--prefix", str(package.parent)], check=True)


def _tool(name: str, path: str) -> str:
    found = shutil.which(name, path=path)
    if found is None:
        raise PlatformError(f"{name} is needed to build deepen-ext, but is not on PATH: pip install {name}")
    return found


setup(ext_modules=[Extension("deepen_ext._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
