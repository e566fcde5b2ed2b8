"""What becomes of the GPU benchmarks' figures: files, baselines, the table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))  # at the end: its conftest must not come before this folder's

import common  # noqa: E402
import gpu  # noqa: E402
import gpu_clock  # noqa: E402
import gpu_decode  # noqa: E402
import table  # noqa: E402
from common import Figure  # noqa: E402
from gpu_clock import Baseline, Bench  # noqa: E402

from deepen_ext import InputError  # noqa: E402


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("\nCUDA error\nmore"), "RuntimeError: CUDA error"),
        (TypeError("no such argument"), "TypeError: no such argument"),
        (InputError("no such file"), "InputError: no such file"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_case_that_fails_in_any_way_is_written_down_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setattr(gpu_clock, "pause", lambda: None)
    kept = bench(tmp_path / "card.json")

    def fail() -> None:
        raise error

    kept.case("first", fail)
    kept.case("second", lambda: kept.keep(step()))
    assert json.loads(kept.file.read_text(encoding="utf-8"))["failed"] == [f"first: {said}"]
    assert len(written(kept.file)) == 1


def test_a_baseline_is_not_timed_where_there_is_nothing_to_put_it_beside(tmp_path: Path) -> None:
    kept = bench(tmp_path / "card.json")
    kept.keep(step())
    ran = []
    for name in ("step", "other step"):
        kept.case(f"the paper beside {name}", lambda name=name: ran.append(name), beside=name)  # type: ignore[misc]
    assert ran == ["step"]
    skipped = json.loads(kept.file.read_text(encoding="utf-8"))["skipped"]
    assert skipped == ["the paper beside other step: no figure of ours to stand beside"]


def test_some_cases_do_not_replace_a_file_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu._core, "cuda_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "file_stem", lambda: "card")
    monkeypatch.setattr(gpu, "bandwidth", lambda: pytest.fail("the device was asked"))
    (tmp_path / "card.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "paper", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "card.json has the figures of another run" in capsys.readouterr().err


@pytest.fixture
def without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call once on the CPU, where a card would be timed; pairs of small vocabularies."""

    def once(call: Callable[[], object], *_: object, **__: object) -> list[float]:
        call()
        return [1.0] * 5

    for module in (gpu, gpu_clock):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "pause", lambda: None)
        monkeypatch.setattr(module, "graph_of", lambda call, calls=1: SimpleNamespace(replay=call))
        for name in ("events", "in_a_graph", "plain"):
            monkeypatch.setattr(module, name, once)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(gpu, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu, "PAPER_ANCHORS", 300)
    small = {
        "32k + 32k": (3000, 2000, 900),
        "49k + 262k": (2000, 2500, 1000),
        "128k + 152k": (2600, 3500, 1000),
    }
    assert set(small) == set(gpu.PAIRS)
    monkeypatch.setattr(gpu, "PAIRS", small)
    rows = gpu.time_relative_rows
    monkeypatch.setattr(gpu, "time_relative_rows", lambda kept, *sizes: rows(kept, 64, 3000, 1000, sizes[-1]))


@pytest.mark.slow
def test_every_case_of_a_card_runs_over_small_vocabularies_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_a_card: None
) -> None:
    stored = {"anchors": torch.tensor(1000)}
    for i, top in enumerate(torch.softmax(torch.randn(4, vocab), dim=1).topk(128) for vocab in (2000, 2500)):
        stored |= {f"ids{i}": top.indices.int(), f"probs{i}": top.values}
        stored[f"columns{i}"] = torch.arange(32, dtype=torch.int32).expand(4, 128, 32).contiguous()
        stored[f"values{i}"] = torch.full((4, 128, 32), 0.9 / 32).half()
        stored[f"rest{i}"] = torch.full((4, 128), 0.1)
    save_file(stored, tmp_path / "rows.safetensors")
    real = load_file(gpu.DEMO_ROWS)
    assert {name: (one.dtype, one.shape) for name, one in stored.items()} == {
        name: (one.dtype, one.shape) for name, one in real.items()
    }
    monkeypatch.setattr(gpu, "DEMO_ROWS", tmp_path / "rows.safetensors")
    kept = bench(tmp_path / "card.json")
    kept.flush = torch.zeros(9)
    gpu.run(kept)
    assert kept.failed == []
    assert kept.skipped == []
    timed = {one.name.split(",")[0] for one in kept.figures}
    assert timed > {
        "topk_softmax",
        "relative_rows",
        "inverse_search",
        "fuse after top-k",
        "whole fusion step",
    }


def test_the_stored_rows_are_of_the_pair_they_are_put_into() -> None:
    assert int(load_file(gpu.DEMO_ROWS)["anchors"]) == gpu.PAIRS["49k + 262k"][2]


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
        "failed": [],
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
