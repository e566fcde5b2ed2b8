"""The results page: what the comparisons compute from lines; the page is a function of their JSON."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import stdev
from typing import Any
from xml.etree import ElementTree

import pytest

from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.jobs import Progress
from deepen_ext.measure.evaluation.records import ItemRecord, ItemTiming, RecordFile, record_path
from deepen_ext.measure.evaluation.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
DATA = ROOT.parent / "shared" / "data"
sys.path.append(str(BENCH))  # at the end: its conftest must not come before this folder's

import compare  # noqa: E402
import compare_likelihood  # noqa: E402
import compare_setup  # noqa: E402
import results_format  # noqa: E402

RATE = compare_setup.settings_used()["defaults"]["learning_rate"]
OURS = f"S+G {compare_setup.DEFAULT}"

FOUND = {
    "machine": {"cpu": "Some CPU", "cores": 2, "isa": "avx2", "ram_gb": 8.0},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "compiler": "GNU 12"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}


def run_page(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "results_page.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def contents(docs: Path) -> dict[str, bytes]:
    files = [docs / "results.md", *sorted((docs / "results").glob("*.svg"))]
    return {file.name: file.read_bytes() for file in files}


def test_the_committed_page_is_made_of_the_committed_json(tmp_path: Path) -> None:
    done = run_page("--docs", tmp_path)
    assert done.returncode == 0, done.stderr
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


def test_a_member_of_whom_only_the_number_is_known(data: Path, work: Path, tmp_path: Path) -> None:
    """Files from before they said which items were right: enough where the member is worse than another."""
    right, best = answers("01111111"), answers("11100000")
    known = compare.compare(right, {"S": answers("11000000"), "G": best}, 8)
    assert known is not None
    assert known["configuration"] == "G"
    assert compare.compare(right, {"S": 2, "G": best}, 8) == known
    assert compare.compare(right, {"S": 3, "G": best}, 8) is None  # it might be the best
    assert (
        compare.compare(answers("0111"), {"S": 2, "G": best}, 8) is None
    )  # of the first four it may have two
    assert compare.compare(right, {"S": 2, "G": None}, 8) is None
    assert compare.compare(right, {"S": 2}, 8) is None

    compare.write_task(work, data, "arc_challenge", tmp_path, FOUND)
    file = tmp_path / "arc_challenge.json"
    old = json.loads(file.read_text())
    for one in old["configurations"].values():
        del one["right"], one["wrong"]
    file.write_text(json.dumps(old))
    record_path(work, "arc_challenge", "S").unlink()  # has two; G's three are in the folder
    compare.write_task(work, data, "arc_challenge", tmp_path, FOUND)
    new = json.loads(file.read_text())["configurations"]
    assert new[OURS]["against_best_single"] == old["configurations"][OURS]["against_best_single"]
    assert "right" not in new["S"]
    assert "right" in new["G"]


@pytest.mark.parametrize(("key", "value"), [("items_sha256", "1"), ("max_new_tokens", 2)])
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
    assert set(results_format.METHODS) <= set(names)
    method = compare_setup.parse_method("average@main=0.5@eta=0.3")
    assert method.name == "average@main=0.5@eta=0.3"
    assert method.of(3) == {
        "fuser": "average",
        "recipe": method.settings["recipe"],
        "weights": [0.5, 0.25, 0.25],
        "learning_rate": 0.3,
    }
    for wrong in ("average@warm", "average@eta=much", "nothing"):
        with pytest.raises(InputError, match=wrong.partition("=")[0].partition("@")[0]):
            compare_setup.parse_method(wrong)


def test_tests_that_remain_among_many() -> None:
    kept = results_format.holm({"a": 0.03, "b": 0.001, "c": 0.016})
    assert kept == ["b", "c", "a"]  # 0.001 <= 0.05 / 3, 0.016 <= 0.05 / 2, 0.03 <= 0.05
    assert results_format.holm({"a": 0.03, "b": 0.001, "c": 0.026}) == ["b"]


def write_results(results: Path, data: Path, work: Path, machine: str = "some-cpu") -> None:
    """Results of every script, for one pair and the members alone."""
    compare.write_task(work, data, "arc_challenge", results / "evaluation" / machine, FOUND)
    drawn = random.Random(1)
    lines = {}
    for name, level in (("S", 100), ("G", 105), (OURS, 92), ("S+G deepen:paper", 130)):
        for kind in compare_likelihood.KINDS[:3]:
            for text in "abcd":
                bits = [level + drawn.uniform(-3, 3) for _ in range(4)]
                lines[name, kind, text] = line(name, kind, text, bits, 512)
    settings = compare_setup.settings_used() | {"block": 128}
    file = results / "likelihood" / f"{machine}.json"
    file.parent.mkdir(parents=True)
    content = {"settings": settings, **compare_likelihood.summarise(lines), "environment": FOUND}
    file.write_text(json.dumps(content))


def test_a_page_of_small_results(data: Path, work: Path, tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    write_results(results, data, work)
    done = run_page("--results", results, "--docs", docs)
    assert done.returncode == 0, done.stderr
    made = contents(docs)
    plots = {f"{kind}-some-cpu.svg" for kind in ("accuracy", "likelihood", "summary")}
    assert made.keys() == {"results.md", *plots}
    page = made["results.md"].decode()
    assert "{{" not in page
    assert f"| {compare_setup.DEFAULT} (default) | 87.5, +50.0 |" in page
    ours = json.loads((results / "likelihood" / "some-cpu.json").read_text())["configurations"][OURS][
        "kinds"
    ]["code"]
    cell = results_format.bits_cell(ours["against_best_single"])
    assert cell.startswith("**−0.0")
    assert f"{ours['bits_per_byte']:.3f}, {cell}" in page
    assert f"η {RATE:g}" in page
    assert "†" in page  # the paper's recipe
    assert "SmolLM2 + Gemma 3 better, 0 worse" in page
    assert "SmolLM2 + Gemma 0 better, 3 worse" in page
    for name in plots:
        assert f"(results/{name})" in page
        root = ElementTree.fromstring(made[name])
        dots = [one for one in root.iter() if one.tag.endswith("circle") or one.tag.endswith("path")]
        assert len(dots) == (4 if "accuracy" in name else 2 * 4)

    before = contents(docs)
    assert run_page("--results", results, "--docs", docs, "--check").returncode == 0
    (docs / "results.md").write_text(page.replace("87.5, +50.0", "97.5, +60.0"))
    (docs / "results" / "accuracy-gone.svg").write_text("<svg/>")
    stale = run_page("--results", results, "--docs", docs, "--check")
    assert stale.returncode == 1
    assert "results.md" in stale.stderr
    assert "accuracy-gone.svg" in stale.stderr
    assert run_page("--results", results, "--docs", docs).returncode == 0
    assert contents(docs) == before


def test_two_machines_stand_apart(data: Path, work: Path, tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    write_results(results, data, work)
    compare.write_task(work, data, "arc_challenge", results / "evaluation" / "other-cpu", FOUND)
    assert run_page("--results", results, "--docs", docs).returncode == 0
    page = (docs / "results.md").read_text()
    assert "*On some-cpu:*" in page
    assert "*On other-cpu:*" in page
    assert len(list((docs / "results").glob("accuracy-*.svg"))) == 2
