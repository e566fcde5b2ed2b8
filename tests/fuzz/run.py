"""All of the fuzzing in its long form: `make fuzz`. Writes what was called, how long it took and what was
found; the exit code is 1 where something was.

    python tests/fuzz/run.py [--calls 10000000] [--scale 20] [--rounds 2000] [--results FOLDER]

The corpus grows in build/fuzz-corpus: the next run goes on where this one ended. An input that broke
something is kept in build/fuzz-findings; `build/fuzz-calls/tests/fuzz/fuzz_TARGET FILE` runs it again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import programs

sys.path.append(str(programs.ROOT / "bench"))

from common import environment, speed_file, write_json

PYTHON_TESTS = ["tests/fuzz", "tests/test_damaged_files.py", "tests/test_real_tokenizers.py"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=float, default=1e7, help="of the core and libdeepen, by libFuzzer")
    parser.add_argument(
        "--scale", type=float, default=20, help="the Python tests are this many times as long"
    )
    parser.add_argument("--rounds", type=int, default=2000, help="steps of each thread under ThreadSanitizer")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of everything; default: the time")
    parser.add_argument("--results", type=Path, default=programs.ROOT / "bench" / "results" / "fuzz")
    asked = parser.parse_args()
    started = environment()
    rows: list[dict[str, object]] = []

    def add(row: dict[str, object]) -> None:
        rows.append(row)
        print(f"{row['target']:32} {row['calls']:>10,} calls {row['seconds']:>8} s  {_said(row)}", flush=True)

    corpus = programs.BUILD / "fuzz-corpus"
    program = programs.build_calls()
    programs.write_seeds(corpus)
    for target, share in programs.SHARES.items():
        calls = int(asked.calls * share)
        findings = programs.BUILD / "fuzz-findings"
        add(programs.fuzz(program, target, calls, corpus / target, findings, seed=asked.seed).row())
    add(programs.threads(programs.build_threads(), asked.rounds).row())
    for row in _python(asked.scale, asked.seed):
        add(row)
    found = [row for row in rows if row["finding"]]
    total = sum(int(str(row["calls"])) for row in rows)
    record = started | {
        "clang": _output("clang++", "--version").splitlines()[0],
        "seed": asked.seed,
        "calls": total,
        "findings": len(found),
        "targets": [row | {"finding": _said(row)} for row in rows],
    }
    target = asked.results / speed_file(record)
    write_json(target, record)
    print(f"{total:,} calls, {len(found)} findings; {target}")
    for row in found:
        print(f"\n--- {row['target']}\n{row['finding']}", file=sys.stderr)
    return bool(found)


def _said(row: dict[str, object]) -> str:
    return "FOUND SOMETHING" if row["finding"] else "clean"


def _python(scale: float, seed: int) -> list[dict[str, object]]:
    """The rows of the Python tests; a failure is one more."""
    record = programs.BUILD / "fuzz-record.jsonl"
    record.unlink(missing_ok=True)
    settings = {
        "DEEPEN_FUZZ_SCALE": str(scale),
        "DEEPEN_FUZZ_SEED": str(seed),
        "DEEPEN_FUZZ_RECORD": str(record),
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *PYTHON_TESTS],
        cwd=programs.ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    lines = record.read_text().splitlines() if record.is_file() else []
    rows: list[dict[str, object]] = [json.loads(line) for line in lines]
    if done.returncode:
        seconds = round(time.monotonic() - started, 1)
        rows.append({"target": "pytest", "calls": 0, "seconds": seconds, "finding": done.stdout[-20000:]})
    return rows


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    # The tests' own modules are beside this folder.
    sys.exit(main())
