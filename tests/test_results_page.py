"""The results page: what the comparisons compute from lines; the page is a function of their JSON."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import stdev
from typing import Any
from xml.etree import ElementTree

import pytest

from deepen_ext.errors import InputError
from deepen_ext.fusers.settings import FusionSettings
from deepen_ext.measure.evaluation.headers import configuration_header
from deepen_ext.measure.evaluation.jobs import Progress
from deepen_ext.measure.evaluation.records import ItemRecord, ItemTiming, RecordFile, record_path
from deepen_ext.measure.evaluation.tasks import TASKS
from deepen_ext.members.member import Member

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
DATA = ROOT.parent / "shared" / "data"
sys.path.append(str(BENCH))  # at the end: its conftest must not come before this folder's

import compare  # noqa: E402
import compare_likelihood  # noqa: E402
import compare_setup  # noqa: E402
import results_format  # noqa: E402
import results_page  # noqa: E402
import results_parts  # noqa: E402
import results_texts  # noqa: E402
from results_read import BEFORE, read_results  # noqa: E402

RATE = compare_setup.settings_used()["defaults"]["learning_rate"]
OURS = f"S+G {compare_setup.DEFAULT}"

FOUND = {
    "machine": {"cpu": "Some CPU", "cores": 2, "isa": "avx2", "ram_gb": 8.0},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "compiler": "GNU 12"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}


def run_page(*arguments: object) -> str:
    """In this process; what it ends with, empty where all is well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["results_page.py", *map(str, arguments)])
        try:
            results_page.main()
        except SystemExit as end:
            return str(end.code)
    return ""


def contents(docs: Path) -> dict[str, bytes]:
    files = [docs / "results.md", *sorted((docs / "results").glob("*.svg"))]
    return {file.name: file.read_bytes() for file in files}


def test_the_committed_page_is_made_of_the_committed_json(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "results_page.py"), "--docs", str(tmp_path)]
    subprocess.run(command, check=True)
    made, committed = contents(tmp_path), contents(ROOT / "docs")
    assert made.keys() == committed.keys()
    assert made == committed, "run python bench/results_page.py"


def write_answers(work: Path, name: str, right: dict[int, bool], rate: float = RATE) -> None:
    """A record file of ARC as an evaluation leaves it."""
    letters = name.partition(" ")[0].split("+")
    header = {
        "format": 1,
        "task": {
            "name": "arc_challenge",
            "split": "test",
            "items": 8,
            "items_sha256": "0",
            "max_new_tokens": 1,
            "stop_strings": [],
        },
        "configuration": {
            "name": name,
            "method": name.partition(" ")[2],
            "members": [{"name": one, "vocabulary": "0", "weights": "0"} for one in letters],
            "weights": [1 / len(letters)] * len(letters),
            "fuser": {"learning_rate": rate} if "deepen" in name else {},
            "share_forwards": True,
        },
    }
    with RecordFile(record_path(work, "arc_challenge", name), header) as file:
        file.append(
            [
                ItemRecord(i, " A", "A" if i else None, ok, 1, int(not ok), "length", ItemTiming(1.0, 0.0, 8))
                for i, ok in right.items()
            ]
        )


def answers(pattern: str) -> dict[int, bool]:
    return {i: one == "1" for i, one in enumerate(pattern)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixteen items of ARC, for their number."""
    item = {"question": "?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "A"}
    folder = tmp_path / "data" / "arc_challenge"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for _ in range(16)))
    (folder / "demos.jsonl").write_text("")
    assert len(TASKS["arc_challenge"].items(folder.parent, "test")) == 16
    return folder.parent


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    write_answers(folder, "S", answers("11000000"))
    write_answers(folder, "G", answers("11100000"))
    write_answers(folder, OURS, answers("01111111"))
    write_answers(folder, "S+G deepen:paper", answers("1100"))
    return folder


def test_answers_are_compared_with_the_best_member_on_the_items_they_share(
    data: Path, work: Path, tmp_path: Path
) -> None:
    compare.write_task(work, data, "arc_challenge", tmp_path / "out", FOUND)
    result = json.loads((tmp_path / "out" / "arc_challenge.json").read_text())
    assert (result["items"], result["items_in_split"]) == (8, 16)
    whole, part = (result["configurations"][one] for one in (OURS, "S+G deepen:paper"))
    paired = whole["against_best_single"]
    assert (whole["n"], whole["correct"], whole["changed_share"], whole["unanswered_share"]) == (
        8,
        7,
        0.125,
        0.125,
    )
    assert (paired["configuration"], paired["n"], paired["gained"], paired["lost"]) == ("G", 8, 5, 1)
    assert paired["difference"] == 0.5
    assert paired["p_value"] == pytest.approx(2 * 7 / 64, rel=1e-3)  # P(X <= 1) of Binomial(6, 1/2), twice
    assert (part["n"], part["correct"], part["against_best_single"]["n"]) == (4, 2, 4)
    assert part["against_best_single"]["lost"] == 1
    assert result["configurations"]["S"]["against_best_single"] is None


def test_a_folder_that_lacks_results_adds_to_those_that_are_there(
    data: Path, work: Path, tmp_path: Path
) -> None:
    """A later session has another folder: its ensembles are compared with the members of the file."""
    compare.write_task(work, data, "arc_challenge", tmp_path / "whole", FOUND)
    late, output = tmp_path / "late", tmp_path / "out"
    late.mkdir()
    ours = record_path(work, "arc_challenge", OURS)
    ours.rename(late / ours.name)
    compare.write_task(work, data, "arc_challenge", output, FOUND)
    before = json.loads((output / "arc_challenge.json").read_text())["configurations"]
    assert (before["G"]["right"], before["G"]["wrong"]) == ("0 1 2", "3 4 5 6 7")
    assert OURS not in before
    compare.write_task(late, data, "arc_challenge", output, FOUND)
    assert (output / "arc_challenge.json").read_text() == (
        tmp_path / "whole" / "arc_challenge.json"
    ).read_text()


def test_rows_of_an_earlier_run_keep_its_machine_and_commit(data: Path, work: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "results" / "evaluation"
    file = evaluation / "two" / "arc_challenge.json"
    first = FOUND | {"machine": FOUND["machine"] | {"cpu": "Older CPU"}, "commit": "fedcba9876543210"}
    compare.write_task(work, data, "arc_challenge", file.parent, first)
    compare.write_task(work, data, "arc_challenge", file.parent, first)
    assert json.loads(file.read_text())["earlier_environments"] == []
    late = tmp_path / "late"
    late.mkdir()
    write_answers(late, "G+S deepen:paper", answers("11000000"))
    for _ in range(2):
        compare.write_task(late, data, "arc_challenge", file.parent, FOUND)
        found = json.loads(file.read_text())
        assert (found["environment"], found["earlier_environments"]) == (FOUND, [first])
    shown = results_texts.hardware(read_results(evaluation.parent))
    assert "**Older CPU, 2 cores** (avx2)" in shown
    assert "commit fedcba9876 of" in shown
    assert "**Some CPU, 2 cores** (avx2)" in shown
    assert "commit 0123456789 of" in shown


def test_a_member_of_whom_nothing_is_known() -> None:
    right, best = answers("01111111"), answers("11100000")
    known = compare.compare(right, {"S": answers("11000000"), "G": best})
    assert known is not None
    assert (known["configuration"], known["oracle"]) == ("G", 3)
    assert compare.compare(right, {"S": None, "G": best}) is None


@pytest.mark.parametrize(
    ("key", "value"), [("items_sha256", "1"), ("max_new_tokens", 2), ("dtype", "bfloat16")]
)
def test_results_of_other_items_do_not_stand_in_one_file(
    key: str, value: object, data: Path, work: Path, tmp_path: Path
) -> None:
    compare.write_task(work, data, "arc_challenge", tmp_path, FOUND)
    file = tmp_path / "arc_challenge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    there = compare.read(work, "arc_challenge")
    assert compare.kept(file, there) == {}  # all of it is replaced
    record_path(work, "arc_challenge", "S+G deepen:paper").unlink()
    there = compare.read(work, "arc_challenge")
    with pytest.raises(InputError, match=rf"S\+G deepen:paper.*{key}"):
        compare.kept(file, there)


def test_the_precision_is_in_the_file_and_in_the_title(data: Path, work: Path, tmp_path: Path) -> None:
    """Of files that do not say it, it is float32."""
    output = tmp_path / "results" / "evaluation" / "machine"
    output.mkdir(parents=True)
    compare.write_task(work, data, "arc_challenge", output, FOUND)
    file = output / "arc_challenge.json"
    known = json.loads(file.read_text())
    assert known.pop("dtype") == "float32"
    file.write_text(json.dumps(known))
    assert compare.kept(file, compare.read(work, "arc_challenge")) == {}
    assert [one.title for one in read_results(tmp_path / "results").tests] == ["ARC-Challenge, letter"]
    for path in work.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        header = json.loads(lines[0])
        for member in header["configuration"]["members"]:
            member |= {"backend": "transformers 5.23.0", "dtype": "bfloat16"}
        path.write_text("\n".join([json.dumps(header), *lines[1:], ""]))
    compare.write_task(work, data, "arc_challenge", output, FOUND)
    assert [one.title for one in read_results(tmp_path / "results").tests] == [
        "ARC-Challenge in bfloat16, letter"
    ]


def test_results_from_before_a_change_of_the_default_are_added_to(
    data: Path, work: Path, tmp_path: Path
) -> None:
    """Every method stands by its name; a member of whom the file has no items is not compared with."""
    late, file = tmp_path / "late", tmp_path / "arc_challenge.json"
    late.mkdir()
    ours = record_path(work, "arc_challenge", OURS)
    ours.rename(late / ours.name)
    compare.write_task(work, data, "arc_challenge", tmp_path, FOUND)
    known = json.loads(file.read_text())
    known["settings"] |= {"default_method": "average", "models": {}}
    known["settings"]["defaults"]["weights"] = None
    del known["configurations"]["G"]["right"]
    file.write_text(json.dumps(known))
    compare.write_task(late, data, "arc_challenge", tmp_path, FOUND)
    found = json.loads(file.read_text())
    assert found["configurations"].keys() == {"S", "G", OURS, "S+G deepen:paper"}
    assert found["configurations"][OURS]["against_best_single"] is None
    known["settings"]["defaults"]["steps"] += 1
    file.write_text(json.dumps(known))
    with pytest.raises(InputError, match="settings"):
        compare.write_task(late, data, "arc_challenge", tmp_path, FOUND)


def test_results_of_an_older_default_are_refused(work: Path, tmp_path: Path) -> None:
    write_answers(work, "G+S deepen:paper@eta=0.77", answers("1"), rate=0.77)
    compare.kept(tmp_path / "none.json", compare.read(work, "arc_challenge"))
    write_answers(work, "G+S deepen:paper", answers("1"), rate=0.77)
    with pytest.raises(InputError, match=r"0\.77"):
        compare.kept(tmp_path / "none.json", compare.read(work, "arc_challenge"))


@pytest.mark.parametrize("ahead", [{}, {"a": 4}])
def test_a_run_out_of_time_ends_between_two_batches(ahead: dict[str, int]) -> None:
    """Two configurations, 12 items, batches of 4; with `a` one batch ahead it ends when `b` has that too."""
    done = {"a": 0, "b": 0} | ahead
    tell = compare.ending(compare_setup.Deadline(Namespace(minutes=0)), dict(done))
    total = sum(done.values())

    def progress(configuration: str) -> Progress:
        return Progress("piqa", 1, 1, configuration, total, 24, total / 24, None)

    seen = []

    def run() -> None:
        nonlocal total
        tell(progress(""))
        for name in "babab" if ahead else "abab":
            seen.append(name)
            total += 4
            tell(progress(name))

    with pytest.raises(compare.OutOfTime):
        run()
    assert seen == (["b"] if ahead else ["a", "b"])


def line(name: str, kind: str, text: str, bits: list[float], nbytes: int) -> dict[str, Any]:
    return {
        "configuration": name,
        "fingerprint": "",
        "kind": kind,
        "text": text,
        "bytes": nbytes,
        "bits": bits,
        "right": 1,
        "tokens": 2,
        "weights": [0.5, 0.5] if " " in name else [1.0],
        "commit": "c",
    }


def test_bits_are_paired_by_block_and_by_text(tmp_path: Path) -> None:
    found = [
        line("S", "code", "one", [100.0, 110.0], 256),
        line("S", "code", "two", [90.0, 95.0], 256),
        line("S", "code", "three", [1.0, 1.0], 256),  # left out: the other has not read it
        line("S+G average", "code", "one", [90.0, 101.0], 256),
        line("S+G average", "code", "two", [85.0, 91.0], 256),
        line("G", "code", "one", [200.0, 200.0], 256),
        line("G", "code", "two", [200.0, 200.0], 256),
    ]
    file = tmp_path / "likelihood.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in found) + '{"torn')
    result = compare_likelihood.summarise(compare_likelihood.read(file))
    assert not file.read_text().endswith("torn")
    assert result["kinds"]["code"]["texts"] == 2
    own = result["configurations"]["S+G average"]["kinds"]["code"]
    assert own["bits_per_byte"] == pytest.approx(367 / 512, abs=1e-5)
    paired = own["against_best_single"]
    differences = [-10.0, -9.0, -5.0, -4.0]
    assert paired["configuration"] == "S"
    assert paired["bits_per_byte"] == pytest.approx(-28 / 512, abs=1e-5)
    assert paired["error"] == pytest.approx(stdev(differences) / math.sqrt(4) / 128, abs=1e-5)
    assert paired["error_by_text"] == pytest.approx(stdev([-19.0, -9.0]) / math.sqrt(2) / 256, abs=1e-5)
    assert result["configurations"]["S+G average"]["kinds"]["all"] == own


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data is not at ../shared/data")
@pytest.mark.parametrize("kind", compare_likelihood.KINDS)
def test_texts_are_of_one_size_and_have_nothing_in_common(kind: str) -> None:
    found = compare_likelihood.texts(DATA, kind, 20)
    assert len({one.sha256 for one in found}) == 20
    assert compare_likelihood.texts(DATA, kind, 3) == found[:3]
    for one in found:
        assert 300 <= len(one.context) <= compare_likelihood.CONTEXT
        assert len(one.context + one.scored) == compare_likelihood.CONTEXT + compare_likelihood.SCORED
        assert one.scored[0] == " "
        assert not one.context[-1].isspace()
    whole = [one.context + one.scored for one in found]
    assert not any(one[:100] in other for one in whole for other in whole if one is not other)


def test_methods_have_one_name_each() -> None:
    names = [compare_setup.parse_method(one).name for one in compare_setup.METHODS]
    assert names[0] == compare_setup.DEFAULT
    assert set(results_format.METHODS) <= {name.partition("@")[0] for name in names}
    method = compare_setup.parse_method("average@main=0.5@eta=0.3")
    assert method.name == "average@main=0.5@eta=0.3"
    defaults = FusionSettings()
    assert method.of(3) == {
        "fuser": "average",
        "recipe": method.settings["recipe"],
        "weights": [0.5, 0.25, 0.25],
        "weighing": defaults.weighing,
        "learning_rate": 0.3,
        "relative_temperature": None,
        "confidence": 0.0,
        "sharpness": defaults.sharpness,
    }
    for wrong in ("average@warm", "average@eta=much", "nothing"):
        with pytest.raises(InputError, match=wrong.partition("=")[0].partition("@")[0]):
            compare_setup.parse_method(wrong)


@pytest.mark.slow
def test_a_method_is_the_same_whichever_comes_before_it(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    """Each is a variant of the first one that has its maps."""
    members = {"S": tiny_smollm2, "G": tiny_gemma}
    methods = [
        "average@confidence=1",
        "average@margin",
        "consistent@consistency",
        "average@eta=0.3",
        "average",
    ]

    def made(order: list[str]) -> dict[str, str]:
        found = compare_setup.configurations(members, ["S+G"], order)
        return {
            name: json.dumps(configuration_header("", one, certified_skip=False, share_forwards=True))
            for name, one in found.items()
        }

    assert made(methods) == made(methods[::-1])
    assert len(set(made(methods).values())) == len(methods) + 1  # the average has no learning rate


def test_tests_that_remain_among_many() -> None:
    kept = results_format.holm({"a": 0.03, "b": 0.001, "c": 0.016})
    assert kept == ["b", "c", "a"]  # 0.001 <= 0.05 / 3, 0.016 <= 0.05 / 2, 0.03 <= 0.05
    assert results_format.holm({"a": 0.03, "b": 0.001, "c": 0.026}) == ["b"]


def answers_of(n: int, right: str, ensemble: str, method: str, **more: object) -> dict[str, Any]:
    """A configuration of a task's JSON, from a pattern of right answers that repeats."""
    outcomes = {i: right[i % len(right)] == "1" for i in range(n)}
    return {"ensemble": ensemble, "method": method, "n": n, "outcomes": outcomes, **more}


def task_file(file: Path, configurations: list[dict[str, Any]], **head: Any) -> None:
    """A task's JSON as compare.py leaves it."""
    alone = {one["ensemble"]: one["outcomes"] for one in configurations if one["method"] == "single"}
    made = {}
    for one in configurations:
        outcomes = one.pop("outcomes")
        single = one["method"] == "single"
        own = {**one, **compare.rate(outcomes, "" if single else one["ensemble"], alone)}
        if head.get("scoring") == "likelihood":
            turned = {i: not right for i, right in outcomes.items()}
            against = {key: {i: not right for i, right in other.items()} for key, other in alone.items()}
            own["norm"] = compare.rate(turned, "" if single else one["ensemble"], against)
        made[one["ensemble"] if single else f"{one['ensemble']} {one['method']}"] = own
    content = {
        "split": "test",
        "items": 40,
        "items_in_split": 80,
        "settings": compare_setup.settings_used(),
        "configurations": made,
        "environment": FOUND,
        **head,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


MEMBERS = (("1000", "S"), ("0110", "G"))


def write_tasks(folder: Path) -> None:
    """Choices, votes on a GPU, and a dev split."""
    alone = [answers_of(40, pattern, letter, "single") for pattern, letter in MEMBERS]
    fused = [
        answers_of(40, "1110", "S+G", compare_setup.DEFAULT),
        answers_of(40, "0000", "S+G", BEFORE),
        answers_of(24, "0111", "G+S", "union-vocab@margin"),
    ]
    file = folder / "some-cpu" / "piqa-likelihood.json"
    task_file(file, [dict(one) for one in (*alone, *fused)], task="piqa", scoring="likelihood")
    gpu = {**FOUND, "machine": {**FOUND["machine"], "gpu": {"name": "NVIDIA H100 80GB HBM3"}}}  # type: ignore[dict-item]
    head = {"task": "gsm8k", "environment": gpu}
    greedy = [dict(one) for one in (*alone, fused[0])]
    task_file(folder / "gpu" / "gsm8k.json", greedy, **head)
    voted = [answers_of(20, "1101", "G", "single"), answers_of(20, "1000", "S", "single")]
    voted.append(answers_of(20, "1111", "S+G", compare_setup.DEFAULT))
    task_file(folder / "gpu" / "gsm8k-votes5.json", voted, **head, votes={"count": 5})
    head = {"task": "triviaqa", "split": "dev"}
    task_file(folder / "some-cpu" / "dev" / "triviaqa.json", [dict(one) for one in (*alone, *fused)], **head)


def write_likelihood(results: Path, machine: str = "some-cpu") -> None:
    """Bits of one pair and the members alone."""
    drawn = random.Random(1)
    lines = {}
    for name, level in (("S", 100), ("G", 105), (OURS, 92), ("S+G deepen:paper", 130)):
        for kind in compare_likelihood.KINDS[:3]:
            for text in "abcd":
                bits = [level + drawn.uniform(-3, 3) for _ in range(4)]
                lines[name, kind, text] = line(name, kind, text, bits, 512)
    settings = compare_setup.settings_used() | {"block": 128}
    file = results / "likelihood" / f"{machine}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, **compare_likelihood.summarise(lines), "environment": FOUND}
    file.write_text(json.dumps(content))


def section(page: str, title: str) -> str:
    """What stands under a heading, or in a fold, up to the next heading."""
    return re.split(r"^#|</details>", page.partition(title)[2], maxsplit=1, flags=re.MULTILINE)[0]


def write_peers(file: Path) -> None:
    """What peers.py leaves, of one member alone."""
    sizes = dict.fromkeys(("texts", "scored", "context", "items", "letters", "tokens", "batch"), 1)
    speed = {"ms_a_token": 12.0}
    rows = [{"system": "alone", "name": "S", "texts": [], "speed": speed}]
    file.parent.mkdir(parents=True)
    content = {
        "pairs": {"S+Q": rows},
        "settings": sizes,
        "peers": {},
        "environment": FOUND | {"torch_threads": 2},
    }
    file.write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    write_tasks(folder / "evaluation")
    write_likelihood(folder)
    write_peers(folder / "peers" / "some-cpu.json")
    return folder


def test_tasks_without_the_default(results: Path) -> None:
    """GSM8K has it on another machine, NQ has it nowhere."""
    for task in ("gsm8k", "nq"):
        rows = [dict(answers_of(40, pattern, letter, "single")) for pattern, letter in MEMBERS]
        rows.append(dict(answers_of(40, "1110", "S+G", "deepen:bytes")))
        task_file(results / "evaluation" / "some-cpu" / f"{task}.json", rows, task=task)
    assert "- The default was not run on NQ." in results_parts.verdict(read_results(results)).splitlines()


def test_the_default_beside_the_best_single_member(results: Path) -> None:
    found = read_results(results)
    assert [one.title for one in found.tests] == ["PIQA, acc", "PIQA, acc_norm", "GSM8K on H100"]
    lines = results_parts.verdict(found).splitlines()
    # The ensemble has 30 of 40, as S and G together; by acc_norm each has what it had wrong.
    assert f"The default, `{compare_setup.DEFAULT}`, on test items: 3 comparisons" in lines[0]
    assert "worse on 1 (PIQA, acc_norm: SmolLM2 + Gemma)" in lines[0]
    assert "better on 2 (PIQA, acc: SmolLM2 + Gemma; GSM8K on H100: SmolLM2 + Gemma)" in lines[0]
    assert "after Holm's correction 1 worse and 2 better remain" in lines[0]
    assert not [line for line in lines if "was not run on" in line]
    earlier = results_parts.earlier_verdicts(found).splitlines()
    assert "far smaller model in front, `follow:bytes@size@named`, has no results" in earlier[0]
    assert [line.split(",")[0] for line in earlier[1:]] == ["- The default before", "- The first default"]
    table, _, before = results_parts.gains(found).partition("<details")
    assert "| `follow:bytes@prompt` | PIQA, acc, n 40 | PIQA, acc_norm, n 40 |" in before
    assert "| SmolLM2 + Gemma | **+25.0 (" in table
    assert table.count("** H |") == 2
    assert table.count(") † H |") == 1
    assert results_parts.figure(found, "right", "GSM8K on H100", "G") == "20 of 40 (50.0 %)"
    assert results_parts.figure(found, "points", "PIQA, acc", OURS).startswith("**+25.0 (")
    assert results_parts.figure(found, "points", "NQ", OURS) == "(not measured)"


def test_orders_that_the_default_does_not_take(tmp_path: Path) -> None:
    """With Qwen named second the default is Qwen + SmolLM2, so what SmolLM2 + Qwen got is not its own."""
    orders = {"S+Q": "Q+S", "Q+S": "Q+S", "G+S+Q": "Q+G+S", "Q+L": "L+Q", "G+S": "G+S", "S+G": "S+G"}
    assert {one: compare_setup.default_order(one) for one in orders} == orders
    rows = [answers_of(40, pattern, letter, "single") for pattern, letter in (("1000", "S"), ("1100", "Q"))]
    rows.append(answers_of(40, "1110", "Q+S", compare_setup.DEFAULT))
    rows += [answers_of(40, "0000", "S+Q", one) for one in (compare_setup.DEFAULT, "average")]
    task_file(tmp_path / "evaluation" / "some-cpu" / "nq.json", rows, task="nq")
    found = read_results(tmp_path)
    assert "1 comparisons" in results_parts.verdict(found)
    assert "better on 1 (NQ: Qwen + SmolLM2)" in results_parts.verdict(found)
    assert "worse on 1 (NQ: SmolLM2 + Qwen)" in results_parts.earlier_verdicts(found).splitlines()[0]
    assert "| average | −50.0 (0, 1 of 1) |" in results_parts.rules(found)
    named = "| follow:bytes, size and prompt weights, the smaller one in front |"
    assert f"{named} −50.0 (0, 1 of 1) |" in results_parts.rules(found)


def test_every_rule_and_what_is_missing(results: Path) -> None:
    found = read_results(results)
    every = results_parts.everything(found)
    margin = next(row for row in every.splitlines() if row.startswith("| union-vocab, margin |"))
    _, _, acc, norm, gsm8k, _ = map(str.strip, margin.split("|"))
    assert acc.startswith("**+25.0")
    assert acc.endswith(", n 24")
    assert norm.endswith("†, n 24")
    assert gsm8k == ""
    rules = results_parts.rules(found)
    assert "(default)** | +25.0 (1, 0 of 1) | −50.0 (0, 1 of 1) | +25.0 (1, 0 of 1) |" in rules
    lacking = results_parts.missing(found)
    assert "- PIQA, acc: some of its 40 items: Gemma + SmolLM2, union-vocab, margin" in lacking
    assert "- GSM8K on H100: ensembles: Gemma + SmolLM2; all rules but follow:bytes" in lacking
    assert "- GSM8K on H100, 5 votes: " in lacking


def test_a_rule_stands_beside_the_default_on_the_same_items(tmp_path: Path) -> None:
    """One ensemble of two, and items on which the default is right that it is wrong on elsewhere."""
    alone = [answers_of(40, pattern, letter, "single") for pattern, letter in MEMBERS]
    default = [
        answers_of(40, "1110" * 5 + "0000" * 5, "S+G", compare_setup.DEFAULT),
        answers_of(40, "0000", "G+S", compare_setup.DEFAULT),
    ]
    rule = answers_of(20, "1100", "S+G", "average")
    task_file(tmp_path / "evaluation" / "some-cpu" / "nq.json", [*alone, *default, rule], task="nq")
    rules = results_parts.rules(read_results(tmp_path))
    assert "(default)** | −31.2 (0, 1 of 2) |" in rules
    assert "| average | +0.0 (0, 0 of 1; default +25.0) |" in rules


def test_the_oracle_bounds_what_rules_can_gain(results: Path) -> None:
    oracle = results_parts.oracle(read_results(results))
    # Members together have three of four items, the best alone two.
    assert "| PIQA, acc: SmolLM2, Gemma | 40 | +25.0 | +25.0 (SmolLM2 + Gemma, " in oracle
    assert "| SmolLM2 + Gemma +25.0 |" in oracle


def test_votes_beside_the_best_members_votes(results: Path) -> None:
    votes = results_parts.votes(read_results(results))
    row = next(row for row in votes.splitlines() if row.startswith("| SmolLM2 + Gemma"))
    assert "| 20 | 100.0 (" in row
    assert "| 75.0, n 20 |" in row  # one greedy answer, on the items that were voted on
    assert "+25.0" in row
    assert row.endswith("| Gemma, n 20 |")


def test_a_page_of_small_results(results: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    assert run_page("--results", results, "--docs", docs) == ""
    made = contents(docs)
    assert made.keys() == {"results.md", "gains.svg", "summary-some-cpu.svg"}
    page = made["results.md"].decode()
    assert "{{" not in page
    dev = section(page, "dev splits\n")
    assert "TriviaQA" in dev
    assert "TriviaQA, n 40" not in page.replace(dev, "")  # dev results stand nowhere else
    assert f"η {RATE:g}" in page
    ours = json.loads((results / "likelihood" / "some-cpu.json").read_text())["configurations"][OURS]
    code = ours["kinds"]["code"]
    assert f"{code['bits_per_byte']:.3f}, {results_format.bits_cell(code['against_best_single'])}" in page
    assert "less probable on 0, and more probable on 3 (more, less: SmolLM2 + Gemma 3, 0)." in page
    assert "`deepen:bytes`, was not run on real text." in page
    assert "(more, less: SmolLM2 + Gemma 0, 3)." in page  # the paper's recipe
    assert "| SmolLM2 alone | " in section(page, "<summary>Peers on the same models")
    for name, count in (("gains.svg", 5), ("summary-some-cpu.svg", 2 * 4)):
        assert f"(results/{name})" in page
        root = ElementTree.fromstring(made[name])
        dots = [one for one in root.iter() if one.attrib.get("id", "").startswith("dot-")]
        assert len(dots) == count

    before = contents(docs)
    assert run_page("--results", results, "--docs", docs, "--check") == ""
    (docs / "results.md").write_text(page.replace("+25.0", "+35.0"))
    (docs / "results" / "accuracy-gone.svg").write_text("<svg/>")
    stale = run_page("--results", results, "--docs", docs, "--check")
    assert stale.startswith("out of date")
    assert "results.md" in stale
    assert "accuracy-gone.svg" in stale
    assert run_page("--results", results, "--docs", docs) == ""
    assert contents(docs) == before


@pytest.mark.parametrize("part", [None, "evaluation", "likelihood"])
def test_a_page_of_whatever_is_there(part: str | None, results: Path, tmp_path: Path) -> None:
    some, docs = tmp_path / "some", tmp_path / "docs"
    some.mkdir()
    if part is not None:
        (results / part).rename(some / part)
    assert run_page("--results", some, "--docs", docs) == ""
    assert "Not measured yet." in (docs / "results.md").read_text()


def test_two_machines_stand_apart(results: Path) -> None:
    alone = [answers_of(40, pattern, letter, "single") for pattern, letter in MEMBERS]
    task_file(results / "evaluation" / "other-cpu" / "nq.json", [dict(one) for one in alone], task="nq")
    task_file(results / "evaluation" / "some-cpu" / "nq.json", [dict(one) for one in alone], task="nq")
    titles = [one.title for one in read_results(results).tests]
    assert titles[-2:] == ["NQ (other-cpu)", "NQ (some-cpu)"]
    write_likelihood(results, "other-cpu")
    counts = results_texts.likelihood_counts(read_results(results))
    assert "*On some-cpu:*" in counts
    assert "*On other-cpu:*" in counts
    assert "The paper's recipe" not in counts
    assert "- The paper's recipe" in results_texts.earlier_likelihood_counts(read_results(results))


def test_results_of_other_settings_are_refused(results: Path) -> None:
    file = results / "evaluation" / "gpu" / "gsm8k.json"
    found = json.loads(file.read_text())
    found["settings"]["defaults"]["steps"] += 1
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="steps"):
        read_results(results)
