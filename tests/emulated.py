"""The CUDA kernels on the host (tests/emulator): builds the module, which takes the core's place in a process
of its own, because AddressSanitizer must be the first library of a process.

    pytest -p emulated tests/ops    with `environment(core)`: the operations' tests on emulated kernels
"""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"
SEEDS = (0, 1, 2)  # rising, falling and shuffled order of blocks and threads

_CORE = "DEEPEN_EMULATED_CORE"  # the module to load in place of deepen_ext._core
_REPORT = "DEEPEN_EMULATED_REPORT"  # where to write how often each kernel was launched


def build() -> Path:
    """The folder with the module, `emulator_self_test` and `embed_test`, up to date."""
    return _build("emulated", "emulator_self_test", "embed_test")


def build_banks() -> Path:
    """The folder with the module that counts bank conflicts and with `banks_test`, up to date."""
    return _build("banks", "banks_test") / "banks"


def _build(*targets: str) -> Path:
    import pybind11

    # The ones beside Python first: their versions are pinned.
    scripts = Path(sys.executable).parent
    search = f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    cmake, ninja = shutil.which("cmake", path=search), shutil.which("ninja", path=search)
    if cmake is None or ninja is None:
        raise RuntimeError("the emulator needs cmake and ninja; install them with pip")
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):
        _run(
            cmake,
            *("-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            *("-DDEEPEN_CUDA=OFF", "-DDEEPEN_EMULATOR=ON"),
        )
        _run(cmake, "--build", str(BUILD), "--target", *targets)
    return BUILD / "tests" / "emulator"


def core_in(folder: Path) -> Path:
    """The Python module in a folder."""
    (core,) = folder.glob("_core*.so")
    return core


def with_another(source: Path, original: Path, folder: Path) -> Path:
    """The module with one kernel source replaced, in `folder`: compiles and links as the build did."""
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    compiled = [(one["file"], one["command"].split()) for one in commands]
    objects = {
        BUILD / words[words.index("-o") + 1]: (file, words)
        for file, words in compiled
        if re.search(r"/(emulated_kernels|emulated_bindings|emulator)\.dir/", words[words.index("-o") + 1])
    }
    ((old, words),) = [(one, words) for one, (file, words) in objects.items() if file == str(original)]
    new = folder / "kernel.o"
    words[words.index("-o") + 1] = str(new)
    words[words.index(str(original))] = str(source)
    _run(*words, cwd=BUILD)
    kept = [str(one) for one in objects if one != old]
    core = folder / core_in(BUILD / "tests" / "emulator").name
    _run(words[0], "-shared", "-fsanitize=address,undefined", *kept, str(new), "-o", str(core))
    return core


def environment(core: Path, report: Path | None = None) -> dict[str, str]:
    """For a process that runs on this module of `build()` instead of the real one."""
    # libstdc++ must be there when AddressSanitizer starts, or it does not find __cxa_throw.
    preload = [_run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    more = {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return bare_environment(core) | more | ({_REPORT: str(report)} if report else {})


def bare_environment(core: Path) -> dict[str, str]:
    """For a process that runs on this module of `build_banks()`, which has no sanitizers."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", _CORE: str(core)}


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


class Emulator:
    """Settings and records of the emulator in a module."""

    def __init__(self, core: Path) -> None:
        self._library = ctypes.CDLL(str(core))
        self._library.deepen_emulator_launch.restype = ctypes.c_char_p
        self._library.deepen_emulator_launch.argtypes = [ctypes.c_int64]
        self._library.deepen_emulator_launch_count.restype = ctypes.c_int64
        self._library.deepen_emulator_questions.restype = ctypes.c_int64
        self._library.deepen_emulator_set_seed.argtypes = [ctypes.c_uint64]
        self._library.deepen_emulator_set_max_shared_bytes.argtypes = [ctypes.c_int64]

    def set_seed(self, seed: int) -> None:
        self._library.deepen_emulator_set_seed(seed)

    def set_max_shared_bytes(self, size: int = 232_448) -> None:
        """What a block may have at most; the default is that of compute capability 9.0."""
        self._library.deepen_emulator_set_max_shared_bytes(size)

    def set_multiprocessors(self, count: int = 4) -> None:
        self._library.deepen_emulator_set_multiprocessors(count)

    @property
    def current_device(self) -> int:
        return int(self._library.deepen_emulator_current_device())

    @property
    def questions(self) -> int:
        """How often attributes of devices and kernels were asked for so far."""
        return int(self._library.deepen_emulator_questions())

    def bank_report(self) -> str:
        """What was counted so far, as in tests/emulator/banks.cc; for a module of `build_banks()` alone."""
        self._library.deepen_emulator_bank_report.restype = ctypes.c_char_p
        return str(self._library.deepen_emulator_bank_report().decode())

    def take_launches(self) -> list[str]:
        """A line for each launch since the last call: kernel, grid, block, shared bytes, device, stream."""
        count = self._library.deepen_emulator_launch_count()
        lines = [self._library.deepen_emulator_launch(i).decode() for i in range(count)]
        self._library.deepen_emulator_forget_launches()
        return lines


def _take_the_cores_place(core: Path) -> Emulator:
    name = "deepen_ext._core"
    assert name not in sys.modules, "too late: the real core is loaded"
    spec = importlib.util.spec_from_file_location(name, core)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return Emulator(core)


EMULATOR = _take_the_cores_place(Path(os.environ[_CORE])) if _CORE in os.environ else None
LAUNCHED: collections.Counter[str] = collections.Counter()  # by kernel


def pytest_sessionfinish() -> None:
    if _REPORT in os.environ:
        Path(os.environ[_REPORT]).write_text(json.dumps(LAUNCHED))
