"""What becomes of the GPU benchmarks' figures: files, baselines, the table."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))  # at the end: its conftest must not come before this folder's

import common  # noqa: E402
import gpu_decode  # noqa: E402
import table  # noqa: E402
from common import Figure  # noqa: E402
from gpu_clock import Baseline, Bench  # noqa: E402


def bench(file: Path, **settings: Any) -> Bench:
    return Bench(file, {"machine": {}}, 1.0, torch.empty(0), math.inf, **settings)


def written(file: Path) -> list[dict[str, Any]]:
    (figures,) = json.loads(file.read_text(encoding="utf-8"))["figures"].values()
    return list(figures)


def step(**settings: Any) -> Figure:
    return Figure("step, warm L2", 40.0, "µs", (39.0, 41.0), 9, **settings)


def test_decoding_keeps_every_figure_at_once(tmp_path: Path) -> None:
    kept = bench(tmp_path / "card-decode.json", group="decode")
    counts = []

    def keep(figure: Figure) -> None:
        kept.keep(figure)
        counts.append(len(written(kept.file)))

    gpu_decode.time_decoding(torch.device("cpu"), keep, tiny=True)
    assert counts == [1, 2, 3]
    together = written(kept.file)[-1]
    assert together["ratio"] == pytest.approx(together["value"] / together["baseline_value"])
    assert together["met"] == (together["ratio"] <= gpu_decode.TOLERATED)


def test_drafts_beside_the_main_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "WARM_UP", 2)
    monkeypatch.setattr(gpu_decode, "STEPS", 5)
    found: list[Figure] = []
    gpu_decode.time_drafts(torch.device("cpu"), found.append, tiny=True)
    assert len(found) == 2 * len(gpu_decode.DRAFTS)
    for figure in found:
        assert figure.ratio == pytest.approx(figure.value / figure.baseline_value)
        assert bool(figure.budget) == ("same weights" in figure.name and "draft 0" not in figure.name)
    (agreeing,) = [one for one in found if "draft 3" in one.name and "same weights" in one.name]
    assert int(agreeing.note.split()[-6].rstrip("%")) > 90


def test_a_figure_has_its_budget_once_whatever_stands_beside_it(tmp_path: Path) -> None:
    kept = bench(tmp_path / "card.json")
    kept.keep(step(budget="at most 30 µs", met=False))
    for name, least in (("eager", None), ("compiled", None), ("the paper", 200.0)):
        kept.beside("step", Baseline(name, [4000.0] * 3, least))
    kept.write()
    figures = written(kept.file)
    assert [one.get("budget") for one in figures] == [
        "at most 30 µs",
        None,
        "at least 200 times the baseline",
    ]
    assert [one.get("met") for one in figures] == [False, None, False]
    assert table._gpu_row(figures) == (
        "| step, warm L2 | 40.0 µs |  | eager: 4,000 µs, 100.0 ×; compiled: 4,000 µs, 100.0 ×; the paper: "
        "4,000 µs, 100.0 × | at most 30 µs: **missed**; at least 200 times the baseline: **missed** |"
    )


def test_the_table_has_one_row_for_a_figure_and_a_table_for_decoding() -> None:
    twice = [step(budget="at most 50 µs", met=True).as_dict(), step(baseline="eager").as_dict()]
    decode = [Figure("greedy decoding, two models", 21.0, "ms", (20.0, 22.0), 9, note="fusion 1 %").as_dict()]
    gpu = {"name": "Card", "multiprocessors": 1, "l2_mb": 1.0, "bandwidth_gb_s": 1}
    result = {
        "machine": {"gpu": gpu},
        "versions": {"python": "3", "torch": "2", "cuda": "13"},
        "commit": "c0ffee",
        "dirty": False,
        "date": "2026-01-01T00:00",
        "figures": {"gpu": twice},
        "skipped": [],
    }
    assert table._section(result).count("step, warm L2") == 1
    result["figures"] = {"decode": decode}
    assert "| greedy decoding, two models | 21.0 ms" in table._section(result)


@pytest.mark.parametrize(("given", "commit"), [("abc123", "abc123"), (None, "unknown")])
def test_a_tree_without_git_is_told_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, commit: str
) -> None:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("DEEPEN_COMMIT", raising=False)
    if given is not None:
        monkeypatch.setenv("DEEPEN_COMMIT", given)
    assert common.environment()["commit"] == commit
