"""bench/peers.py without the peers: its arguments, its texts and questions, its child process, its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))  # at the end: its conftest must not come before this folder's

import peers  # noqa: E402
import peers_setup  # noqa: E402
import peers_table  # noqa: E402


def job(data: Path, **changes: Any) -> peers_setup.Job:
    sizes = {"items": 2, "letters": 1, "texts": 1, "context": 60, "scored": 60}
    given = {"pair": "S+Q", "data": data, "checkout": None, "tokens": 2, "prompts": 1, "batch": 2, **sizes}
    return peers_setup.Job(**{**given, **changes})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dev split of each task that is read."""
    arc = [
        {"question": f"Which is number {i}?", **dict(zip("ABCD", "wxyz", strict=True)), "answer": answer}
        for i, answer in enumerate(["C", "2", "A"])
    ]
    gsm8k = [{"question": "How much is two and two?", "answer": "Two and two is 4.\n#### 4"}] * 9
    for name, rows in {"arc_challenge": arc, "gsm8k": gsm8k}.items():
        (tmp_path / name).mkdir()
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        for file in ("dev.jsonl", "demos.jsonl"):
            (tmp_path / name / file).write_text(lines, encoding="utf-8")
    return tmp_path


def checkout(folder: Path, name: str) -> Path:
    """A folder with the one file that tells a checkout."""
    source = folder / name / peers.PROGRAMS[name].source
    source.parent.mkdir(parents=True)
    source.write_text("raise NotImplementedError('this is no peer')\n", encoding="utf-8")
    return folder / name


def test_a_folder_that_is_no_checkout_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.parse(["--data", str(data), "--unite", str(data)])
    said = capsys.readouterr().err
    assert "no checkout of starrYYxuan/UniTE" in said
    assert "unite2.py" in said
    assert "git clone" in said


def test_no_peer_at_all_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.parse(["--data", str(data)])
    assert "give --byte-sampler, --unite or both" in capsys.readouterr().err


def test_the_checkouts_that_are_named_run_after_us(data: Path, tmp_path: Path) -> None:
    path = checkout(tmp_path, "byte-sampler")
    options, found = peers.parse(["--data", str(data), "--byte-sampler", str(path), "--quick"])
    assert found == {"deepen-ext": None, "byte-sampler": path}
    assert options.items == 2


def test_texts_and_questions(data: Path) -> None:
    found = peers_setup.texts(job(data))
    assert [text.kind for text in found] == list(peers_setup.KINDS)
    for text in found:
        assert text.scored.startswith(" ")
        assert len(text.context + text.scored) <= 120
    second = peers_setup.questions(job(data, items=3))[1]
    assert second.prompt == "Question: Which is number 1?\nAnswer:"
    assert second.choices == [" w", " x", " y", " z"]
    assert second.gold == 1  # written as 2
    assert second.letters_prompt.endswith("C: y\nD: z\nAnswer:")


def test_an_error_of_one_part_stays_beside_the_others() -> None:
    row: peers_setup.Row = {}
    peers_setup.attempt(row, "texts", lambda: 1)
    peers_setup.attempt(row, "speed", lambda: {}["key"])
    assert row == {"texts": 1, "errors": {"speed": "KeyError: 'key'"}}


def test_right_by_choices() -> None:
    question = peers_setup.Question({}, "", [" a", " bbbb"], "", 1)
    found = peers_setup.choices_right([(question, [-2.0, -4.0])])
    assert found == {"right": [0], "right_by_bytes": [1]}


def test_a_peer_that_fails_is_a_row_with_its_error(data: Path, tmp_path: Path) -> None:
    """The child's own process, up to the peer's import."""
    path = checkout(tmp_path, "UniTE")
    sizes = {"items": 1, "letters": 1, "texts": 1, "context": 60, "scored": 60, "tokens": 2, "prompts": 1}
    found = {**sizes, "batch": 2, "pair": "S+G", "data": str(data), "checkout": str(path)}
    (row,) = peers._in_a_process("UniTE", found)
    assert row == {
        "system": "UniTE",
        "name": "",
        "errors": {"all": "NotImplementedError: this is no peer"},
    }


def test_table() -> None:
    def text(bits: list[float], **more: Any) -> dict[str, Any]:
        return {"kind": "gsm8k", "bytes": 200, "bits": bits, **more}

    tokens = {"tokens": 50, "right_tokens": 30}
    answers = {"choices": {"right": [1, 0], "right_by_bytes": [1, 1]}, "letters": {"right": [0, 1]}}
    speed = {"ms_a_token": 41.2, "ms_a_token_in_a_batch": 20.0, "beyond_models_mb": 1230.4}
    never = {"kind": "gsm8k", "bytes": 200, "tokens": 50, "tokens_with_probability": 48, "right_tokens": 25}
    rows: list[dict[str, Any]] = [
        {"system": "alone", "name": "S", "texts": [text([128.0, 72.0], **tokens)], **answers, "speed": speed},
        {"system": "deepen-ext", "name": "average", "texts": [text([100.0, 60.0], **tokens)]},
        {"system": "byte-sampler", "name": "mix", "texts": [text([90.0, 50.0])]},
        {"system": "UniTE", "name": "union of top 10", "texts": [never], "errors": {"speed": "KeyError: 1"}},
        {"system": "other", "name": "", "errors": {"all": "ImportError: no such thing"}},
    ]
    facts = {"repository": "a/b", "commit": "0123456789", "changes": ["nothing"]}
    environment = {
        "machine": {"cpu": "Some CPU", "cores": 2},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "torch_threads": 2,
        "commit": "abcdef0123",
        "date": "2026-01-02T03:04:05+00:00",
    }
    sizes = {"texts": 1, "scored": 400, "context": 400, "items": 2, "letters": 2, "tokens": 16, "batch": 4}
    found = peers_table.peers_table(
        {"pairs": {"S+Q": rows}, "settings": sizes, "peers": {"b": facts}, "environment": environment}
    )
    lines = {line.split("|")[1].strip(): line for line in found.splitlines() if line.startswith("|")}
    assert len({line.count("|") for line in lines.values()}) == 1
    assert "| 1.000 | 1.000 | +0.300 ± " in lines["SmolLM2 alone"]
    assert lines["SmolLM2 alone"].endswith(
        "| 60% | 50% (9–91) | 100% (34–100) | 50% (9–91) | 41 | 20 | 1,230 |"
    )
    assert "| 0.800 | 0.800 | +0.100 ± 0.028 | 60% |" in lines["average"]
    assert "| 0.700 | 0.700 | – | – |" in lines["byte-sampler, mix"]
    assert "4.0% of tokens have probability 0" in lines["UniTE, union of top 10"]
    assert "- UniTE, speed: does not run here: `KeyError: 1`" in found
    assert "- other does not run here: `ImportError: no such thing`" in found
    assert "b is a/b at 0123456; nothing." in found
