"""Evaluation: resumable records, summaries and comparisons, and the command killed and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sessions import changed
from typer.testing import CliRunner

from deepen_ext import Ensemble, InputError
from deepen_ext.commands import evaluate as command
from deepen_ext.commands.cli import app
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.measure.evaluation.headers import Header, check_same, configuration_header, make_header
from deepen_ext.measure.evaluation.jobs import Progress, prepare
from deepen_ext.measure.evaluation.records import (
    ItemRecord,
    ItemTiming,
    RecordFile,
    output_folder,
    record_path,
)
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.measure.evaluation.statistics import mcnemar, wilson_interval
from deepen_ext.measure.evaluation.summary import summarise
from deepen_ext.measure.evaluation.summary_table import summary_table
from deepen_ext.members.member import Member

ROOT = Path(__file__).parent.parent
CHOICES = [
    ("What is frozen water called?", ["ice", "steam", "rain", "fog"]),
    ("Which animal lays eggs?", ["a dog", "a hen", "a cow", "a cat"]),
    ("Which of these is a metal?", ["wood", "glass", "iron", "wool"]),
    ("What do plants need to grow?", ["noise", "salt", "coal", "light"]),
    ("Which planet do we live on?", ["Earth", "Mars", "Venus", "Saturn"]),
    ("What pulls a dropped stone down?", ["wind", "gravity", "heat", "sound"]),
]
QUESTIONS = [
    ("What is the capital of France?", ["Paris"]),
    ("Who wrote Hamlet?", ["William Shakespeare", "Shakespeare"]),
    ("How many legs has a spider?", ["eight", "8"]),
    ("What is the largest ocean?", ["Pacific", "Pacific Ocean"]),
    ("What colour is a ripe banana?", ["yellow"]),
    ("Which metal is liquid at room temperature?", ["mercury"]),
]
TASKS = ("arc_challenge", "triviaqa")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six items of two tasks: one new token, and up to ten."""
    folder = tmp_path_factory.mktemp("data")
    choices = [
        {"question": question, **dict(zip("ABCD", options, strict=True)), "answer": "ABCDAB"[place]}
        for place, (question, options) in enumerate(CHOICES)
    ]
    questions = [{"question": question, "answer": answers} for question, answers in QUESTIONS]
    _write_lines(folder / "arc_challenge" / "test.jsonl", choices)
    _write_lines(folder / "triviaqa" / "test.jsonl", questions)
    demos = [{"question": "What is the capital of Italy?", "answer": ["Rome"]}]
    _write_lines(folder / "triviaqa" / "demos.jsonl", demos)
    return folder


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    demos = path.name == "demos.jsonl"
    rows = [{**row, "answer": row["answer"][0]} for row in rows] if demos else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def ensembles(tiny_smollm2: Member, tiny_gemma: Member) -> dict[str, Ensemble]:
    """As the command makes them of two models with two fusers."""
    fused = Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen")
    return {
        tiny_smollm2.name: Ensemble([tiny_smollm2], fuser="single"),
        tiny_gemma.name: Ensemble([tiny_gemma], fuser="single"),
        "deepen:bytes": fused,
        "average": fused.variant(fuser="average"),
    }


def item_lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Of every file the items without their times, in the file's order."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_bytes().splitlines()[1:]]
        found[path.name] = [{key: value for key, value in line.items() if key != "timing"} for line in lines]
    return found


def timeless(value: Any) -> Any:
    """A summary without what depends on the clock."""
    if isinstance(value, Mapping):
        return {key: timeless(inner) for key, inner in value.items() if key != "timing"}
    return value


# The command


def start(data: Path, out: Path, folders: list[Path]) -> subprocess.Popen[str]:
    options = ["--data", str(data), "--json", str(out), "--batch-size", "2", "--limit", "5"]
    options += [option for folder in folders for option in ("--model", str(folder))]
    tasks = [option for task in TASKS for option in ("--task", task)]
    return subprocess.Popen(
        [sys.executable, "-m", "deepen_ext.commands.cli", "eval", *options, *tasks, "--fuser", "deepen"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def items_on_disk(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in out.glob("*.jsonl"))


def test_killed_and_gone_on_with_is_as_an_unbroken_run(
    data: Path,
    tmp_path: Path,
    ensembles: dict[str, Ensemble],
    tiny_smollm2_dir: Path,
    tiny_gemma_dir: Path,
) -> None:
    """SIGKILL half way, a torn line, the same command again; 2 tasks, 3 configurations, 5 items."""
    folders = [tiny_smollm2_dir, tiny_gemma_dir]
    unbroken = tmp_path / "unbroken"
    same = {name: one for name, one in ensembles.items() if name != "average"}
    expected = evaluate(same, TASKS, data, out=unbroken, batch_size=2, limit=5)
    lines = item_lines(unbroken)
    assert len(lines) == 6
    assert all(len(own) == len({one["index"] for one in own}) == 5 for own in lines.values())
    assert len({one["output"] for own in lines.values() for one in own}) > 8  # not all the same

    out = tmp_path / "killed"
    with start(data, out, folders) as process:
        while items_on_disk(out) < 15:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    first = item_lines(out)
    assert 15 <= sum(map(len, first.values())) < 30
    torn = record_path(out, "triviaqa", "deepen:bytes")
    with torn.open("ab") as file:
        file.write(b'{"index": 5, "output": "half a li')

    with start(data, out, folders) as process:
        table, messages = process.communicate()
    assert process.returncode == 0, messages
    assert "triviaqa (task 2 of 2): 15 of 15 answers, about 0 s left, 100% of all" in messages
    assert re.search(r"triviaqa .*deepen:bytes .* 5 ", table)
    assert item_lines(out) == lines
    assert all(lines[name][: len(own)] == own for name, own in first.items())
    summary = json.loads((out / "summary.json").read_text())
    assert timeless(summary) == timeless(json.loads((unbroken / "summary.json").read_text()))
    assert summary == json.loads(json.dumps(summarise(out).as_dict()))
    assert timeless(summarise(out).as_dict()) == timeless(expected.as_dict())


def test_an_interrupt_leaves_whole_files_and_says_how_to_go_on(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in this process, with the models that the tests have loaded already."""
    monkeypatch.setattr(command, "load_ensemble", lambda *_, **__: ensembles["deepen:bytes"])

    ended = threading.Event()

    def press() -> None:
        while items_on_disk(tmp_path) < 4:
            if ended.wait(0.005):
                return
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in the background
    finger = threading.Thread(target=press)
    finger.start()
    try:
        options = ["--data", str(data), "--json", str(tmp_path), "--batch-size", "2", "--demo", "--fresh"]
        done = CliRunner().invoke(app, ["eval", "--task", "triviaqa", "--recipe", "bytes", *options])
    finally:
        ended.set()
        finger.join()
        signal.signal(signal.SIGINT, handler)
    assert done.exit_code == 130
    assert f"what is done is kept in {tmp_path}; the same command without --fresh goes on" in done.stderr
    assert 4 <= sum(map(len, item_lines(tmp_path).values())) < 18
    assert all(path.read_bytes().endswith(b"\n") for path in tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "nope"], "error: nope: no such task; there are gsm8k"),
        (["--task", "piqa"], "error: there is no .*piqa/test.jsonl"),
        (["--task", "triviaqa", "--split", "dev"], "error: there is no .*dev.jsonl; that folder has demos"),
        (["--task", "triviaqa", "--limit", "0"], "--limit"),
        (["--task", "triviaqa", "--fuser", "nope"], "error: fuser 'nope'"),
        (["--task", "triviaqa", "--fuser", "single"], "error: --fuser single: each model runs alone anyway"),
        (
            ["--task", "piqa", "--scoring", "likelihood", "--fuser", "spans"],
            "error: fuser='spans' chooses whole words",
        ),
        (
            ["--task", "piqa", "--scoring", "likelihood", "--fuser", "vote"],
            "error: --fuser vote: texts vote, and --scoring likelihood writes none",
        ),
        (
            ["--task", "triviaqa", "--preset", "SINGLE"],
            "error: the preset's fuser is single, .* give --fuser",
        ),
        (["--task", "triviaqa", "--json", __file__], "error: .*: a file; results are a folder"),
        (["--task", "triviaqa"], "error: /no/such: no such file or folder"),
    ],
)
def test_wrong_input_is_told_before_a_model_is_loaded(
    data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    """Or the missing models would be what is told."""
    preset = tmp_path / "single.yaml"
    preset.write_text("members: [/no/such, /no/other]\nfuser: single\n")
    options = [str(preset) if one == "SINGLE" else one for one in options]
    out = [] if "--json" in options else ["--json", str(tmp_path / "out")]
    models = ["--model", "/no/such", "--model", "/no/other"]
    done = CliRunner().invoke(app, ["eval", "--data", str(data), *models, *out, *options])
    assert done.exit_code == 2
    assert re.search(message, done.stderr)


def test_one_model_without_itself_is_told_before_it_is_loaded(data: Path, tmp_path: Path) -> None:
    options = ["--data", str(data), "--task", "triviaqa", "--json", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["eval", "--model", "/no/such", *options, "--no-singles"])
    assert done.exit_code == 2
    assert "error: --no-singles leaves nothing of one model; leave it out" in done.stderr


def test_a_preset_of_one_model_runs_it_alone(one_byte_folders: list[Path], tmp_path: Path) -> None:
    """As `--model` does; with `fuser: single` it was told to fuse, which one model cannot."""
    (tmp_path / "one.yaml").write_text(f"members: [{one_byte_folders[0]}]\nfuser: single\n")
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq" / "test.jsonl").write_text(
        '{"question": "who wrote hamlet", "answer": ["Shakespeare"]}\n'
    )
    (tmp_path / "nq" / "demos.jsonl").write_text('{"question": "who wrote faust", "answer": "Goethe"}\n')
    options = ["--data", str(tmp_path), "--task", "nq", "--json", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["eval", "--preset", str(tmp_path / "one.yaml"), *options])
    assert done.exit_code == 0, done.stderr
    assert [one.name for one in (tmp_path / "out").glob("*.jsonl")] == ["nq.tiny-1.jsonl"]


# The function


def test_progress_limit_and_a_configuration_added_later(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
) -> None:
    told: list[Progress] = []
    singles = {name: ensembles[name] for name in (tiny_smollm2.name, tiny_gemma.name)}
    summary = evaluate(singles, TASKS, data, out=tmp_path, limit=3, batch_size=2, on_progress=told.append)
    assert [one.index for one in RecordFile.read(record_path(tmp_path, "triviaqa", tiny_gemma.name))[1]] == [
        0,
        2,
        4,
    ]
    assert all(one.against_best_single is None for one in summary.tasks["triviaqa"].configurations.values())
    shares = [one.share for one in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)
    assert told[0].seconds_left is None
    assert all((one.seconds_left or 0) > 0 for one in told[1:-1])
    assert told[-1].seconds_left == 0
    assert [(one.task, one.done) for one in told if one.done == one.records] == [(task, 6) for task in TASKS]

    before = item_lines(tmp_path)
    more = evaluate(
        {"average": ensembles["average"], **singles}, "triviaqa", data, out=tmp_path, limit=3, batch_size=3
    )
    assert list(more.tasks) == list(TASKS)  # all that the folder holds
    assert more.tasks["triviaqa"].configurations["average"].against_best_single is not None
    assert {name: lines for name, lines in item_lines(tmp_path).items() if name in before} == before
    with pytest.raises(InputError, match=r"holds results of another run: task.items is 3 there and 6 now"):
        evaluate(singles, "triviaqa", data, out=tmp_path, batch_size=2)
    assert len(evaluate(singles, "arc_challenge", data, out=tmp_path, fresh=True).tasks) == 2
    assert len(item_lines(tmp_path)["arc_challenge.tiny-gemma.jsonl"]) == 6


def test_shared_forwards_and_the_certified_skip_change_no_text(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble]
) -> None:
    some = {name: ensembles[name] for name in ("deepen:bytes", "average")}
    evaluate(some, "triviaqa", data, out=tmp_path / "shared", limit=4, batch_size=4)
    summary = evaluate(
        some,
        "triviaqa",
        data,
        out=tmp_path / "own",
        limit=4,
        batch_size=4,
        share_forwards=False,
        certified_skip=True,
    )
    assert item_lines(tmp_path / "own") == item_lines(tmp_path / "shared")
    scores = summary.tasks["triviaqa"].configurations
    assert all(one.timing.ms_per_token for one in scores.values())
    assert all(one.against_best_single is None for one in scores.values())  # nothing to compare with
    skips = {
        name: RecordFile.read(record_path(tmp_path / "own", "triviaqa", name))[0]["configuration"]  # type: ignore[index]
        for name in scores
    }
    assert {name: one["certified_skip"] for name, one in skips.items()} == {
        "deepen:bytes": True,
        "average": False,
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["average"], r"search, which average has not; leave it out, or give an ensemble of fuser=.deepen."),
        (["tiny-gemma", "average"], "search, which single and average have not; leave it out"),
    ],
)
def test_a_certified_skip_that_nothing_can_make(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble], names: list[str], message: str
) -> None:
    some = {name: ensembles[name] for name in names}
    with pytest.raises(InputError, match=message):
        evaluate(some, "triviaqa", data, out=tmp_path, certified_skip=True)


@pytest.mark.parametrize("names", [("average",), ("deepen:bytes", "average")], ids=len)
def test_what_was_said_is_kept_for_others_only(
    data: Path,
    tmp_path: Path,
    ensembles: dict[str, Ensemble],
    monkeypatch: pytest.MonkeyPatch,
    names: Sequence[str],
) -> None:
    kept = []
    keep = SharedForwards.keep
    monkeypatch.setattr(SharedForwards, "keep", lambda *args: (kept.append(args), keep(*args)))
    evaluate({name: ensembles[name] for name in names}, "triviaqa", data, out=tmp_path, limit=2)
    assert bool(kept) == (len(names) > 1)


def test_where_a_long_answer_ends_the_next_item_begins(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are those of batches; a chunk that was ended half way is run again, to the same lines."""
    some = {name: ensembles[name] for name in ("tiny-smollm2", "deepen:bytes")}
    evaluate(some, "triviaqa", data, out=tmp_path / "batches", limit=4, batch_size=2)
    runs: list[tuple[int, int]] = []
    generate = Ensemble.generate

    def watched(self: Ensemble, prompts: list[str], **settings: Any) -> Any:
        runs.append((len(prompts), settings["batch_size"]))
        return generate(self, prompts, **settings)

    monkeypatch.setattr(Ensemble, "generate", watched)
    monkeypatch.setattr("deepen_ext.measure.evaluation.runner._LONG", 1)
    summary = evaluate(some, "triviaqa", data, out=tmp_path / "long", limit=4, batch_size=2)
    assert runs == [(4, 2)] * 2
    lines = item_lines(tmp_path / "batches")
    assert item_lines(tmp_path / "long") == lines
    record_path(tmp_path / "long", "triviaqa", "deepen:bytes").unlink()
    again = evaluate(some, "triviaqa", data, out=tmp_path / "long", limit=4, batch_size=2)
    assert runs == [(4, 2)] * 4
    assert item_lines(tmp_path / "long") == lines
    assert timeless(asdict(again)) == timeless(asdict(summary))


def test_what_cannot_be_evaluated(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble], tiny_gemma: Member
) -> None:
    small = Ensemble([changed(tiny_gemma, context_length=40)], fuser="single")
    with pytest.raises(
        InputError, match=r"triviaqa, item 0: the prompt's \d+ tokens of tiny-gemma.*of 40; leave"
    ):
        evaluate({"small": small}, "triviaqa", data, out=tmp_path)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate({}, "triviaqa", data, out=tmp_path)
    with pytest.raises(InputError, match="batch size is 0"):
        evaluate(ensembles, "triviaqa", data, out=tmp_path, batch_size=0)
    spans = {"spans": ensembles["average"].variant(fuser="spans")}
    with pytest.raises(InputError, match="there is no likelihood"):
        evaluate(spans, "arc_challenge", data, out=tmp_path, scoring="likelihood")
    twins = {"a b": ensembles["average"], "a?b": ensembles["average"]}
    with pytest.raises(InputError, match="would have the same file"):
        evaluate(twins, "triviaqa", data, out=tmp_path)
    with pytest.raises(InputError, match=r"^'aaa.*a\.\.\.: its results' file .* give that model's folder"):
        evaluate({"a" * 250: ensembles["average"]}, "triviaqa", data, out=tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
    (tmp_path / "triviaqa.average.jsonl").mkdir()
    with pytest.raises(InputError, match=r"triviaqa\.average\.jsonl: cannot be removed \(.*; remove it"):
        evaluate({"average": ensembles["average"]}, "triviaqa", data, out=tmp_path, fresh=True)
    (tmp_path / "triviaqa.average.jsonl").rmdir()
    os.mkfifo(tmp_path / "triviaqa.average.jsonl")  # reading it would wait for ever
    with pytest.raises(InputError, match=r"a pipe or a device, and no file of results; remove it"):
        prepare(["triviaqa"], data, "test", None, tmp_path)
    (tmp_path / "triviaqa.average.jsonl").unlink()
    with pytest.raises(InputError, match="there is no task"):
        prepare([], data, "test", None, tmp_path)
    with (
        output_folder(tmp_path),
        pytest.raises(InputError, match="another evaluation is writing there"),
        output_folder(tmp_path),
    ):
        pass
    with pytest.raises(InputError, match="there are no results"):
        summarise(tmp_path)


def test_a_batch_that_does_not_fit_the_memory_is_told_before_anything_is_run(
    data: Path, tmp_path: Path, tiny_smollm2: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [tiny_smollm2, changed(tiny_smollm2, name="twin")]
    ensembles = {one.name: Ensemble([one], fuser="single") for one in members}
    ensembles["average"] = Ensemble(members, fuser="average")
    longest = 48  # tokens of the longest prompt with its new ones
    free = sum(one.backend.bytes_needed(3, longest)[one.device] for one in members)
    monkeypatch.setattr("deepen_ext.members.memory.available_bytes", lambda device: free)
    with pytest.raises(
        InputError,
        match=r"triviaqa: 6 prompts at a time, .* long, need about 0\.\d GB on cpu .* are free; "
        r"choose a batch size of 3 or less \(--batch-size\)",
    ):
        evaluate(ensembles, "triviaqa", data, out=tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
    # Without shared forwards one ensemble's caches are there at a time, here a single member's.
    alone = {one.name: ensembles[one.name] for one in members}
    summary = evaluate(
        alone, "arc_challenge", data, out=tmp_path, batch_size=4, share_forwards=False, limit=4
    )
    assert {one.n for one in summary.tasks["arc_challenge"].configurations.values()} == {4}
    monkeypatch.setattr("deepen_ext.members.memory.available_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="leave out the task"):
        evaluate(alone, "triviaqa", data, out=tmp_path)
    # What is done needs no memory: the same command again gives its summary.
    again = evaluate(alone, "arc_challenge", data, out=tmp_path, batch_size=4, share_forwards=False, limit=4)
    assert again == summary


def test_the_header_tells_configurations_apart(
    ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
) -> None:
    def header(one: Ensemble) -> Header:
        return make_header({}, configuration_header("x", one, certified_skip=False, share_forwards=True))

    fused = ensembles["deepen:bytes"]
    others = [
        ensembles["average"],
        ensembles[tiny_gemma.name],
        ensembles[tiny_smollm2.name],
        Ensemble([tiny_gemma, tiny_smollm2], fuser="deepen"),
        fused.variant(fuser="auto"),
        fused.variant(fuser="auto", learning_rate=0.2),
        fused.variant(weights=[0.7, 0.3]),
        fused.variant(learning_rate=0.2),
        fused.variant(steps=4),
        fused.variant(confidence=0.5),
        fused.variant(weights="prompt"),
        fused.variant(candidates=64),
        fused.variant(boundary_aware=False),
        fused.variant(recipe="calibrated", relative_temperature=20.0),
        Ensemble([replace(tiny_smollm2, eos_ids=(0, 2)), tiny_gemma], fuser="deepen"),
    ]
    headers = [json.dumps(header(one)) for one in [fused, *others]]
    assert len(set(headers)) == len(headers)
    assert header(fused) == header(Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen"))
    # A rule that lets the main model write alone: the search moved its logits there, in earlier files.
    ruled = [fused.variant(weighing="disagreement", fuser=name) for name in ("deepen", "follow", "average")]
    marked = ["alone_as_it_is" in header(one)["configuration"]["fuser"] for one in ruled]
    assert marked == [True, True, False]
    # An assistant that counts more than the main model sat out, in earlier files.
    weighed = [{"weights": [0.4, 0.6]}, {"weights": "prompt"}, {"weights": [0.6, 0.4]}, {}]
    shares = ["boundary_shares" in header(fused.variant(**one))["configuration"] for one in weighed]
    assert shares == [True, True, False, False]
    assert (
        "boundary_shares"
        not in header(fused.variant(weights="prompt", boundary_aware=False))["configuration"]
    )
    # What a variant was made from is no part of what it is.
    by_way_of_deepen = fused.variant(fuser="union-topk")
    assert header(by_way_of_deepen) == header(
        Ensemble([tiny_smollm2, tiny_gemma], fuser="union-topk", recipe="bytes")
    )


def test_functions_of_one_name_are_two_configurations(ensembles: dict[str, Ensemble]) -> None:
    """`--fuser a:fuse` and then `--fuser b:fuse` into one folder: the second run must not show the first."""

    def header(module: str) -> Header:
        def fuse(logits: torch.Tensor, said: object, weights: torch.Tensor) -> torch.Tensor:
            return logits

        fuse.__module__, fuse.__qualname__ = module, "fuse"
        one = ensembles["average"].variant(fuser=fuse)
        return make_header({}, configuration_header("fuse", one, certified_skip=False, share_forwards=True))

    assert header("a") == header("a")
    with pytest.raises(InputError, match=r"configuration\.fuser\.function is .a:fuse. there and .b:fuse."):
        check_same(Path("file"), header("a"), header("b"))
    assert header("a")["configuration"]["method"] == "fuse"  # what tables call it


# Records and summaries, without models


def member_header(name: str) -> dict[str, Any]:
    return {"name": name, "vocabulary": f"v{name}", "weights": f"w{name}"}


def file_header(name: str, members: str, items: int = 4, task: str = "nq") -> Header:
    configuration = {
        "name": name,
        "method": "single" if len(members) == 1 else name,
        "members": [member_header(one) for one in members],
        "weights": [1 / len(members)] * len(members),
        "share_forwards": False,
    }
    return make_header({"name": task, "split": "dev", "items": items, "items_sha256": "0"}, configuration)


def record(index: int, correct: bool, **other: Any) -> ItemRecord:
    return replace(
        ItemRecord(index, "some text\u2028\n", "x", correct, 3, 1, "length", ItemTiming(10.0, 8.0, 2)),
        **other,
    )


def write(folder: Path, header: Header, correct: list[bool], order: list[int] | None = None) -> Path:
    path = record_path(folder, header["task"]["name"], header["configuration"]["name"])
    with RecordFile(path, header) as file:
        for index in order or range(len(correct)):
            file.append([record(index, correct[index])])
    return path


@pytest.mark.parametrize(
    "tail", [b"", b'{"index": 2, "outp', b"\x00" * 40, b'{"index": 2, "output": "\xff"}\n', b"\x00\x00\n"]
)
def test_a_torn_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    header = file_header("a", "A")
    path = write(tmp_path, header, [True, False])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with RecordFile(path, header) as file:
        assert file.done == {0, 1}
        assert path.read_bytes() == whole
        file.append([record(2, True), record(3, True)])
    assert [one.index for one in RecordFile.read(path)[1]] == [0, 1, 2, 3]
    assert RecordFile.read(path)[1][1] == record(1, False)


def test_a_torn_header_is_begun_anew(tmp_path: Path) -> None:
    header = file_header("a", "A")
    path = write(tmp_path, header, [True])
    path.write_bytes(path.read_bytes()[:50])
    with RecordFile(path, header) as file:
        assert not file.done
    assert RecordFile.read(path)[:2] == (header, [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:1], b"{", *lines[2:]], "line 2 is damaged"),
        (lambda lines: [*lines, lines[1]], "an item is there twice"),
        (lambda lines: [lines[0], lines[0], *lines[1:]], "line 2 is damaged"),
        (lambda lines: lines[1:], "line 1 is damaged"),
        (lambda lines: [lines[0], b'{"index": 0}', *lines[2:]], "other fields"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    header = file_header("a", "A")
    path = write(tmp_path, header, [True, False, True])
    path.write_bytes(b"".join(line + b"\n" for line in damage(path.read_bytes().split(b"\n")[:-1])))
    with pytest.raises(InputError, match=rf"{message}.*--fresh"):
        RecordFile(path, header)


def test_another_run_is_refused_and_told_by_what_differs(tmp_path: Path) -> None:
    path = write(tmp_path, file_header("a", "AB"), [True])
    other = file_header("a", "AC")
    other["configuration"]["weights"] = [0.3, 0.7]
    with pytest.raises(InputError) as raised:
        RecordFile(path, other)
    message = str(raised.value)
    assert 'configuration.members 2.name is "B" there and "C" now' in message
    assert "configuration.weights is [0.5, 0.5] there and [0.3, 0.7] now" in message
    assert "members 1" not in message
    assert "--fresh" in message


def test_the_backend_is_part_of_what_a_run_is(
    tmp_path: Path, tiny_smollm2: Member, ensembles: dict[str, Ensemble]
) -> None:
    own = configuration_header("x", ensembles[tiny_smollm2.name], certified_skip=False, share_forwards=True)
    assert [one["backend"] for one in own["members"]] == [f"transformers {transformers.__version__}"]
    now = file_header("a", "AB")
    for member in now["configuration"]["members"]:
        member["backend"] = "transformers 5.0"
    earlier = write(tmp_path, file_header("a", "AB"), [True])  # of a version that did not say it
    with RecordFile(earlier, now) as file:
        assert file.done == {0}
    other = json.loads(json.dumps(now))
    other["configuration"]["members"][1]["backend"] = "llama.cpp b1"
    there = write(tmp_path, now | {"task": {**now["task"], "name": "piqa"}}, [True])
    message = r'configuration.members 2.backend is "transformers 5.0" there and "llama.cpp b1" now'
    with pytest.raises(InputError, match=message):
        RecordFile(there, other | {"task": {**now["task"], "name": "piqa"}})


def test_the_summary_of_handwritten_results(tmp_path: Path) -> None:
    """AB beside its best single A, AC without the single C, AD unfinished; items in any order."""
    a, b = [True, True, False, False], [False, False, False, True]
    fused = [True, True, True, False]
    write(tmp_path, file_header("a", "A"), a, order=[3, 1, 0, 2])
    write(tmp_path, file_header("b", "B"), b)
    write(tmp_path, file_header("BA fused", "BA"), fused, order=[2, 3, 0, 1])
    write(tmp_path, file_header("AC fused", "AC"), fused)
    write(tmp_path, file_header("AD fused", "AD"), fused[:3])
    write(tmp_path, file_header("AB", "AB", task="piqa"), fused)
    (tmp_path / "nq.torn.jsonl").write_bytes(b'{"format": 1')

    summary = summarise(tmp_path)
    assert list(summary.tasks) == ["piqa", "nq"]
    of_task = summary.tasks["nq"]
    assert list(of_task.configurations) == ["a", "b", "AC fused", "BA fused"]
    assert of_task.unfinished == {"AD fused": 3}
    score = of_task.configurations["BA fused"]
    assert (score.n, score.correct, score.accuracy) == (4, 3, 0.75)
    assert score.interval == wilson_interval(3, 4)
    assert (score.tokens, score.changed_share, score.unanswered_share) == (12, 1 / 3, 0.0)
    assert asdict(score.timing) == {"seconds": 0.072, "ms_per_token": 4.0, "shared_forwards": False}
    paired = score.against_best_single
    assert paired is not None
    expected = mcnemar(fused, a)
    assert (paired.configuration, paired.gained, paired.lost) == ("a", 1, 0)
    assert (paired.difference, paired.p_value) == (expected.difference, expected.p_value) == (0.25, 1.0)
    assert paired.interval == (expected.low, expected.high)
    assert of_task.configurations["AC fused"].against_best_single is None
    assert summary.tasks["piqa"].configurations["AB"].against_best_single is None
    assert summary_table(summary).row_count == 6

    write(tmp_path, file_header("AE", "AE", items=5), fused)
    with pytest.raises(InputError, match=r"task\.items is"):
        summarise(tmp_path)


def test_answers_that_are_missing_are_counted(tmp_path: Path) -> None:
    header = file_header("a", "A", items=2)
    path = record_path(tmp_path, "nq", "a")
    with RecordFile(path, header) as file:
        file.append([record(0, True, tokens=1), record(1, False, answer=None, tokens=1, finish_reason="eos")])
    score = summarise(tmp_path).tasks["nq"].configurations["a"]
    assert score.unanswered_share == 0.5
    assert score.finish_reasons == {"eos": 1, "length": 1}
    assert score.timing.ms_per_token is None


def test_file_names(tmp_path: Path) -> None:
    assert record_path(tmp_path, "nq", "org/A+B deepen:bytes").name == "nq.org_A+B_deepen_bytes.jsonl"
    assert os.path.commonpath([record_path(tmp_path, "nq", "../../x"), tmp_path]) == str(tmp_path)
