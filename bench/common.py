"""What the benchmarks share: prompts, timing beside a baseline, one shape for every figure."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

# The most that a step can cost: rows of 32 entries, computed on demand. The default recipe's have one entry.
TIMED = {"fuser": "deepen", "recipe": "calibrated", "learning_rate": 0.15}
ROOT = Path(__file__).resolve().parent.parent

PROMPTS = (
    "The history of the Roman Republic began with the overthrow of the kings and ended when",
    "Photosynthesis turns light into chemical energy. In the first stage, chlorophyll absorbs",
    "def quicksort(values):\n    if len(values) <= 1:\n        return values\n    pivot =",
    "Question: A train covers 180 km in 2.5 hours. What is its average speed?\nAnswer:",
    "She opened the letter with trembling hands. Inside was a single photograph of",
    "To make a good soup, start by chopping the onions and heating a little",
    "The boiling point of water falls with altitude because",
    "In 1969, Neil Armstrong and Buzz Aldrin became the first people to walk on",
)

# Long enough for 256 tokens of either demo tokenizer, and prose that no model ends early.
LONG_TEXT = """The lighthouse stood at the end of a narrow spit of land, where the river met the sea. For
more than a hundred years its keepers had lit the lamp each evening and put it out each morning, and in all
that time it had failed only once, during the great storm of 1893. Nobody in the village remembered that
night any more, but everyone knew the story. The keeper then was a man named Thomas Hale, who lived there
with his daughter Anna and an old grey dog. When the wind rose in the afternoon, he told Anna to carry more
oil up the stairs, and to close the shutters on the western side. By six o'clock the waves were breaking
over the rocks and the spray reached the windows of the kitchen. By eight the path to the village was under
water. Shortly before midnight the glass of the lantern room broke, and the lamp went out. Anna heard it
before she saw it: a crash, then the wind inside the tower, then her father's steps on the iron stairs. She
took the small lamp from the table and followed him. What they found at the top was worse than either of
them had feared. Two of the panes were gone, the rain came in sideways, and the great lens had moved on its
bed. Out on the black water, no more than a mile away, they could see the lights of a ship. It was coming
straight towards the rocks, and there was very little time left to decide what to do. Thomas looked at his
daughter, and then at the lamp in her hands, and he said that there was only one way left to warn the ship.
First, they would have to"""


@dataclass
class Figure:
    """One measured value, beside its baseline where it has one."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float]  # 10th and 90th percentile
    repetitions: int
    baseline: str = ""
    baseline_value: float | None = None
    baseline_spread: tuple[float, float] | None = None
    baseline_repetitions: int | None = None
    ratio: float | None = None
    ratio_of: str = ""  # "baseline / ours" (higher is better) or "ours / baseline"
    equality: str = ""  # what was asserted before anything was timed
    budget: str = ""
    met: bool | None = None
    note: str = ""
    # Of GPU figures: 99th percentile, the bytes that must be moved, their time in µs at measured bandwidth.
    p99: float | None = None
    bytes: int | None = None
    floor: float | None = None
    floor_ratio: float | None = None  # value / floor

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in ("", None)}


def compared(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    baseline: str,
    ratio: float,
    *,
    unit: str = "ms a token",
    budget: float | None = None,
    **more: Any,
) -> Figure:
    """Two kinds of run: medians, and how many times the baseline ours took.

    Args:
        name: of the figure.
        ours: the value of each repetition.
        theirs: the baseline's.
        baseline: what it is.
        ratio: ours / baseline, as the caller takes it.
        unit: of the values.
        budget: the largest ratio that is good enough.
        more: other fields of the figure.
    """
    return Figure(
        name,
        statistics.median(ours),
        unit,
        spread(ours),
        len(ours),
        baseline=baseline,
        baseline_value=statistics.median(theirs),
        baseline_spread=spread(theirs),
        baseline_repetitions=len(theirs),
        ratio=ratio,
        ratio_of="ours / baseline",
        budget="" if budget is None else f"at most {budget:.2f} times the baseline",
        met=None if budget is None else ratio <= budget,
        **more,
    )


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    return percentile(values, 0.1), percentile(values, 0.9)


def beside(
    benchmark: Any,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    name: str,
    baseline_name: str,
    equality: str,
    rounds: int,
    baseline_every: int = 1,
    before: Callable[[], object] | None = None,
    max_us: float | None = None,
    min_ratio: float | None = None,
    note: str = "",
) -> Figure:
    """Time `ours` by pytest-benchmark, the baseline between its rounds: a drift of the machine hits both.

    The two evict each other's data from the caches, as a model's forward pass does in real decoding. `before`
    runs untimed before each round; the baseline runs before every `baseline_every`-th.
    """
    times: list[float] = []
    calls = 0

    def between() -> None:
        nonlocal calls
        if calls % baseline_every == 0:
            start = time.perf_counter()
            baseline()
            times.append(time.perf_counter() - start)
        calls += 1
        if before is not None:
            before()

    for _ in range(3):
        between()
        ours()
    times.clear()
    calls = 0
    benchmark.pedantic(ours, setup=between, rounds=rounds, iterations=1)
    taken = [1e6 * second for second in benchmark.stats.stats.data]
    theirs = [1e6 * second for second in times]
    ratio = statistics.median(theirs) / statistics.median(taken)
    budget = [f"at most {max_us:g} µs"] if max_us is not None else []
    budget += [f"at least {min_ratio:g} times the baseline"] if min_ratio is not None else []
    figure = Figure(
        name=name,
        value=statistics.median(taken),
        unit="µs",
        spread=spread(taken),
        repetitions=len(taken),
        baseline=baseline_name,
        baseline_value=statistics.median(theirs),
        baseline_spread=spread(theirs),
        baseline_repetitions=len(theirs),
        ratio=ratio,
        ratio_of="baseline / ours",
        equality=equality,
        budget=", ".join(budget),
        note=note,
    )
    if budget:
        figure.met = (max_us is None or figure.value <= max_us) and (min_ratio is None or ratio >= min_ratio)
    benchmark.extra_info["figure"] = figure.as_dict()
    return figure


def check_equal(what: str, ours: torch.Tensor, baseline: torch.Tensor, tolerance: float) -> str:
    """Assert that the two agree, before either is timed; returns the sentence that goes beside the figure."""
    off = float((ours.double() - baseline.double()).abs().max())
    assert off <= tolerance, f"{what} differ by {off:.2e}; {tolerance:.0e} is allowed"
    return f"{what}: largest difference {off:.1e}, allowed {tolerance:.0e}"


def error_line(error: BaseException) -> str:
    """What a result has of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300].rstrip(": ")


def check_data(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Refuse a folder without the benchmarks, before anything is loaded."""
    if not (folder / "gsm8k" / "dev.jsonl").is_file():
        parser.error(f"{folder} has no gsm8k/dev.jsonl; name the folder of the benchmarks with --data")


def resident(key: str = "VmRSS", process: int | str = "self") -> float:
    """Megabytes (10^6 bytes) of a field of /proc/PROCESS/status."""
    status = Path(f"/proc/{process}/status")
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{status} has no {key}")


def start_of_peak() -> float:
    """Resident set now; from here on `resident("VmHWM")` is its peak. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident()


def again_with_an_empty_cache(folders: Sequence[Path]) -> NoReturn:
    """Run this script again for the models in these folders, in a process with no relative rows on disk.

    The models come from the usual cache. Hugging Face reads the variable on import: hence a new process.
    """
    with tempfile.TemporaryDirectory(prefix="deepen-ext-bench-") as empty:
        command = [sys.executable, *sys.argv, "--members", *map(str, folders)]
        raise SystemExit(subprocess.run(command, env={**os.environ, "HF_ASSETS_CACHE": empty}).returncode)


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and date of a run."""
    from deepen_ext import _core

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    # The results are what a run is about to write: they do not make a checkout dirty.
    changed = git(
        "status", "--porcelain", "--", ".", ":!bench/results", ":!docs/performance*", ":!docs/backends.md"
    )
    packages = ("deepen-ext", "torch", "transformers", "pybind11", "pytest-benchmark")
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "isa": _core.isa(),
            "system": platform.platform(terse=True),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
            "compiler": _compiler(),
        },
        "torch_threads": torch.get_num_threads(),
        "commit": git("rev-parse", "HEAD") or os.environ.get("DEEPEN_COMMIT", "unknown"),
        "dirty": bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine_name(found: dict[str, Any]) -> str:
    """File name of a machine's results."""
    text = f"{found['machine']['cpu']} {found['machine']['cores']} cores".lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def speed_file(found: dict[str, Any]) -> str:
    """File name of a machine's times. Clouds give several processors one name: their instructions differ."""
    return f"{machine_name(found)}-{found['machine']['isa']}.json"


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed (run from the source tree)"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _compiler() -> str:
    """The compiler of the build folder next to the sources, if this is a source tree."""
    for file in sorted(ROOT.glob("build/**/CMakeCXXCompiler.cmake")):
        text = file.read_text(encoding="utf-8")
        parts = [re.search(rf'set\(CMAKE_CXX_COMPILER_{key} "([^"]*)"\)', text) for key in ("ID", "VERSION")]
        return " ".join(part.group(1) for part in parts if part)
    return "unknown"
