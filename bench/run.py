"""Runs every benchmark and writes bench/results/<machine>.json; bench/table.py then writes the page.

The file is written after each benchmark: one that fails, or an interruption, loses its own figures alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, environment, speed_file, write_json

BENCH = Path(__file__).resolve().parent


def _run(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def _operations(folder: Path) -> list[dict[str, Any]]:
    """The figures of the pytest-benchmark files."""
    file = folder / "operations.json"
    _run(["-m", "pytest", str(BENCH), "-q", "--benchmark-disable-gc", f"--benchmark-json={file}"])
    measured = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    return [one["extra_info"]["figure"] for one in measured]


def _script(folder: Path, name: str, *options: str) -> dict[str, Any]:
    file = folder / f"{name}.json"
    _run([str(BENCH / f"{name}.py"), "--json", str(file), *options])
    return dict(json.loads(file.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=BENCH / "results", help="folder for the JSON file")
    parser.add_argument("--repetitions", type=int, default=7, help="of the decode benchmark")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the decode benchmark")
    options = parser.parse_args()

    found = environment()
    target = options.results / speed_file(found)
    of_decode = ("--repetitions", str(options.repetitions), "--new-tokens", str(options.new_tokens))
    figures: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        figures["operations"] = _operations(folder)
        for name, given in (("decode", of_decode), ("memory", ())):
            write_json(target, {**found, "figures": figures, "raw": raw})
            made = _script(folder, name, *given)
            figures[name], raw[name] = made["figures"], made["raw"]
    write_json(target, {**found, "figures": figures, "raw": raw})
    print(f"wrote {target}")
    native = ["--backend", "llama.cpp", "--results", str(options.results)]  # it writes a file of its own
    _run([str(BENCH / "decode.py"), *native])
    drafts = options.results / f"{Path(speed_file(found)).stem}-drafts.json"  # this too
    _run([str(BENCH / "drafts.py"), "--json", str(drafts)])
    missed = [one["name"] for group in figures.values() for one in group if one.get("met") is False]
    if missed:
        print("over budget: " + "; ".join(missed))


if __name__ == "__main__":
    main()
