"""Writes what the CUDA kernels take of a multiprocessor into docs/gpu.md: no GPU is needed.

Registers, spills and static shared memory by `ptxas -v` for four architectures (nvcc, a minute or two);
dynamic shared memory by the emulated kernels' launches (kernel_shared.py). `--check` changes nothing and
exits with 1 where the page is out of date.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_shared
from kernel_shared import LIMITS, ROOT
from marked import write_marked

SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
PROCESSES = 2


@dataclass(frozen=True)
class KernelUse:
    """One kernel instance on one architecture; bytes a thread, shared memory a block."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


_COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse(log: str) -> list[KernelUse]:
    """Every kernel of nvcc's output with `-Xptxas -v`, names demangled and shortened."""
    found: list[KernelUse] = []
    name = architecture = ""
    frame: list[int] = []
    for line in log.splitlines():
        if match := _COMPILING.search(line):
            assert not name, f"ptxas said nothing of {name}"
            name, architecture = match.groups()
        elif match := _FRAME.search(line):
            frame = [int(one) for one in match.groups()]
        elif match := _USED.search(line):
            if not name:
                continue
            found.append(KernelUse(name, architecture, int(match[1]), *frame, int(match[2] or 0)))
            name, frame = "", []
    assert not name, f"ptxas said nothing of {name}"
    short = _short_names([one.kernel for one in found])
    return [KernelUse(short[one.kernel], *list(vars(one).values())[1:]) for one in found]


def _short_names(mangled: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None:
        sys.exit("no c++filt on PATH; install binutils")
    text = "".join(f"{one}\n" for one in mangled)
    names = subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(names) == len(mangled), f"{tool} gave {len(names)} names for {len(mangled)}"
    return {one: _shorten(full) for one, full in zip(mangled, names, strict=True)}


def _shorten(full: str) -> str:
    """`void deepen::(anonymous namespace)::f<deepen::Half, 64>(...)` as `f<Half, 64>`."""
    name = full.replace("(anonymous namespace)::", "").replace("deepen::", "")
    return re.sub(r"\(.*", "", name).removeprefix("void ")


def _nvcc() -> str:
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if found is None:
        sys.exit("no CUDA compiler: put nvcc on PATH or set CUDACXX")
    return found


def _version() -> str:
    done = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release [\d.]+, V[\d.]+", done.stdout)
    assert match, done.stdout
    return f"nvcc {match[0]}"


def _own_options(source: Path) -> list[str]:
    """What CMakeLists.txt adds for this source: registers depend on it."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.findall(
        r'properties\((csrc/[^)]*?) PROPERTIES\s+COMPILE_OPTIONS "([^"]*)"\)', text, re.IGNORECASE
    )
    if not found:
        sys.exit("CMakeLists.txt has no options of single sources any more: change _own_options")
    return [
        one
        for files, options in found
        if str(source.relative_to(ROOT)) in files
        for one in options.split(";")
    ]


def _compile(source: Path, folder: Path) -> str:
    codes = [f"-gencode=arch=compute_{one[3:]},code={one}" for one in LIMITS]
    done = subprocess.run(
        [
            *(_nvcc(), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", *codes),
            *_own_options(source),
            *("-c", str(source), "-o", str(folder / f"{source.stem}.o")),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{source} does not compile:\n{done.stderr}")
    return done.stderr


def compile_all() -> list[KernelUse]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        logs = list(pool.map(lambda source: _compile(source, Path(folder)), SOURCES))
    return [one for log in logs for one in parse(log)]


def _cell(one: KernelUse) -> str:
    spilt = one.spill_stores or one.spill_loads
    return f"{one.registers}" + (f", spills {one.spill_stores} / {one.spill_loads} B" if spilt else "")


def _header(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |", f"| {' | '.join('---' for _ in cells)} |"]


def register_table(uses: list[KernelUse]) -> str:
    """A row for each kernel instance, a column for each architecture."""
    lines = [
        f"`{_version()}`: registers a thread; spill stores / loads of bytes a thread where there are any.",
        "",
    ]
    lines += _header("kernel", "stack, B", "static shared, B", *LIMITS)
    for kernel in dict.fromkeys(one.kernel for one in uses):
        mine = {one.architecture: one for one in uses if one.kernel == kernel}
        assert set(mine) == set(LIMITS), f"{kernel} is not compiled for every architecture"

        def values(field: str, mine: dict[str, KernelUse] = mine) -> str:
            found = [getattr(one, field) for one in mine.values()]
            return f"{min(found)}" + (f" to {max(found)}" if max(found) > min(found) else "")

        cells = [_cell(mine[one]) for one in LIMITS]
        lines.append(f"| `{kernel}` | {values('stack')} | {values('static_shared')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shared_table(measured: dict[str, Any]) -> str:
    """A row for each architecture and number of anchors: what the default step asks for, and what fits."""
    kernels = list(next(iter(next(iter(measured.values()))["step"].values())))
    asked_anywhere = [one for found in measured.values() for one in found["step"].values()]
    uses = {kernel for kernel in kernels if any(one[kernel] for one in asked_anywhere)}
    titles = [f"`{kernel}`, B" for kernel in kernels]
    lines = _header("architecture", "a block may have, B", "anchors", *titles, "largest k that fits at m 32")
    for name, found in measured.items():
        groups: dict[str, list[str]] = {}
        for anchors, asked in found["step"].items():
            cells = " | ".join(_asked(asked[kernel], kernel in uses) for kernel in kernels)
            groups.setdefault(cells, []).append(f"{int(anchors):,}")
        for cells, anchors in groups.items():
            label = kernel_shared.SAME.get(name, name)
            lines.append(
                f"| {label} | {LIMITS[name]:,} | {' and '.join(anchors)} | {cells} | {found['largest_k']} |"
            )
    return "\n".join(lines)


def _asked(size: int, used: bool) -> str:
    """`used`: the kernel asks for some where there is enough."""
    return f"{size:,}" if size or not used else "**none: too large, from the workspace**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    options = parser.parse_args()
    write_marked(options.page, "shared", shared_table(kernel_shared.measure()), check=options.check)
    write_marked(options.page, "kernels", register_table(compile_all()), check=options.check)


if __name__ == "__main__":
    main()
