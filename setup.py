"""Builds the compiled core with CMake. All other metadata is in pyproject.toml.

Environment: DEEPEN_CUDA=AUTO|ON|OFF is handed to CMake (see CMakeLists.txt).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build `deepen_ext._core` with CMake and Ninja, into the place setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder per interpreter: rebuilding after an edit compiles only what the edit touched.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_pybind11_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DDEEPEN_CUDA={os.environ.get('DEEPEN_CUDA', 'AUTO')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        # A cache that names a compiler, ninja or interpreter of another (deleted) environment is started over.
        subprocess.run([*configure, "--fresh"], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_core"], check=True)


def _pybind11_dir() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


setup(ext_modules=[Extension("deepen_ext._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
