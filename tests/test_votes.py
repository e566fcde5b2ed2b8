"""Votes in evaluation: the majority, the texts that vote, and what their files and summaries say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import AWKWARD, PROSE, tiny_reader
from typer.testing import CliRunner

from deepen_ext import Ensemble, InputError
from deepen_ext.commands.cli import app
from deepen_ext.measure.evaluation.records import ItemRecord, ItemTiming, RecordFile, record_path
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.measure.evaluation.summary import summarise
from deepen_ext.measure.evaluation.summary_table import summary_table
from deepen_ext.measure.evaluation.tasks import TASKS, Item
from deepen_ext.measure.evaluation.votes import Poll, Votes, counted, majority
from deepen_ext.members.member import Member

QUESTIONS = [
    ("What is the capital of France?", ["Paris"]),
    ("How many legs has a spider?", ["eight", "8"]),
    ("Which metal is liquid at room temperature?", ["mercury"]),
    ("What colour is a ripe banana?", ["yellow"]),
    ("Who wrote Hamlet?", ["William Shakespeare", "Shakespeare"]),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    task = folder / "triviaqa"
    task.mkdir()
    lines = [json.dumps({"question": question, "answer": answers}) for question, answers in QUESTIONS]
    (task / "test.jsonl").write_text("\n".join(lines) + "\n")
    (task / "demos.jsonl").write_text('{"question": "What is the capital of Italy?", "answer": "Rome"}\n')
    return folder


@pytest.fixture(scope="module")
def ensembles(tiny_smollm2: Member) -> dict[str, Ensemble | Poll]:
    other = tiny_reader(tiny_smollm2, "tiny-other", AWKWARD + PROSE[1200:], seed=4)
    return {
        "a": Ensemble([tiny_smollm2], fuser="single"),
        "b": Ensemble([other], fuser="single"),
        "average": Ensemble([tiny_smollm2, other], fuser="average"),
        "vote": Poll(("a", "b")),
    }


def records(folder: Path, name: str) -> list[ItemRecord]:
    return RecordFile.read(record_path(folder, "triviaqa", name))[1]


def timeless(folder: Path) -> dict[str, list[ItemRecord]]:
    """All records by file, without what the clock said."""
    none = ItemTiming(0, 0, 1)
    return {
        path.name: [replace(one, timing=none) for one in RecordFile.read(path)[1]]
        for path in sorted(folder.glob("*.jsonl"))
    }


# Who wins


@pytest.mark.parametrize(
    ("task", "answers", "winner"),
    [
        ("gsm8k", ["12", "18", "18"], 1),
        ("gsm8k", ["12", "18", "18", "12"], 0),  # a tie: the answer that came first
        ("gsm8k", ["7", "12", "18", "18", "12"], 1),
        ("gsm8k", [None, None, "5", None], 2),  # silence is no answer
        ("gsm8k", [None, None], None),
        ("triviaqa", ["Rome", "The Beatles!", "beatles", "Paris"], 1),
        ("triviaqa", ["a+", "--", "--"], 1),  # nothing is left when normalised, and they are two answers
        ("mmlu", ["A", "B", None, "B"], 1),
    ],
)
def test_the_majority(task: str, answers: list[str | None], winner: int | None) -> None:
    assert majority(TASKS[task], answers) == winner


def test_one_record_of_several() -> None:
    task, item = TASKS["gsm8k"], Item(3, "?", ("18",), {})

    def record(output: str, **other: Any) -> ItemRecord:
        timing = ItemTiming(1.0, 2.0, 4)
        one = ItemRecord(3, output, task.answer(output), task.correct(output, item), 5, 1, "eos", timing)
        return replace(one, **other)

    texts = [record("none"), record("It is 12."), record("so 18", finish_reason="length"), record("$18.00")]
    texts[0] = replace(texts[0], timing=ItemTiming(1.0, 2.0, 3))  # a batch with fewer texts
    found = counted(task, item, texts)
    assert (found.index, found.output, found.answer, found.correct) == (3, "so 18", "18", True)
    assert (found.tokens, found.changed, found.finish_reason) == (20, 4, "length")
    assert found.timing == ItemTiming(4.0, 8.0, 4)
    assert [one.answer for one in found.votes] == [None, "12", "18", "18"]
    # A record of votes that votes has all of them: 18, 18 and then 12, 12, 12.
    again = counted(task, item, [found, *[record("12")] * 2])
    assert (again.answer, again.correct, len(again.votes)) == ("12", False, 6)
    silent = counted(task, item, texts[:1] * 2)
    assert (silent.output, silent.answer, silent.correct) == ("none", None, False)


# What votes


def test_a_text_depends_on_its_seed_alone(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble | Poll]
) -> None:
    """Not on the batch size, nor on the number of votes, nor on who shares forwards."""
    few = evaluate(ensembles, "triviaqa", data, out=tmp_path / "few", votes=3, batch_size=4)
    evaluate(ensembles, "triviaqa", data, out=tmp_path / "many", votes=5, batch_size=64)
    evaluate(ensembles, "triviaqa", data, out=tmp_path / "own", votes=3, batch_size=2, share_forwards=False)
    three, five, own = (timeless(tmp_path / name) for name in ("few", "many", "own"))
    assert three == own
    for name in ("a", "b", "average"):
        file = record_path(tmp_path, "triviaqa", name).name
        votes = [record.votes for record in three[file]]
        assert votes == [record.votes[:3] for record in five[file]]
        assert len({vote.output for own in votes for vote in own}) > 10  # of 15
        # The same random numbers for every item would be no votes.
        assert all(len({vote.output for vote in own}) > 1 for own in votes)
    evaluate(ensembles, "triviaqa", data, out=tmp_path / "other", votes=3, seed=1)
    assert timeless(tmp_path / "other") != three

    score = few.tasks["triviaqa"].configurations["average"]
    assert (score.n, score.votes) == (5, 3)
    assert sum(score.finish_reasons.values()) == 15
    assert score.tokens == sum(
        vote.tokens for one in records(tmp_path / "few", "average") for vote in one.votes
    )
    assert list(summary_table(few).columns[3].cells) == ["3", "3", "3", "6"]


def test_members_answers_vote(data: Path, tmp_path: Path, ensembles: dict[str, Ensemble | Poll]) -> None:
    """Greedy answers, and votes; the main model's come first. And those of an ensemble with its members."""
    polls = {**ensembles, "three": Poll(("average", "a", "b"))}
    summary = evaluate(polls, "triviaqa", data, out=tmp_path / "greedy", limit=3)
    votes = records(tmp_path / "greedy", "three")
    written = [records(tmp_path / "greedy", one) for one in ("average", "a", "b")]
    for voted, *voters in zip(votes, *written, strict=True):
        assert [vote.output for vote in voted.votes] == [one.output for one in voters]
        assert voted.tokens == sum(one.tokens for one in voters)
        assert voted.answer == (voters[1] if voters[1].answer == voters[2].answer else voters[0]).answer
    score = summary.tasks["triviaqa"].configurations["vote"]
    assert (score.method, score.votes, score.members) == ("vote", 2, ["tiny-smollm2", "tiny-other"])
    assert score.against_best_single is not None
    assert summary.tasks["triviaqa"].configurations["three"].members == ["tiny-smollm2", "tiny-other"]
    # Of two greedy answers the main model's wins.
    assert [one.answer for one in records(tmp_path / "greedy", "vote")] == [
        one.answer for one in records(tmp_path / "greedy", "a")
    ]
    evaluate(ensembles, "triviaqa", data, out=tmp_path / "votes", limit=3, votes=2)
    first, second = (records(tmp_path / "votes", one)[0].votes for one in "ab")
    assert records(tmp_path / "votes", "vote")[0].votes == first + second


def test_gone_on_with_after_a_kill(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble | Poll], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second configuration fails in the second batch; a line is torn."""
    evaluate(ensembles, "triviaqa", data, out=tmp_path / "whole", votes=3, batch_size=6)
    generate, calls = Ensemble.generate, 0

    def dies(self: Ensemble, prompts: list[str], **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return generate(self, prompts, **settings)

    monkeypatch.setattr(Ensemble, "generate", dies)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        evaluate(ensembles, "triviaqa", data, out=out, votes=3, batch_size=6)
    assert {name: len(own) for name, own in timeless(out).items()} == {
        "triviaqa.a.jsonl": 4,
        "triviaqa.average.jsonl": 2,
        "triviaqa.b.jsonl": 2,
        "triviaqa.vote.jsonl": 0,
    }
    with record_path(out, "triviaqa", "b").open("ab") as file:
        file.write(b'{"index": 2, "outp')
    again = evaluate(ensembles, "triviaqa", data, out=out, votes=3, batch_size=6)
    assert timeless(out) == timeless(tmp_path / "whole")
    assert again.tasks["triviaqa"].configurations.keys() == ensembles.keys()
    assert again == summarise(out)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"votes": 0}, "votes is 0; choose 1 or more"),
        ({"votes": 2.5}, "votes is 2.5; give a whole number"),
        ({"votes": 3, "temperature": 0.0}, "temperature is 0.0; choose .* all votes would be the same text"),
        ({"votes": 3, "top_p": 1.5}, "top_p is 1.5"),
        ({"votes": 3, "seed": "x"}, "seed is 'x'"),
        ({"temperature": 0.5}, "temperature: one text an item is written greedily; give votes=2"),
        ({"top_p": 0.5, "seed": 1}, "top_p and seed: one text .* or leave them out"),
        ({"votes": 3, "certified_skip": True}, "certified_skip holds for greedy decoding only"),
    ],
)
def test_settings_that_are_refused(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble | Poll], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(ensembles, "triviaqa", data, out=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("voters", "message"),
    [
        (("a",), "poll: a vote takes two or more configurations"),
        (("a", "a"), "each named once"),
        (("a", "c"), "poll: no configuration c writes answers in this call; there are a, b, average"),
        (("a", "vote"), "no configuration vote writes answers"),
    ],
)
def test_polls_that_are_refused(
    data: Path,
    tmp_path: Path,
    ensembles: dict[str, Ensemble | Poll],
    voters: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate({**ensembles, "poll": Poll(voters)}, "triviaqa", data, out=tmp_path)


@pytest.mark.parametrize(
    ("fuser", "votes", "message"),
    [("draw", 1, "'draw' is a way to sample, .* give votes=2"), ("spans", 2, "'spans' .* leave out votes")],
)
def test_fusers_that_do_not_go_with_votes_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble | Poll], fuser: str, votes: int, message: str
) -> None:
    average = ensembles["average"]
    assert isinstance(average, Ensemble)
    some = {"a": ensembles["a"], fuser: average.variant(fuser=fuser)}
    with pytest.raises(InputError, match=message):
        evaluate(some, "triviaqa", data, out=tmp_path, votes=votes)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_votes_is_refused(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble | Poll]
) -> None:
    evaluate(ensembles, "triviaqa", data, out=tmp_path, votes=2, limit=1)
    for settings, differs in [
        ({"votes": 3}, "task.votes.count is 2 there and 3 now"),
        ({"votes": 2, "temperature": 0.5}, "task.votes.temperature is 0.7 there and 0.5 now"),
        ({"votes": 2, "seed": 5}, "task.votes.seed is 0 there and 5 now"),
        ({}, "task.votes.count is 2 there and null now"),
    ]:
        with pytest.raises(InputError, match=differs):
            evaluate({"new": ensembles["a"]}, "triviaqa", data, out=tmp_path, limit=1, **settings)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.pop("votes"),
        lambda line: line["votes"].pop(),
        lambda line: line["votes"][0].pop("tokens"),
        lambda line: line["votes"][0].update(more=1),
        lambda line: line["votes"][1].update(answer=3),
    ],
)
def test_a_line_without_its_votes_is_refused(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble | Poll], damage: Callable[[dict[str, Any]], Any]
) -> None:
    evaluate({"a": ensembles["a"]}, "triviaqa", data, out=tmp_path, votes=2, limit=2)
    path = record_path(tmp_path, "triviaqa", "a")
    header, *lines = map(json.loads, path.read_text().splitlines())
    damage(lines[0])
    path.write_text("".join(json.dumps(one) + "\n" for one in [header, *lines]))
    with pytest.raises(InputError, match="its lines have other fields"):
        summarise(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--votes", "0"], "--votes"),
        (["--temperature", "0.5"], "error: temperature: one text an item is written greedily"),
        (["--fuser", "average", "--fuser", "draw"], "error: fuser='draw' is a way to sample, and one text"),
        (["--fuser", "spans", "--votes", "3"], "error: fuser='spans' writes the most probable words, and"),
        (["--fuser", "vote", "--no-singles"], "error: --fuser vote: the models' own answers vote"),
    ],
)
def test_the_command_refuses_before_a_model_is_loaded(
    data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    models = ["--model", "/no/such", "--model", "/no/other"]
    done = CliRunner().invoke(
        app, ["eval", "--task", "triviaqa", "--data", str(data), "--json", str(tmp_path), *models, *options]
    )
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_command(
    data: Path, tmp_path: Path, ensembles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--fuser vote` beside a way of fusing, with votes; the same command again has nothing to do."""
    base = ensembles["average"]
    monkeypatch.setattr("deepen_ext.commands.evaluate.load_ensemble", lambda *_, **__: base)
    options = ["--demo", "--fuser", "average", "--fuser", "vote", "--votes", "2", "--seed", "7"]
    line = ["eval", "--task", "triviaqa", "--data", str(data), "--json", str(tmp_path), *options]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in sorted(tmp_path.glob("*.jsonl"))] == [
        f"triviaqa.{name}.jsonl" for name in ("average", "tiny-other", "tiny-smollm2", "vote")
    ]
    header, found, _ = RecordFile.read(record_path(tmp_path, "triviaqa", "vote"))
    assert header is not None
    assert Votes(**header["task"]["votes"]) == Votes(2, 0.7, 0.95, 7)
    assert [len(one.votes) for one in found] == [4] * 5
    before = timeless(tmp_path)
    assert CliRunner().invoke(app, line).exit_code == 0
    assert timeless(tmp_path) == before
    # The members' answers alone, without any way of fusing.
    line = [*line[:5], "--json", str(tmp_path / "poll"), "--demo", "--fuser", "vote"]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert {path.name for path in (tmp_path / "poll").glob("*.jsonl")} == {
        f"triviaqa.{name}.jsonl" for name in ("tiny-other", "tiny-smollm2", "vote")
    }
