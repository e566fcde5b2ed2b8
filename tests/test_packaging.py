"""What is built: a wheel from the tracked files works elsewhere, on any x86-64; the CUDA switch is honest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pybind11
import pytest
from packaging.version import Version
from transformers.utils import import_utils

from deepen_ext import __version__
from deepen_ext.errors import InputError
from deepen_ext.ground.one_distribution import check_one_distribution

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TOOLS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


def tool(name: str) -> str:
    found = shutil.which(name, path=TOOLS)
    assert found is not None, f"{name} is missing; `make build` installs it"
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, as a clone would have it: nothing that merely lies about may be needed."""
    copy = tmp_path_factory.mktemp("source")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listing.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from it, without CUDA: that part is tested by configuring, which is quicker."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(folder),
        ],
        cwd=source,
        env={**os.environ, "DEEPEN_CUDA": "OFF"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def compile_commands(source: Path, wheel: Path) -> list[dict[str, str]]:
    assert wheel.is_file()
    commands = json.loads(next(source.glob("build/cmake-*/compile_commands.json")).read_text())
    apart = ("bindings", "embed")  # one source for the compiler; libdeepen
    sources = {path.name for path in (ROOT / "csrc").glob("*/*.cc") if path.parent.name not in apart}
    assert {Path(entry["file"]).name for entry in commands} >= sources | {"unity_0_cxx.cxx"}
    return commands


def test_the_wheel_holds_the_package_and_nothing_else(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = [*source.glob("deepen_ext/**/*.py"), *source.glob("deepen_ext/serving/page/static/*")]
    tracked = {path.relative_to(source).as_posix() for path in sources}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    package = tracked | {"deepen_ext/py.typed", "deepen_ext/_core.pyi", f"deepen_ext/_core{suffix}"}
    assert {name for name in names if ".dist-info/" not in name} == package
    licences = {name.partition(".dist-info/licenses/")[2] for name in names} - {""}
    assert licences == {"LICENSE", "csrc/bindings/LICENSE.pybind11"}
    # Tied to this interpreter and platform: the compiled core is.
    assert wheel.name.startswith(f"deepen_ext-{__version__}-")
    assert f"-{sys.implementation.cache_tag.replace('cpython-', 'cp')}-" in wheel.name
    assert wheel.name.endswith(f"{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")


def test_a_package_that_transformers_runs_is_new_enough_for_it() -> None:
    """transformers takes an older one for a package that is not installed."""
    least = {
        "accelerate": import_utils.ACCELERATE_MIN_VERSION,
        "gguf": import_utils.GGUF_MIN_VERSION,
        "torchao": import_utils.TORCHAO_MIN_VERSION,
    }
    text = (ROOT / "pyproject.toml").read_text()
    ours = dict(re.findall(rf'"({"|".join(least)})>=([\d.]+)"', text))
    assert ours.keys() == least.keys()
    assert not [name for name in least if Version(ours[name]) < Version(least[name])]


def test_the_licence_of_pybind11_is_that_of_the_version_compiled_in() -> None:
    """It asks for its text in all that is compiled from it."""
    ours = (ROOT / "csrc" / "bindings" / "LICENSE.pybind11").read_text()
    assert ours == metadata.distribution("pybind11").read_text("licenses/LICENSE")


def test_the_source_distribution_holds_what_a_build_takes_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    """setuptools adds tests/test_*.py by itself, which cannot run without what is beside them."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.tar")
    with tarfile.open(built) as archive:
        names = {one.name.partition("/")[2] for one in archive if one.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if name.startswith("deepen_ext.egg-info/"))}
    top = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md"}
    top |= {"constraints.txt", "pyproject.toml", "setup.py"}
    folders = [path for name in ("csrc", "deepen_ext", "examples") for path in (source / name).rglob("*")]
    assert names - made == top | {path.relative_to(source).as_posix() for path in folders if path.is_file()}


def test_the_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder, imported from another: fusing two members of five shared tokens."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
    )
    program = """
import pathlib, sys, torch, deepen_ext
from deepen_ext import _core
site = pathlib.Path(sys.argv[1])
assert pathlib.Path(deepen_ext.__file__).is_relative_to(site), deepen_ext.__file__
assert pathlib.Path(_core.__file__).is_relative_to(site), _core.__file__
assert not _core.cuda_compiled()
maps = [deepen_ext.RelativeMap.from_dense(torch.eye(5)) for _ in range(2)]
main = torch.tensor([[2.0, 1.9, 0.0, 0.0, 0.0]])
assistant = torch.tensor([[0.0, 6.0, 0.0, 0.0, 0.0]])
fused = deepen_ext.fuse_logits([main, assistant], maps, [0.5, 0.5], learning_rate=0.3)
assert main.argmax() == 0 and fused.argmax() == 1, fused
print("fused", fused.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(site)],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fused ")


def test_the_wheels_core_looks_for_torchs_openmp_first(wheel: Path, tmp_path: Path) -> None:
    """One OpenMP runtime for both, also where the system has none (.ci/release tries that)."""
    with zipfile.ZipFile(wheel) as archive:
        core = archive.extract(f"deepen_ext/_core{sysconfig.get_config_var('EXT_SUFFIX')}", tmp_path)
    dynamic = subprocess.run(["readelf", "-d", core], capture_output=True, text=True, check=True).stdout
    assert "[libgomp.so.1]" in dynamic
    assert "[$ORIGIN/../torch/lib]" in dynamic


def test_two_distributions_in_one_folder_are_refused(wheel: Path, tmp_path: Path) -> None:
    """deepen-ext-cu13 installed over deepen-ext: the import says so before anything else fails."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-c", "import deepen_ext; print(deepen_ext.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith(str(tmp_path))
    (tmp_path / "deepen_ext_cu13-0.1.0.dist-info").mkdir()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "InputError: deepen-ext and deepen-ext-cu13 are both installed in" in done.stderr
    assert "pip uninstall deepen-ext deepen-ext-cu13" in done.stderr


def test_a_package_with_a_name_like_ours_is_none_of_ours(tmp_path: Path) -> None:
    for name in ("deepen_ext-0.1.0", "deepen_ext_fusers-2.0", "deepen_ext_cuts-1.0"):
        (tmp_path / f"{name}.dist-info").mkdir()
    check_one_distribution(tmp_path)
    (tmp_path / "deepen_ext_cu13-0.1.0.dist-info").mkdir()
    with pytest.raises(InputError, match=r"^deepen-ext and deepen-ext-cu13 are both installed"):
        check_one_distribution(tmp_path)


def test_the_build_asks_for_no_processor_but_in_the_twins_chosen_at_run_time(
    source: Path, wheel: Path
) -> None:
    seen = set()
    for entry in compile_commands(source, wheel):
        arguments = entry["command"].split()
        machine = [
            one
            for one in arguments
            if one.startswith(("-march", "-mtune", "-mcpu", "-mavx", "-mfma", "-mf16c"))
        ]
        assert not [one for one in machine if one.startswith(("-march", "-mtune", "-mcpu"))], entry["command"]
        isa = next(
            (one.removeprefix("-DDEEPEN_ISA=") for one in arguments if one.startswith("-DDEEPEN_ISA=")), None
        )
        assert bool(machine) == (isa in ("avx2", "avx512")), entry["command"]
        assert isa == "avx512" or not any("avx512" in one for one in machine), entry["command"]
        seen.add(isa)
    assert {None, "portable"} <= seen


def configure(
    folder: Path, switch: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            tool("cmake"),
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDEEPEN_CUDA={switch}",
            *options,
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


NO_COMPILER = {"CUDACXX": "/nonexistent/nvcc"}


def test_cuda_on_without_a_compiler_fails_with_the_cure(tmp_path: Path) -> None:
    done = configure(tmp_path, "ON", **NO_COMPILER)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "no CUDA compiler was found" in message
    assert "put nvcc on PATH" in message
    assert "DEEPEN_CUDA=OFF" in message


def test_pip_passes_cuda_on_without_a_compiler_on_as_a_failure(source: Path, tmp_path: Path) -> None:
    """The same through setup.py: no wheel without CUDA for one who asked for CUDA."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
        ],
        cwd=copy,
        env={**os.environ, **NO_COMPILER, "DEEPEN_CUDA": "ON"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no CUDA compiler was found" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize("switch", ["AUTO", "OFF"])
def test_without_a_cuda_compiler_the_build_says_that_it_goes_without(tmp_path: Path, switch: str) -> None:
    done = configure(tmp_path, switch, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert f"CUDA part OFF (DEEPEN_CUDA={switch})" in done.stdout
    assert "cuda_absent.cc" in (tmp_path / "compile_commands.json").read_text()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no CUDA compiler on PATH")
def test_auto_with_a_cuda_compiler_says_that_it_builds_for_it(tmp_path: Path) -> None:
    done = configure(tmp_path, "AUTO")
    assert done.returncode == 0, done.stderr
    assert "CUDA part ON (DEEPEN_CUDA=AUTO, " in done.stdout
    assert "architectures 80-real" in done.stdout
    assert "cuda_device.cu" in (tmp_path / "compile_commands.json").read_text()


def test_visual_c_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "OFF", "-DMSVC=TRUE")  # as CMake sets it
    assert done.returncode != 0
    assert "Visual C++ cannot compile deepen-ext, which is for Linux" in " ".join(done.stderr.split())


def test_an_unknown_cuda_switch_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "YES")
    assert done.returncode != 0
    assert "use AUTO, ON or OFF" in " ".join(done.stderr.split())
