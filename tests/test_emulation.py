"""The CUDA kernels without a GPU: all compile, all pass the operations' tests under emulation with
sanitizers, and the emulator sees what it is there to see."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import bank_conflicts
import emulated
import pytest

pytestmark = pytest.mark.slow

ROOT = emulated.ROOT
KERNELS = sorted((ROOT / "csrc").glob("*/*.cu"))
SOURCES = [*KERNELS, ROOT / "tests" / "emulator" / "self_test.cu"]
Compilations = dict[Path, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="session")
def folder() -> Path:
    """What emulated.build() has built."""
    return emulated.build()


def emulated_tests(
    core: Path, *arguments: str, report: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # pytest's own fault handler and capture would keep AddressSanitizer's report from us.
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "emulated", "-p", "no:cacheprovider"),
            *("-p", "no:faulthandler", "--capture=sys", *arguments),
        ],
        cwd=ROOT,
        env=emulated.environment(core, report),
        capture_output=True,
        text=True,
    )


def _nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def _built_strictly(source: Path, newest: float) -> bool:
    """Whether `make build` compiled it, later than this time, with warnings as errors."""
    built = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    commands = built / "compile_commands.json"
    for one in json.loads(commands.read_text()) if commands.is_file() else []:
        if (
            one["file"] == str(source)
            and " -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror " in one["command"]
        ):
            compiled = built / one["output"]
            return compiled.is_file() and compiled.stat().st_mtime > newest
    return False


def _compile(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """For the newest architecture: `make` has compiled for all.

    What nvcc had nothing to say about is not given to it again: neither what was built with warnings as
    errors (.ci/run), nor what build/nvcc keeps a digest of: compiler, arguments, source and every header.
    """
    read = [source, *sorted((ROOT / "csrc").glob("*/*.h")), *sorted((ROOT / "csrc").glob("*/*.cuh"))]
    command = [
        *(str(_nvcc()), "-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra", f"-I{ROOT / 'csrc'}"),
        *("-gencode=arch=compute_120,code=sm_120", "-c", str(source)),
    ]
    if _built_strictly(source, newest=max(file.stat().st_mtime for file in read)):
        return subprocess.CompletedProcess(command, 0, "", "")
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(" ".join([version, *command]).encode())
    for file in read:
        digest.update(f"\n{file}\n".encode() + file.read_bytes())
    known = emulated.BUILD.parent / "nvcc" / digest.hexdigest()
    if known.is_file():
        return subprocess.CompletedProcess(command, 0, "", "")
    output = ("-o", str(folder / f"{source.stem}.o"))
    done = subprocess.run([*command, *output], capture_output=True, text=True)
    if done.returncode == 0 and not done.stderr:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()
    return done


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilations]:
    """nvcc on one source after the other, beside the test that asks for this first."""
    folder = tmp_path_factory.mktemp("nvcc")
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield {source: pool.submit(_compile, source, folder) for source in SOURCES} if _nvcc() else {}
        pool.shutdown(cancel_futures=True)


def test_every_operation_passes_its_tests_on_emulated_kernels(
    folder: Path, tmp_path: Path, compilations: Compilations
) -> None:
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    files = [str(file) for file in files if file.name != "test_library.py"]  # it is about Python alone
    done = emulated_tests(
        emulated.core_in(folder), *files, "tests/ops/emulated_launches.py", report=tmp_path / "launched.json"
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    launched = {
        re.sub(r"\W.*", "", name.lstrip("(")) for name in json.loads((tmp_path / "launched.json").read_text())
    }
    assert launched == _all_kernels(), "a kernel never ran"


def _all_kernels() -> set[str]:
    sources = "".join(file.read_text() for file in KERNELS)
    return set(re.findall(r"DEEPEN_LAUNCH\(\(?(\w+)", sources))


# These barriers keep a write apart from another thread's read.
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("topk_softmax", r"if \(thread == 0\) scratch->count = 0;\n"),
        ("fuse", r"\n"),
    ],
)
def test_a_barrier_taken_out_is_noticed(folder: Path, tmp_path: Path, name: str, before: str) -> None:
    original = ROOT / "csrc" / "ops" / f"{name}.cu"
    text, count = re.subn(rf"({before}\s*)__syncthreads\(\);", r"\1", original.read_text(), count=1)
    assert count == 1, f"{original} has changed; choose another barrier"
    planted = tmp_path / original.name
    planted.write_text(text)
    core = emulated.with_another(planted, original, tmp_path)
    done = emulated_tests(core, f"tests/ops/test_{name}.py", "-k", "against", "-x", "--tb=line")
    assert done.returncode != 0, "nothing was noticed"
    assert re.search(r"1 failed|ERROR: AddressSanitizer|runtime error", done.stdout + done.stderr)


def test_an_error_left_set_is_noticed(folder: Path, tmp_path: Path) -> None:
    original = ROOT / "csrc" / "core" / "cuda_device.cu"
    text, count = re.subn(r"  cudaGetLastError\(\);\n(  throw CudaError)", r"\1", original.read_text())
    assert count == 1, f"{original} has changed; the line that clears the error is another"
    planted = tmp_path / original.name
    planted.write_text(text)
    core = emulated.with_another(planted, original, tmp_path)
    done = emulated_tests(core, "tests/ops/emulated_launches.py", "-k", "failed_call", "-x", "--tb=line")
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    assert "cudaErrorInvalidDevice: invalid device ordinal, from launch of" in done.stdout


def self_test(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(folder / "emulator_self_test"), *arguments],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_small_kernels_give_what_was_worked_out_by_hand(folder: Path, seed: int) -> None:
    """Shuffles, ballots, matches, atomics, shared memory, launch errors: tests/emulator/self_test.cu."""
    done = self_test(folder, "all", str(seed))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "exit",
            r"divergent barrier: kernel some_skip_the_barrier \(launched at .*self_test.cu:\d+\), block "
            r"\(0, 0, 0\)\n.*39 more: waits at __syncthreads in .*self_test.cu:\d+\n.*23 more: has exited",
        ),
        (
            "warp",
            r"divergent barrier.*\n.*62 more: waits at __syncthreads.*\n  thread \(5, 0, 0\): waits at "
            r"__syncwarp of lanes 0xffffffff in .*self_test.cu:\d+",
        ),
        ("two-barriers", r"divergent barrier.*\n.*15 more: waits at __sync.*\n.*47 more: waits at __sync"),
        ("lanes", r"lanes meet at different warp collectives.*\n.*__ballot_sync.*\n.*__any_sync"),
        ("mask", r"a lane calls __ballot_sync without being in its mask"),
        ("bounds", r"AddressSanitizer: heap-buffer-overflow[\s\S]*writes_past_the_end"),
        ("static-bounds", r"AddressSanitizer: heap-buffer-overflow[\s\S]*writes_past_the_static_end"),
        ("alignment", r"misaligned address .* for type 'const struct float4', which requires 16 byte"),
        ("uninitialised", r"read 0x7fe1dead from dynamic shared memory"),
        ("static-uninitialised", r"read 0x7fe1dead from static shared memory"),
        ("stale-error", r"cudaErrorInvalidDevice: .*, from launch of intrinsics \[.*self_test.cu:\d+\]"),
        ("missing-barrier", r"a thread read what another had not written yet"),
    ],
)
def test_the_emulator_reports(folder: Path, case: str, message: str, seed: int) -> None:
    done = self_test(folder, f"bad-{case}", str(seed))
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("seed", [0, 1])
def test_libdeepen_on_the_device(folder: Path, seed: int) -> None:
    """Leaks too: the library takes the device's memory itself."""
    done = subprocess.run([folder / "embed_test", str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("status 5: cudaErrorInvalidDevice: invalid device ordinal, from ")


def test_bank_conflicts_are_counted() -> None:
    program = emulated.build_banks() / "banks_test"
    report = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = {one.kernel: one for one in bank_conflicts.read_report(report, program)}
    assert all(one.text.endswith("// counted") for one in found.values()), found
    counted = {
        name: (one.kind, one.size, one.worst, one.instructions, one.wavefronts) for name, one in found.items()
    }
    assert counted == {
        "strided": ("write", 4, 2, 2, 4),
        "eight_ways": ("write", 4, 8, 1, 8),
        "odd_stride": ("write", 4, 1, 1, 1),
        "broadcast": ("read", 4, 1, 1, 1),
        "sixteen_bytes": ("read", 16, 1, 1, 4),
        "eight_bytes": ("read", 8, 2, 1, 4),
        "atomics_at_four_words": ("atomic", 4, 4, 1, 4),
        "in_a_loop": ("write", 4, 8, 8, 64),
        "apart": ("write", 4, 1, 2, 2),
        "turns_skipped": ("write", 4, 1, 9, 9),
        "after_uneven_loops": ("write", 4, 2, 3, 6),
    }
    assert found["atomics_at_four_words"].same_word == 8


# The mean degree of accesses whose places follow from the data: of 32 random banks the fullest has 3.5.
SCATTERED_CONFLICT = 3.7


def test_kernels_meet_no_bank_twice_but_where_the_data_says_so() -> None:
    """`python tests/bank_conflicts.py` prints them all."""
    found = bank_conflicts.measure()
    assert {one.kernel for one in found} == _all_kernels() - {"sort_step"}  # that one has no shared memory
    assert any(one.scattered for one in found), "no place is known as scattered any more"
    for one in found:
        if one.scattered:
            assert one.mean <= SCATTERED_CONFLICT, one
        else:
            assert one.worst <= (2 if one.kernel == "sort_near" else 1), one  # it is rarely run


@pytest.mark.skipif(
    _nvcc() is None, reason="NO CUDA COMPILER HERE (nvcc): whether the kernels compile is not known"
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_kernels_compile_without_a_warning(source: Path, compilations: Compilations) -> None:
    done = compilations[source].result()
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_no_source_looks_at_the_architecture() -> None:
    """So what compiles without a warning for one does for all."""
    sources = [one for one in (ROOT / "csrc").rglob("*") if one.suffix in (".h", ".cuh", ".cc", ".cu")]
    assert set(KERNELS) <= set(sources)
    assert not [one for one in sources if "__CUDA_ARCH__" in one.read_text()]
