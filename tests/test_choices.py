"""Choice tasks by likelihood: prompts and scores beside lm-evaluation-harness's own tasks and model, records,
runs that were ended, and what is refused.

`DEEPEN_CHOICE_ITEMS=200` compares so many items of each task of the benchmark data with the harness, and not
the few that are written out here, of which PIQA's alone go to the real models;
`DEEPEN_CHOICE_TASKS=arc_challenge` only those of this task."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when `datasets` is imported

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sessions import changed
from test_evaluation import file_header, item_lines, record, timeless
from test_likelihood import fed
from typer.testing import CliRunner

from deepen_ext import Ensemble, InputError
from deepen_ext.commands.cli import app
from deepen_ext.measure.evaluation.choice_scores import score_choices
from deepen_ext.measure.evaluation.choices import CHOICE_TASKS, ChoiceItem
from deepen_ext.measure.evaluation.headers import Header
from deepen_ext.measure.evaluation.jobs import Progress
from deepen_ext.measure.evaluation.records import (
    ChoiceRecord,
    ChoiceTiming,
    RecordFile,
    record_path,
)
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.measure.evaluation.scores import ChoiceScore
from deepen_ext.measure.evaluation.statistics import mcnemar, wilson_interval
from deepen_ext.measure.evaluation.summary import summarise
from deepen_ext.measure.evaluation.summary_table import summary_table
from deepen_ext.members.member import Member

HARNESS = Path(lm_eval.__file__).parent / "tasks"
SHARED = Path(__file__).parents[2] / "shared" / "data"
MANY = int(os.environ.get("DEEPEN_CHOICE_ITEMS", "0"))
TASKS = [one for one in CHOICE_TASKS if one in os.environ.get("DEEPEN_CHOICE_TASKS", ",".join(CHOICE_TASKS))]


def options(*texts: str) -> dict[str, str]:
    return dict(zip("ABCD", texts, strict=False))


ARC = [
    {"question": "What is frozen water called?", **options("ice", "steam", "rain", "fog"), "answer": "A"},
    {"question": "It has no options", **options("", "", "", ""), "answer": "2"},
    {"question": "Which lays eggs?", **options("a brown dog", "a hen", "a cow", ""), "answer": "B"},
    {
        "question": "Where is Zürich?",
        **options("Österreich", "Italy", "Suisse", "Rhône-Alpes"),
        "answer": "C",
    },
    {"question": "A metal is", **options("dry wood.", "glass.", "iron.", "wool."), "answer": "C"},
]
PIQA = [
    {"question": "ice box", "A": "can melt humans ", "B": "will keep soda cool", "answer": "B"},
    {"question": "To dry wet hands ", "A": "use a towel", "B": "use 30 °C hot oil", "answer": "A"},
    {"question": "How do I open a jar?", "A": "Hit it.", "B": "Turn the lid left.", "answer": "B"},
]
SUMS = [
    {"question": f"What is {n} + {n}?", **options(*map(str, (n, 2 * n, 3 * n, 4 * n))), "answer": "B"}
    | {"domain": "elementary mathematics"}
    for n in range(3, 11)
]
CAPITALS = [
    {"question": f"The capital of {country} is", **options(*cities), "answer": letter}
    | {"domain": "us foreign policy"}
    for country, cities, letter in (
        ("France", ("Paris", "Rome", "Bern", "Oslo"), "A"),
        ("Italy", ("Paris", "Rome", "Bern", "Oslo"), "B"),
        ("Norway", ("Paris", "Rome", "Bern", "Oslo"), "D"),
        ("Spain", ("Lisbon", "Rome", "Madrid", "Oslo"), "C"),
        ("Japan", ("Tokyo", "Seoul", "Hanoi", "Lima"), "A"),
        ("Peru", ("Tokyo", "Seoul", "Hanoi", "Lima"), "D"),
    )
]
DATA = {
    "arc_challenge": ([], ARC),
    "piqa": ([], PIQA),
    "mmlu": (SUMS[:5] + CAPITALS[:5], SUMS[5:7] + CAPITALS[5:]),
}


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    for task, (demos, items) in DATA.items():
        write_lines(folder / task / "test.jsonl", items)
        if demos:
            write_lines(folder / task / "demos.jsonl", demos)
    write_lines(folder / "gsm8k" / "test.jsonl", [{"question": "How many?", "answer": "It is 4"}])
    return folder


# Beside the harness


def harness_config(task: str, domain: str = "") -> dict[str, Any]:
    """The harness's own task, as its files have it."""
    files = {
        "arc_challenge": ["arc/arc_easy.yaml", "arc/arc_challenge.yaml"],
        "piqa": ["piqa/piqa.yaml"],
        "mmlu": [
            "mmlu/default/_default_template_yaml",
            f"mmlu/default/mmlu_{domain.replace(' ', '_')}.yaml",
        ],
    }
    config: dict[str, Any] = {}
    for file in files[task]:
        config |= yaml.safe_load((HARNESS / file).read_text())
    config.pop("include", None)
    return config


def harness_doc(task: str, fields: dict[str, Any]) -> dict[str, Any]:
    """An item in the fields of the data set that the harness would download."""
    if task == "piqa":
        goal = {"goal": fields["question"], "label": "AB".index(fields["answer"])}
        return goal | {"sol1": fields["A"], "sol2": fields["B"]}
    texts = [fields[letter] for letter in "ABCD" if fields[letter]]
    if task == "mmlu":
        right = "ABCD".index(fields["answer"])
        return {"question": fields["question"], "choices": texts, "answer": right}
    labels = list("ABCD"[: len(texts)])
    choices = {"text": texts, "label": labels}
    return {"question": fields["question"], "choices": choices, "answerKey": fields["answer"]}


def harness_samples(
    task: str, items: list[ChoiceItem], demos: list[dict[str, Any]], member: Member, folder: Path
) -> list[dict[str, Any]]:
    """What the harness makes of the items with its own tasks, prompts and HF model, in the items' order."""
    own = HFLM(pretrained=member.model, tokenizer=member.tokenizer, batch_size=8 if MANY else 1)
    found = []
    for domain in dict.fromkeys(str(item.fields.get("domain", "")) for item in items):
        some = [dict(item.fields) for item in items if item.fields.get("domain", "") == domain]
        shots = [harness_doc(task, one) for one in demos if one["domain"] == domain]
        config = harness_config(task, domain)
        splits = {"test": [harness_doc(task, one) for one in some]} | ({"dev": shots} if shots else {})
        for split, docs in splits.items():
            write_lines(folder / domain / f"{split}.jsonl", docs)
        kept = ("training_split", "validation_split", "test_split", "fewshot_split")
        config |= dict.fromkeys(kept) | {"test_split": "test"}
        if shots:
            config |= {"fewshot_split": "dev", "num_fewshot": 5}
        files = {split: str(folder / domain / f"{split}.jsonl") for split in splits}
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        config["metric_list"] = [{"metric": one} for one in ("acc", "acc_norm", "acc_bytes")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
            # Its own tasks are thousands of files, read anew for each call; `config` is all of this one.
            tasks = TaskManager(include_defaults=False)
            result = lm_eval.simple_evaluate(model=own, tasks=[config], task_manager=tasks, bootstrap_iters=0)
        (samples,) = result["samples"].values()
        found += sorted(samples, key=lambda sample: sample["doc_id"])
    return found


def beside_the_harness(task: str, data: Path, split: str, member: Member, folder: Path) -> int:
    """Compare every item; returns where dividing by characters would have chosen another one."""
    items, _ = CHOICE_TASKS[task].choice_items(data, split, MANY or None)
    demos_file = data / task / "demos.jsonl"
    demos = [json.loads(line) for line in demos_file.open()] if demos_file.exists() else []
    alone = {"alone": Ensemble([member], fuser="single")}
    records = [one for found in score_choices(items, alone, 16, shared=True) for one in found["alone"]]
    samples = harness_samples(task, items, demos, member, folder)
    assert len(items) == len(records) == len(samples) > 1
    differ = 0
    largest = 0.0
    for item, ours, theirs in zip(items, records, samples, strict=True):
        assert list(theirs["arguments"]) == [(item.prompt, f" {choice}") for choice in item.choices]
        scores = [one for one, _ in theirs["filtered_resps"]]
        # Ours are larger by what the special tokens would get that no text can have: some 1e-4 a token.
        assert ours.logprobs == pytest.approx(scores, abs=1e-3, rel=1e-4)
        pairs = zip(ours.logprobs, scores, strict=True)
        largest = max(largest, *(abs(one - other) for one, other in pairs if one is not None))
        assert (ours.correct, ours.correct_norm) == (theirs["acc"] == 1, theirs["acc_bytes"] == 1)
        differ += theirs["acc_bytes"] != theirs["acc_norm"]
        best = max(range(len(scores)), key=scores.__getitem__)
        assert ours.chosen == best
    both = [(one.correct, one.correct_norm) for one in records]
    acc, norm = (sum(column) / len(both) for column in zip(*both, strict=True))
    print(
        f"\n{task}, {member.name}: {len(items)} items, acc {acc:.3f}, acc_norm {norm:.3f}, largest "
        f"difference {largest:.1e} nats, characters instead of bytes change {differ}"
    )
    return differ


@contextmanager
def special_tokens_unlikely(member: Member) -> Iterator[None]:
    """They get next to nothing, as in a model that was trained: the harness counts them, and we do not."""
    special = [i for i, token in enumerate(member.vocabulary.tokens) if token is None]

    def lower(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(
            -1, torch.tensor(special), torch.full((*logits.shape[:-1], len(special)), -30.0)
        )

    hook = member.model.get_output_embeddings().register_forward_hook(lower)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["smollm2", "gemma"])  # Gemma's tokenizer puts BOS before every text
@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_scores_are_the_harness_own(
    task: str, name: str, data: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Prompts to the letter, log-likelihoods to 1e-3, and the same choices by both metrics."""
    real = MANY or task == "piqa"  # its prompts are short
    member = request.getfixturevalue(name if real else f"tiny_{name}")
    assert len(member.vocabulary.prefix_ids) == (name == "gemma")
    dev = "dev" if task != "piqa" else "test"
    with nullcontext() if real else special_tokens_unlikely(member):
        beside_the_harness(task, SHARED if MANY else data, dev if MANY else "test", member, tmp_path)


def test_descriptions_of_all_domains_are_the_harness_own() -> None:
    found = [
        yaml.safe_load(file.read_text())
        for file in sorted((HARNESS / "mmlu" / "default").glob("mmlu_*.yaml"))
    ]
    assert len(found) == 57
    for config in found:
        domain = config["dataset_name"].replace("_", " ")
        assert CHOICE_TASKS["mmlu"].instruction.format(domain=domain) == config["description"]
        assert harness_config("mmlu", domain)["task"] == config["task"]


# Items and choices


def test_items_without_choices_are_left_out(data: Path) -> None:
    items, left_out = CHOICE_TASKS["arc_challenge"].choice_items(data, "test", None)
    assert ([one.index for one in items], left_out) == ([0, 2, 3, 4], 1)
    assert items[1].choices == ("a brown dog", "a hen", "a cow")
    assert [one.right for one in items] == [0, 1, 2, 2]
    assert items[0].prompt == "Question: What is frozen water called?\nAnswer:"
    letters, none = CHOICE_TASKS["mmlu"].choice_items(data, "test", None)
    assert none == 0
    assert {one.choices for one in letters} == {("A", "B", "C", "D")}
    assert letters[0].prompt.count("\n\n") == 6
    assert letters[0].prompt.startswith(
        "The following are multiple choice questions (with answers) about ele"
    )
    assert letters[0].prompt.endswith("B. 16\nC. 24\nD. 32\nAnswer:")


def item(*choices: str, right: int = 0) -> ChoiceItem:
    return ChoiceItem(0, "Why?", ("A",), {}, choices, right)


def test_the_second_metric_is_by_bytes() -> None:
    """ "über" has four letters and five bytes."""
    scores = [-9.0, -10.0]
    assert item("iber", "über").chosen(scores, by_bytes=False) == 0
    assert item("iber", "über").chosen(scores, by_bytes=True) == 1
    assert scores[0] / len("iber") > scores[1] / len("über")  # by characters it would be the first
    assert item("a", "b").chosen([-1.0, -1.0], by_bytes=True) == 0  # the first of equals, as argmax
    assert item("a", "b").chosen([-math.inf, -3.0], by_bytes=False) == 1
    assert item("a", "b").chosen([-math.inf, -math.inf], by_bytes=False) is None


# Runs


@pytest.fixture(scope="module")
def ensembles(tiny_smollm2: Member, tiny_gemma: Member) -> dict[str, Ensemble]:
    fused = Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen", cache=False)
    return {
        "smol": Ensemble([tiny_smollm2], fuser="single"),
        "gemma": Ensemble([tiny_gemma], fuser="single"),
        "deepen": fused,
        "average": fused.variant(fuser="average"),
        "union": fused.variant(fuser="union-topk"),
        "default": fused.variant(fuser="auto"),
    }


def run(ensembles: dict[str, Ensemble], data: Path, out: Path, **settings: Any) -> Any:
    return evaluate(ensembles, list(CHOICE_TASKS), data, out=out, scoring="likelihood", **settings)


def test_an_ended_run_goes_on_to_the_same_lines(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble]
) -> None:
    whole = run(ensembles, data, tmp_path / "whole", batch_size=2)
    lines = item_lines(tmp_path / "whole")
    assert len(lines) == 18
    assert {name: len(own) for name, own in lines.items() if "smol" in name} == {
        "arc_challenge.smol.jsonl": 4,
        "mmlu.smol.jsonl": 3,
        "piqa.smol.jsonl": 3,
    }

    class Ended(Exception):
        """Half way through a task."""

    def end(one: Progress) -> None:
        if one.task == "piqa" and one.done == 8:
            raise Ended

    out = tmp_path / "ended"
    with pytest.raises(Ended):
        run(ensembles, data, out, batch_size=2, on_progress=end)
    assert 20 < sum(map(len, item_lines(out).values())) < 50
    with record_path(out, "piqa", "union").open("ab") as file:
        file.write(b'{"index": 2, "logprobs": [-1')
    again = run(ensembles, data, out, batch_size=2)
    assert item_lines(out) == lines
    assert timeless(asdict(again)) == timeless(asdict(whole))

    # Each for itself: the same log-likelihoods but for rounding, and times of its own.
    own = run({"deepen": ensembles["deepen"]}, data, tmp_path / "own", share_forwards=False)
    for name, expected in item_lines(tmp_path / "own").items():
        for one, other in zip(expected, lines[name], strict=True):
            assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
    assert own.tasks["piqa"].configurations["deepen"].timing.seconds > 0

    # A configuration added later leaves what is there as it is.
    more = {"third": ensembles["average"].variant(weights=[0.7, 0.3])}
    added = run(more, data, out)
    assert {name: own for name, own in item_lines(out).items() if name in lines} == lines
    assert added.tasks["piqa"].configurations["third"].against_best_single is not None


def test_what_neighbours_begin_with_is_read_once(
    data: Path, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
) -> None:
    """Two items of a domain, and all choices, by a pair and its members; to the tokens."""
    items, _ = CHOICE_TASKS["mmlu"].choice_items(data, "test", None)
    assert items[0].fields["domain"] == items[1].fields["domain"]
    with fed(tiny_smollm2) as main, fed(tiny_gemma) as assistant:
        (found,) = score_choices(items[:2], ensembles, 2, shared=True)
    assert {len(own) for own in found.values()} == {2}
    for member, tokens in ((tiny_smollm2, main), (tiny_gemma, assistant)):
        once = len(member.vocabulary.prefix_ids + member.vocabulary.encode(items[0].to_read))
        question = len(member.vocabulary.encode(items[1].prompt.rpartition("\n\n")[2]))
        assert once > 4 * question
        assert once - 1 <= sum(tokens) < once + question + 3 * len(items[0].choices) * 2


def test_records_and_scores_are_those_of_the_log_likelihoods(
    data: Path, tmp_path: Path, ensembles: dict[str, Ensemble]
) -> None:
    summary = run(ensembles, data, tmp_path)
    differ = 0
    for task, of_task in summary.tasks.items():
        items, left_out = CHOICE_TASKS[task].choice_items(data, "test", None)
        assert (of_task.n, of_task.left_out) == (len(items), left_out)
        assert left_out == (task == "arc_challenge")
        for name, score in of_task.configurations.items():
            header, records, _ = RecordFile.read(record_path(tmp_path, task, name))
            assert header is not None
            assert header["task"]["scoring"] == "likelihood"
            assert all(isinstance(one, ChoiceRecord) for one in records)
            for item, one in zip(items, records, strict=True):
                scores = [-math.inf if logprob is None else logprob for logprob in one.logprobs]
                assert len(scores) == len(item.choices)
                assert one.chosen == item.chosen(scores, by_bytes=False)
                assert one.chosen_norm == item.chosen(scores, by_bytes=True)
                assert (one.correct, one.correct_norm) == (
                    one.chosen == item.right,
                    one.chosen_norm == item.right,
                )
                differ += one.chosen != one.chosen_norm
            assert isinstance(score, ChoiceScore)
            assert score.correct == sum(one.correct for one in records)
            assert score.norm.correct == sum(one.correct_norm for one in records)
    assert differ


def write(folder: Path, name: str, members: str, right: list[bool], norm: list[bool]) -> Header:
    header = file_header(name, members, items=len(right), task="piqa")
    header["task"] |= {"scoring": "likelihood", "left_out": 2}
    with RecordFile(record_path(folder, "piqa", name), header) as file:
        for i, (one, other) in enumerate(zip(right, norm, strict=True)):
            file.append([ChoiceRecord(i, [-1.5, None], 0, 0, one, other, ChoiceTiming(0.25))])
    return header


def test_each_metric_has_its_own_best_single(tmp_path: Path) -> None:
    write(tmp_path, "a", "A", [True, True, False, False], [False, False, False, True])
    write(tmp_path, "b", "B", [True, False, False, False], [True, True, False, True])
    fused = [True, True, True, False], [True, True, True, True]
    write(tmp_path, "AB", "AB", *fused)
    of_task = summarise(tmp_path).tasks["piqa"]
    score = of_task.configurations["AB"]
    assert isinstance(score, ChoiceScore)
    assert (score.correct, score.norm.correct, of_task.left_out) == (3, 4, 2)
    assert (score.interval, score.norm.interval) == (wilson_interval(3, 4), wilson_interval(4, 4))
    by_acc, by_norm = score.against_best_single, score.norm.against_best_single
    assert by_acc is not None
    assert by_norm is not None
    assert (by_acc.configuration, by_norm.configuration) == ("a", "b")
    assert by_acc.p_value == mcnemar(fused[0], [True, True, False, False]).p_value
    assert (by_norm.gained, by_norm.lost) == (1, 0)
    assert score.timing.seconds == 1.0
    table = summary_table(summarise(tmp_path))
    assert list(table.columns[0].cells) == ["piqa, acc"] * 3 + ["piqa, acc_norm"] * 3 + ["piqa"]
    assert list(table.columns[2].cells)[-1] == "2"
    assert next(iter(table.columns[-1].cells)) == "0.25 s an item"


@pytest.mark.parametrize(
    "line",
    [
        {"chosen": 2},
        {"chosen_norm": -1},
        {"logprobs": [-1.0, "x"]},
        {"logprobs": [-1.0, math.nan]},
        {"correct": None},
        {"timing": {"seconds": 1.0, "rows": 2}},
        {"output": "text"},
    ],
)
def test_a_damaged_line_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    header = write(tmp_path, "a", "A", [True, False], [True, False])
    path = record_path(tmp_path, "piqa", "a")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], json.dumps(json.loads(lines[2]) | line), ""]))
    with pytest.raises(InputError, match=r"other fields.*--fresh"):
        RecordFile(path, header)


def test_both_kinds_of_results_do_not_mix(data: Path, tmp_path: Path, ensembles: dict[str, Ensemble]) -> None:
    header = file_header("smol", "A", task="piqa")
    with RecordFile(record_path(tmp_path, "piqa", "smol"), header) as file:
        file.append([record(0, True)])
    with pytest.raises(InputError, match=r'task\.scoring is null there and "likelihood" now.*another folder'):
        run(ensembles, data, tmp_path)
    assert summarise(tmp_path).tasks["piqa"].unfinished == {"smol": 1}


# Refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "gsm8k"], r"gsm8k has no choices; likelihood can score arc_challenge, piqa, mmlu"),
        (["--task", "piqa", "--task", "nq"], "nq has no choices"),
        (["--task", "nope"], "nope: no such task; there are arc_challenge, piqa, mmlu"),
        (["--task", "piqa", "--certified-skip"], "certified_skip is for texts that are written"),
        (["--task", "piqa", "--votes", "3"], "votes is for texts that are written"),
        (["--task", "all"], "/no/such: no such file or folder"),  # all that have choices
    ],
)
def test_the_command_refuses_before_a_model_is_loaded(
    data: Path, tmp_path: Path, given: list[str], message: str
) -> None:
    options = ["--data", str(data), "--json", str(tmp_path), "--model", "/no/such", "--model", "/no/other"]
    done = CliRunner().invoke(app, ["eval", "--scoring", "likelihood", *options, *given])
    assert done.exit_code == 2
    assert re.search(message, done.stderr)


def test_what_cannot_be_scored(
    data: Path,
    tmp_path: Path,
    ensembles: dict[str, Ensemble],
    tiny_gemma: Member,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match="scoring is 'nope'; use one of generation, likelihood"):
        evaluate(ensembles, "piqa", data, out=tmp_path, scoring="nope")
    with pytest.raises(InputError, match="certified_skip is for texts"):
        run(ensembles, data, tmp_path, certified_skip=True)
    none = tmp_path / "none"
    write_lines(none / "arc_challenge" / "test.jsonl", [ARC[1]])
    with pytest.raises(InputError, match="has no items with choices, and 1 without"):
        evaluate(ensembles, "arc_challenge", none, out=tmp_path, scoring="likelihood")
    write_lines(none / "piqa" / "test.jsonl", [PIQA[0], {**PIQA[1], "B": None}])
    with pytest.raises(InputError, match=r"test\.jsonl, line 2: B is None; piqa needs a text for each"):
        evaluate(ensembles, "piqa", none, out=tmp_path, scoring="likelihood")
    small = {"small": Ensemble([changed(tiny_gemma, context_length=10)], fuser="single")}
    with pytest.raises(InputError, match=r"item 0: the prompt's \d+ tokens .* exceed its context of 10"):
        run(small, data, tmp_path)
    monkeypatch.setattr("deepen_ext.members.memory.available_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"a prompt with a choice, up to \d+ long, need.*leave out the task"):
        run(ensembles, data, tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_old_records_are_read_as_before(tmp_path: Path) -> None:
    """A header without `scoring` is of texts."""
    header = file_header("a", "A", items=1)
    assert "scoring" not in header["task"]
    with RecordFile(record_path(tmp_path, "nq", "a"), header) as file:
        file.append([replace(record(0, True))])
    assert RecordFile.read(record_path(tmp_path, "nq", "a"))[1] == [record(0, True)]
