"""The performance page: its tables and plots are a function of the benchmarks' JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"

SUM = "sum of the members alone, transformers generate"


def figure(name: str, value: float, **more: Any) -> dict[str, Any]:
    spread = [value - 5, value + 5]
    return {
        "name": name,
        "value": value,
        "unit": "ms a token",
        "spread": spread,
        "repetitions": 4,
        **more,
    }


def against_sum(name: str, value: float, **more: Any) -> dict[str, Any]:
    return figure(
        name,
        value,
        baseline=SUM,
        baseline_value=200.0,
        baseline_spread=[190.0, 220.0],
        ratio=value / 200,
        **more,
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One processor's times and one card's."""
    folder = tmp_path / "results"
    folder.mkdir()
    common = {"commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02T03:04:05+00:00"}
    versions = {
        "python": "3",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "compiler": "GNU 12",
        "cuda": "13",
    }
    cpu = {
        "machine": {"cpu": "Some CPU", "cores": 2, "isa": "avx2", "ram_gb": 8.0},
        "versions": versions,
        "torch_threads": 2,
        "figures": {
            "operations": [figure("topk_softmax", 100.0)],
            "decode": [
                against_sum("prose, context 256, batch 1", 120.0),
                figure("Small alone, transformers generate", 80.0),
                against_sum(
                    "prose, context 256, batch 1, fuser deepen, certified skip",
                    60.0,
                    note="first token 5 ms; 75% of the tokens settled; more",
                ),
                figure("batch 4, context 256", 3.0),
            ],
        },
    }
    gpu = {
        "machine": {"gpu": {"name": "Card", "multiprocessors": 1, "l2_mb": 1.0, "bandwidth_gb_s": 1}},
        "versions": versions,
        "figures": {"gpu": [figure("step, warm L2", 40.0, budget="at most 50 µs", met=True)]},
        "skipped": ["slow step"],
        "failed": ["other step: RuntimeError: why"],
    }
    beside = {"baseline": "the same without drafts", "baseline_value": 200.0, "ratio": 0.6}
    drafts = {
        **cpu,
        "kind": "drafts",
        "quick": False,
        "threads": 2,
        "versions": {**versions, "llama.cpp": "llama.cpp 1"},
        "figures": {
            "larger": [figure("draft auto, drafter auto", 110.0, **beside)],
            "pair": [figure("the pair, draft auto", 120.0, note="80% of these stood", **beside)],
        },
    }
    (folder / "some-cpu-drafts.json").write_text(json.dumps({**common, **drafts}))
    (folder / "some-cpu.json").write_text(json.dumps({**common, **cpu}))
    (folder / "card.json").write_text(json.dumps({**common, **gpu}))
    (folder / "other.json").write_text(json.dumps({"no": "figures"}))
    return folder


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "performance.md").write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_committed_page_is_made_of_the_committed_json() -> None:
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_a_page_of_small_results(results: Path, docs: Path) -> None:
    assert run("--results", results, "--docs", docs, "--check").returncode == 1
    done = run("--results", results, "--docs", docs)
    assert done.returncode == 0, done.stderr
    page = (docs / "performance.md").read_text()
    assert page.startswith("before\n<!-- bench:begin -->\n**Card**")
    assert page.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in page
    assert "\n\nNot measured: slow step.\n\nFailed: other step: RuntimeError: why.\n\n" in page
    assert "| prose, context 256, batch 1 | 120 ms a token (115 to 125) |" in page
    assert page.count("![") == 1  # neither the card nor the drafts have such figures
    _, pair, larger = page.partition("**Some CPU, 2 cores** (avx2), drafts, 2 threads")[2].split(
        "\n| drafts, "
    )[:3]
    row = "| the same without drafts: 200 ms a token | 0.60 × |"
    assert f"| the pair, draft auto | 120 ms a token (115 to 125) {row}  | 80% of these stood |" in pair
    assert f"| draft auto, drafter auto | 110 ms a token (105 to 115) {row}" in larger
    assert "](performance/speed-some-cpu.svg)" in page

    plot = docs / "performance" / "speed-some-cpu.svg"
    root = ElementTree.fromstring(plot.read_text())
    texts = [one.text or "" for one in root.iter() if one.tag.endswith("text")]
    labels = [text for text in texts if text.startswith(("Small", "the members", "fuse"))]
    assert labels == [
        "Small alone, transformers",
        "the members one after the other, transformers",
        "fused by deepen-ext",
        "fuser deepen, certified skip (75% settled)",
    ]
    assert [text for text in texts if text.endswith(" ms")] == ["80 ms", "200 ms", "120 ms", "60 ms"]
    assert (
        "Some CPU, 2 cores (avx2), torch 2.13.0, transformers 5.23.0; commit 0123456789, 2026-01-02" in texts
    )
    bars = [one[0].attrib["d"] for one in root.iter() if one.attrib.get("id", "").startswith("bar-")]
    across = [[float(x) for x in re.findall(r"[ML] (\S+) ", bar)] for bar in bars]
    lengths = [max(one) - min(one) for one in across]
    scale = 0.75 * 330 / 220  # 330 pixels, each 0.75 points, for 220 ms
    assert lengths == pytest.approx([scale * ms for ms in (80, 200, 120, 60)], abs=0.01)

    assert run("--results", results, "--docs", docs, "--check").returncode == 0
    plot.write_text(plot.read_text().replace("75%", "99%"))
    stale = run("--results", results, "--docs", docs, "--check")
    assert stale.returncode == 1
    assert "speed-some-cpu.svg is out of date" in stale.stderr
    assert run("--results", results, "--docs", docs).returncode == 0
    assert "75%" in plot.read_text()
