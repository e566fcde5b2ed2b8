"""The backends page and the table of llama.cpp members: functions of the benchmarks' JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.append(str(BENCH))  # at the end: its conftest must not come before this folder's

import backends  # noqa: E402
import decode_native  # noqa: E402

ENVIRONMENT = {
    "machine": {"cpu": "Some CPU", "cores": 2, "isa": "avx2", "ram_gb": 8.0},
    "versions": {"python": "3", "torch": "2.13.0", "transformers": "5.23.0", "llama.cpp": "llama.cpp 1"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}


def page(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    marked = [f"<!-- {one}:begin -->\nold\n<!-- {one}:end -->\n" for one in ("differences", "repeatability")]
    (folder / "backends.md").write_text(
        "before\n" + "".join(marked) + "<!-- start:begin -->\n<!-- start:end -->\n"
    )
    (folder / "performance.md").write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    kind = {
        "positions": 1200,
        "divergence": 0.00321,
        "divergence_p99": 0.0456,
        "same": 0.975,
        "bits_per_byte_float32": 0.9,
        "bits_per_byte_quantised": 0.8876,
    }
    ways = {
        "once more": backends.compare_texts([[1, 2]], [[1, 2]]),
        "in a batch": backends.compare_texts([[1, 2, 3, 4], [1, 2]], [[1, 9, 3, 8], [1, 2]]),
    }
    found = {
        "differences": {"Small": {"file": "Q4_1", "kinds": {"code": kind}}},
        "repeatability": {
            "members": ["Small", "Large"],
            "prompts": 2,
            "prompt_tokens": 96,
            "new_tokens": 4,
            "ways": ways,
        },
    }
    stages = [{"imports": 1.0, "loading": 2.0, "first token": seconds, "peak": 90.0} for seconds in (3, 9, 4)]
    runs = [{"first_token": seconds, "end": 20.0, "peak": 1234.0} for seconds in (7.0, 50.0, 8.0)]
    begun = {
        "llama.cpp": {"command": runs, "stages": stages, "very first": runs[1]},
        "transformers": {"command": runs, "stages": stages},
    }
    (folder / "backends-some.json").write_text(json.dumps({**found, "environment": ENVIRONMENT}))
    (folder / "start-some.json").write_text(json.dumps({"start": begun, "environment": ENVIRONMENT}))
    return folder


def test_the_committed_page_is_made_of_the_committed_json() -> None:
    done = page("backends_page.py", "--check")
    assert done.returncode == 0, done.stderr


def test_the_tables_of_small_results(results: Path, docs: Path) -> None:
    given = ("--results", results, "--docs", docs)
    assert page("backends_page.py", *given, "--check").returncode == 1
    done = page("backends_page.py", *given)
    assert done.returncode == 0, done.stderr
    text = (docs / "backends.md").read_text()
    assert "old" not in text
    assert "| Small (Q4_1) | code | 1,200 | 0.0032 | 0.0456 | 97.5% | 0.9000 | 0.8876 | -0.0124 |" in text
    assert "| once more | 1 | 0 (0%) | 0 of 2 (0.0%) | none |" in text
    assert "| in a batch | 2 | 1 (50%) | 2 of 6 (33.3%) | one in 4 tokens |" in text
    assert "| llama.cpp | 8.0 s | 1.0 + 2.0 + 4.0 | 20.0 s | 1,234 MB | 50.0 s, 1,234 MB |" in text
    assert "| transformers | 8.0 s | 1.0 + 2.0 + 4.0 | 20.0 s | 1,234 MB |  |" in text
    assert text.count("**Some CPU, 2 cores** (avx2), llama.cpp 1,") == 3
    assert page("backends_page.py", *given, "--check").returncode == 0
    (docs / "backends.md").write_text(text.replace("97.5%", "99.5%"))
    assert page("backends_page.py", *given, "--check").returncode == 1


def test_a_start_without_the_very_first_has_no_column_for_it(results: Path, docs: Path) -> None:
    file = results / "start-some.json"
    found = json.loads(file.read_text())
    del found["start"]["llama.cpp"]["very first"]
    file.write_text(json.dumps(found))
    assert page("backends_page.py", "--results", results, "--docs", docs).returncode == 0
    text = (docs / "backends.md").read_text()
    assert "| llama.cpp | 8.0 s | 1.0 + 2.0 + 4.0 | 20.0 s | 1,234 MB |\n" in text
    assert "very first" not in text


def test_a_page_without_results_says_so(tmp_path: Path, docs: Path) -> None:
    assert page("backends_page.py", "--results", tmp_path / "none", "--docs", docs).returncode == 0
    text = (docs / "backends.md").read_text()
    assert text.count("Not measured yet") == 3


def test_a_text_that_is_longer_differs_in_every_place_beyond() -> None:
    found = backends.compare_texts([[1, 2, 3]], [[1, 2, 3, 4, 5]])
    assert (found["tokens"], found["tokens_differ"], found["decisions"]) == (5, 2, 4)


def raw_runs() -> dict[str, Any]:
    """Two repetitions of everything: the ensemble 21 and 22 ms, its members 8 + 12 ms alone."""
    own = {
        name: {"prompt": 500.0, "prompt_tokens": 250, "steps": [step, step], "ids": [1]}
        for name, step in (("Small", 8.0), ("Large", 12.0))
    }

    def ours(total: float) -> dict[str, Any]:
        split = {"forward of Small": 8.0, "fusion": 1.0, "total": total}
        return {**split, "prompt": 900.0, "steps": [total, total], "skipped": 0.0}

    runs = {"asked": [ours(21.0), ours(22.0)], "skip": [ours(15.0)], "own": [own, own], "tokens": 64}
    return {
        "trio": {**runs, "loaded": 2000.0, "peak": 3000.0, "mapped": 1500.0},
        "single": {**runs, "generate": [{"Small": 40.0, "Large": 60.0}] * 2},
        "batches": [{"context": 256, "batch": 4, "own": own, "asked": ours(30.0)}],
    }


def test_the_table_of_llama_cpp_members(tmp_path: Path, docs: Path) -> None:
    made = {"llama.cpp": [one.as_dict() for one in decode_native.figures(raw_runs())]}
    content = {**ENVIRONMENT, "quick": False, "llama_cpp_threads": 2, "figures": made}
    (tmp_path / "some-llama-cpp.json").write_text(json.dumps(content))
    done = page("table.py", "--results", tmp_path, "--docs", docs)
    assert done.returncode == 0, done.stderr
    rows = (docs / "performance.md").read_text().splitlines()
    single = [row for row in rows if row.startswith("| prose, context 256, batch 1 |")]
    assert len(single) == 2
    assert "loops: 20.0 ms a token | 1.07 × | at most 1.05 times the baseline: **missed** |" in single[0]
    assert "generate: 100 ms a token | 0.21 × | at most 0.22 times the baseline: met |" in single[1]
    (alone,) = [row for row in rows if row.startswith("| Large alone, llama.cpp's own loop |")]
    assert "12.0 ms a token" in alone
    assert "reads 500 tokens a second" in alone
    (peak,) = [row for row in rows if "memory of the whole process" in row]
    assert "3,000 MB" in peak
    (batch,) = [row for row in rows if row.startswith("| batch 4, context 256 |")]
    assert "| 1.50 × |" in batch
    assert "133.3 tokens a second; alone: Small 500.0, Large 333.3" in batch
    (reading,) = [row for row in rows if "reading the prompts" in row]
    assert "| 0.90 × |" in reading
