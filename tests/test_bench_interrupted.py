"""What a benchmark leaves in its file where a later part of it fails, and which parts may share a file."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))  # at the end: its conftest must not come before this folder's

import backends  # noqa: E402
import decode  # noqa: E402
import decode_native  # noqa: E402
import drafts  # noqa: E402
import quantised_members  # noqa: E402
import serve_load  # noqa: E402
import start  # noqa: E402
from common import environment  # noqa: E402

# By its file: tests/fuzz has a run.py too, whose folder may be on the path.
_SPEC = importlib.util.spec_from_file_location("bench_run", ROOT / "bench" / "run.py")
assert _SPEC is not None
assert _SPEC.loader is not None
run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(run)


class Interrupted(Exception):
    pass


def interrupted(*_: object, **__: object) -> NoReturn:
    raise Interrupted


def once(value: Any) -> Callable[..., Any]:
    """A function that gives the value, and the second time is interrupted."""
    left = [value]
    return lambda *_, **__: left.pop() if left else interrupted()


def left_by(main: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """What is in the only file of the folder after `main` was interrupted."""
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(Interrupted):
        main()
    (file,) = folder.iterdir()
    return json.loads(file.read_text(encoding="utf-8"))


def test_run_keeps_what_came_before_the_benchmark_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(folder: Path, name: str, *options: str) -> dict[str, Any]:
        return {"figures": [{"name": name}], "raw": {"options": list(options)}}

    monkeypatch.setattr(run, "_operations", lambda folder: [{"name": "one"}])
    monkeypatch.setattr(run, "_script", script)
    monkeypatch.setattr(run, "_run", interrupted)
    found = left_by(run.main, tmp_path, monkeypatch, "--results", str(tmp_path), "--new-tokens", "9")
    assert found["figures"] == {one: [{"name": one}] for one in ("decode", "memory")} | {
        "operations": [{"name": "one"}]
    }
    given = {"options": ["--repetitions", "7", "--new-tokens", "9"]}
    assert found["raw"] == {"decode": given, "memory": {"options": []}}


def test_run_keeps_the_operations_where_decode_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_operations", lambda folder: [{"name": "one"}])
    monkeypatch.setattr(run, "_script", interrupted)
    found = left_by(run.main, tmp_path, monkeypatch, "--results", str(tmp_path))
    assert found["figures"] == {"operations": [{"name": "one"}]}


def test_decode_in_llama_cpp_keeps_the_three_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"total": 2.0, "prompt": 3.0, "steps": [2.0], "skipped": 0.0}]
    own = [{"one": {"steps": [1.0], "prompt_tokens": 1, "prompt": 1.0}}]
    trio = {"tokens": 4, "loaded": 1.0, "peak": 2.0, "mapped": 1.0, "own": own, "asked": runs, "skip": runs}
    monkeypatch.setattr(decode_native, "_trio", lambda options: trio)
    monkeypatch.setattr(decode_native, "load_native", interrupted)
    options = SimpleNamespace(json=tmp_path / "found.json", quick=True, threads=1)
    found = left_by(lambda: decode_native.run(options), tmp_path, monkeypatch)
    assert found["raw"] == {"trio": trio}
    assert found["figures"]["llama.cpp"]


def test_backends_keeps_the_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "dev.jsonl").touch()
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(backends, "differences", lambda *_: {"SmolLM2": {}})
    monkeypatch.setattr(backends, "repeatability", interrupted)
    options = ("--data", str(tmp_path), "--json", str(results / "found.json"))
    found = left_by(backends.main, results, monkeypatch, *options)
    assert found["differences"] == {"SmolLM2": {}}


def test_quantised_members_keeps_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = environment()
    monkeypatch.setattr(quantised_members, "environment", lambda: machine)  # it asks git in a process
    monkeypatch.setattr(subprocess, "run", once(SimpleNamespace(stdout='{"way": "float32"}\n')))
    found = left_by(quantised_members.main, tmp_path, monkeypatch, "--results", str(tmp_path))
    assert found["figures"] == [{"way": "float32"}]


def test_start_keeps_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "command", lambda backend: {"end": 1.0})
    monkeypatch.setattr(start, "stages", once({"loading": 1.0}))
    found = left_by(start.main, tmp_path, monkeypatch, "--json", str(tmp_path / "found.json"))
    assert found["start"]["llama.cpp"] == {"command": [{"end": 1.0}], "stages": [{"loading": 1.0}]}


@pytest.mark.parametrize("script", ["backends", "boundary", "decode", "drafts", "peers"])
def test_a_wrong_folder_of_data_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "environment", interrupted, raising=False)
    monkeypatch.setattr(sys, "argv", [script, "--data", str(tmp_path)])
    with pytest.raises(SystemExit):
        module.main()
    assert f"{tmp_path} has no gsm8k/dev.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--quick", "--threads=1", "--results=there"])
def test_decode_refuses_what_it_would_leave_unread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(decode, "again_with_an_empty_cache", interrupted)
    monkeypatch.setattr(sys, "argv", ["decode", option])
    with pytest.raises(SystemExit):
        decode.main()
    assert "are for --backend llama.cpp" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["commit", "threads", "cores", "torch"])
def test_parts_of_drafts_share_a_file_only_where_they_are_of_one_kind(tmp_path: Path, other: str) -> None:
    def result(changed: str = "") -> dict[str, Any]:
        def one(name: str) -> str:
            return f"another {name}" if name == changed else name

        machine = {name: one(name) for name in ("cpu", "cores", "isa")}
        names = {name: one(name) for name in ("commit", "quick", "threads")}
        return {
            **names,
            "machine": machine,
            "versions": {"torch": one("torch")},
            "dirty": False,
            "raw": {"pair": []},
        }

    file = tmp_path / "drafts.json"
    file.write_text(json.dumps(result()))
    assert drafts.kept(file, result()) == {"pair": []}
    assert drafts.kept(file, result(other)) == {}


def test_serve_load_states_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two repetitions the mean, not the better one."""
    times = iter([1.0, 1.0, 3.0])  # the first is no repetition

    async def at_once(address: str, asked: list[str], tokens: int) -> tuple[list[serve_load.Text], float]:
        return [serve_load.Text(text=one, tokens=6, first=0.1) for one in asked], next(times)

    asked = serve_load.prompts(1)
    beside = iter([1.0, 2.0])
    monkeypatch.setattr(serve_load, "at_once", at_once)
    monkeypatch.setattr(
        serve_load,
        "batch",
        lambda *_: {"texts": asked, "alone": asked, "tokens": 6, "seconds": next(beside)},
    )
    found = serve_load.load("", 1, SimpleNamespace(repetitions=2, tokens=6, lanes=1))  # type: ignore[arg-type]
    assert found["tokens a second"] == 4.0
    assert found["batch, tokens a second"] == 4.5
    assert found["of the batch's"] == round(4 / 4.5, 3)
