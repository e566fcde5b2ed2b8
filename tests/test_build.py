"""What the build must guarantee: instruction sets that cannot leak into each other, and a true stub."""

from __future__ import annotations

import ast
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepen_ext import _core

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
CPU_SOURCES = sorted((ROOT / "csrc").glob("ops/*_cpu.cc"))
ISAS = ["portable", "avx2", "avx512"]
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other processors have the portable code alone"
)


def stub_functions() -> dict[str, ast.arguments]:
    tree = ast.parse((ROOT / "deepen_ext" / "_core.pyi").read_text())
    return {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}


def compiled_functions() -> dict[str, str]:
    """By name, the signature that pybind11 writes into the docstring."""
    members = {name: getattr(_core, name) for name in dir(_core) if not name.startswith("_")}
    assert all(inspect.isroutine(member) for member in members.values()), "the stub test knows functions only"
    return {name: str(member.__doc__).splitlines()[0] for name, member in members.items()}


def external_symbols(obj: Path) -> list[str]:
    """Demangled names of what the object file defines for others, weak ones included."""
    nm = shutil.which("nm")
    assert nm is not None, "nm is missing; it comes with the compiler (package binutils)"
    listing = subprocess.run(
        [nm, "--demangle", "--defined-only", "--extern-only", str(obj)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [line.split(maxsplit=2)[2] for line in listing.splitlines()]


@on_x86
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("source", CPU_SOURCES, ids=lambda path: path.stem)
def test_a_cpu_twin_defines_nothing_outside_its_instruction_sets_namespace(source: Path, isa: str) -> None:
    """The linker keeps one copy of a shared inline function or template: it could be the AVX-512 one."""
    obj = OBJECTS / f"deepen_cpu_{isa}.dir" / "csrc" / "ops" / f"{source.name}.o"
    assert obj.is_file(), f"{obj} is missing; run `make build`, and list the source in CMakeLists.txt"
    assert obj.stat().st_mtime >= source.stat().st_mtime, (
        f"{source} is newer than its object; run `make build`"
    )
    symbols = external_symbols(obj)
    assert symbols, f"{obj} defines nothing"
    outside = [symbol for symbol in symbols if not symbol.startswith(f"deepen::{isa}::")]
    assert not outside, f"make these `static`, or keep them out of {source.name} and what it includes"


@on_x86
def test_the_symbol_test_sees_weak_templates(tmp_path: Path) -> None:
    """An std algorithm in such a file would be caught: the check above can fail."""
    source = tmp_path / "twin.cc"
    source.write_text(
        "#include <vector>\nnamespace deepen { namespace avx512 {\n"
        "void fill(std::vector<int>* v) { v->push_back(1); }\n}}\n"
    )
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    subprocess.run([compiler, "-O1", "-c", str(source), "-o", str(tmp_path / "twin.o")], check=True)
    symbols = external_symbols(tmp_path / "twin.o")
    assert any(symbol.startswith("deepen::avx512::") for symbol in symbols)
    assert any(symbol.startswith("void std::vector") for symbol in symbols)


@on_x86
def test_the_best_instruction_set_is_the_processors() -> None:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags is not None
    has = set(flags[1].split())
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= has:
        expected = "avx512"
    elif {"avx2", "fma", "f16c"} <= has:
        expected = "avx2"
    else:
        expected = "portable"
    assert _core.best_isa() == expected


def test_every_instruction_set_up_to_the_best_can_be_chosen() -> None:
    before = _core.isa()
    try:
        for isa in ISAS[: ISAS.index(_core.best_isa()) + 1]:
            _core.set_isa(isa)
            assert _core.isa() == isa
        with pytest.raises(ValueError, match=r"unknown instruction set 'sse9'.*portable, avx2 or avx512"):
            _core.set_isa("sse9")
    finally:
        _core.set_isa(before)


def test_the_stub_lists_exactly_the_functions_of_the_compiled_module() -> None:
    assert sorted(stub_functions()) == sorted(compiled_functions())


@pytest.mark.parametrize("name", sorted(compiled_functions()))
def test_the_stub_names_the_parameters_in_the_order_of_the_compiled_function(name: str) -> None:
    arguments = stub_functions()[name]
    signature = ast.parse(f"def {re.sub(r'<[^>]*>', 'object', compiled_functions()[name])}: ...").body[0]
    assert isinstance(signature, ast.FunctionDef)
    compiled = [argument.arg for argument in (*signature.args.posonlyargs, *signature.args.args)]
    assert len(compiled) == len(arguments.posonlyargs) + len(arguments.args)
    # A parameter without a name in the binding cannot be passed by name: the stub must not promise it.
    assert sum(bool(re.fullmatch(r"arg\d+", one)) for one in compiled) == len(arguments.posonlyargs)
    assert compiled[len(arguments.posonlyargs) :] == [argument.arg for argument in arguments.args]


def test_errors_name_no_folder_of_the_machine_that_built_the_core() -> None:
    """__FILE__ is csrc/..., in .cu as in .cc (-fmacro-prefix-map, which nvcc has to hand on)."""
    module = Path(_core.__file__).read_bytes()
    for suffix in ("cc", "cu") if _core.cuda_compiled() else ("cc",):
        assert f"csrc/ops/topk_softmax.{suffix}".encode() in module
    assert str(ROOT).encode() not in module


@pytest.mark.parametrize(
    "variable", ["CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "DEEPEN_CUDA"]
)
def test_what_cmake_takes_once_from_the_environment_starts_a_build_over(
    tmp_path: Path, variable: str
) -> None:
    """It would keep the first value without a word. A `cmake` that does nothing notes how it was called."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "cmake").write_text(
        f'#!/bin/sh\n[ "$1" != -S ] || {{ mkdir -p "$4"; echo "$@" >>"{tmp_path}/calls"; }}\n'
    )
    (tools / "ninja").touch()
    for tool in tools.iterdir():
        tool.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if name != variable}
    changed = plain | {variable: "OFF"}
    for environment in (plain, plain, changed, changed):
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "out")],
            cwd=tmp_path,
            env=environment | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            check=True,
        )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--fresh" in call for call in calls] == [True, False, True, False]


FEW_THREADS = """
#include <sys/resource.h>

#include <cstdio>

#include "core/parallel.h"

int main() {
  const rlimit room{60u << 20, 60u << 20};  // of addresses; a thread's stack takes 8 MB
  setrlimit(RLIMIT_AS, &room);
  int done[1000] = {};
  std::thread::id by[64];
  deepen::parallel_for(1000, 64, [&](int thread, int64_t begin, int64_t end) {
    by[thread] = std::this_thread::get_id();
    for (int64_t row = begin; row < end; ++row) ++done[row];
  });
  int here = 0, once = 0;
  for (const auto& one : by) here += one == std::this_thread::get_id();
  for (const int times : done) once += times == 1;
  std::printf("%d %d", once, here);
}
"""


def test_without_openmp_threads_that_cannot_start_leave_their_work_to_the_caller(tmp_path: Path) -> None:
    source, program = tmp_path / "few_threads.cc", tmp_path / "few_threads"
    source.write_text(FEW_THREADS)
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    command = [compiler, "-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once, here = map(int, done.stdout.split())
    assert once == 1000
    assert 1 < here < 64, "all threads started, or none: choose another limit"


@pytest.mark.parametrize(
    ("arguments", "nvcc", "installed", "built"),
    [
        (["demo"], True, "", "OFF"),
        (["demo"], False, "", "AUTO"),
        (["demo", "DEEPEN_CUDA=ON"], True, "", "ON"),
        (["build"], True, "", "AUTO"),
        (["build"], True, "OFF", "AUTO"),
        (["demo"], True, "AUTO", None),
        (["demo"], True, "OFF", None),
    ],
)
def test_the_demo_alone_waits_for_no_cuda_kernels(
    tmp_path: Path, arguments: list[str], nvcc: bool, installed: str, built: str | None
) -> None:
    """What `make` would build, beside an installation and a CUDA compiler or without; and that it says so."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "grep", *(["nvcc"] if nvcc else [])):
        (tools / tool).symlink_to(shutil.which(tool) or "/bin/true")
    (tmp_path / ".venv").mkdir()
    for stamp in ("tools", "dependencies", *([f"installed-{installed}"] if installed else [])):
        (tmp_path / ".venv" / stamp).touch()
    done = subprocess.run(
        ["make", "-n", *arguments],
        cwd=tmp_path,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(re.findall(r"installed-(\w+)$", done.stdout, re.MULTILINE)) == ({built} if built else set())
    assert ("the CPU part alone" in done.stdout) == (built == "OFF")
