"""The six benchmarks: the embedded models alone, in pairs and as a trio, by every way of fusing.

The answers' lines go to `--work`, a folder outside the repository, where a run that was ended goes on and
further ensembles and methods add up; bench/results/evaluation/<machine>/<task>.json is made of all of it.
With `--scoring likelihood` that is <task>-likelihood.json, with `--votes 5` <task>-votes5.json; dev splits
are in a folder `dev`. Each of these needs a `--work` folder of its own.
What that file has of earlier folders stays, and says which items were right: later ensembles are compared
with the members in it.
`--minutes` ends after a batch: what is there then counts, with the number of items beside it. It cuts off a
file's later items, so for MMLU, which is sorted by domain, choose `--limit` instead.

Configurations share forwards (a clock would mean nothing): for time a token there is compare_time.py. Where
answers are long (GSM8K) there is little to share, and `--one-by-one` gets whole configurations done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import ROOT, environment, machine_name, write_json
from compare_setup import (
    Deadline,
    add_options,
    alike,
    check_default,
    configurations,
    load,
    say,
    settings_used,
)
from results_read import dtype_of

from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.headers import Header, by_likelihood
from deepen_ext.measure.evaluation.jobs import SCORINGS, Progress, tasks_of
from deepen_ext.measure.evaluation.records import RecordFile
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.measure.evaluation.statistics import mcnemar, wilson_interval
from deepen_ext.measure.evaluation.tasks import SPLITS, TASKS

RESULTS = ROOT / "bench" / "results" / "evaluation"

Records = dict[int, Any]  # by the item's index
Outcomes = dict[int, bool]  # by the item's index: whether the answer was right


class OutOfTime(Exception):
    """The batch is done, and so is the time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the benchmark data (shared/data)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the answers' lines")
    parser.add_argument("--task", action="append", choices=TASKS, help="repeat it; default: all six")
    parser.add_argument("--limit", type=int, help="at most so many items a task, spread evenly")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--scoring", choices=SCORINGS, default="generation")
    parser.add_argument("--votes", type=int, default=1, help="sampled answers an item; the majority counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights in transformers")
    parser.add_argument(
        "--singles",
        choices=("with", "only", "without"),
        default="with",
        help="the members alone; to share work out over machines: some run these only, others none of them",
    )
    parser.add_argument("--environment", type=Path, help="JSON of the machine that ran; default: this one")
    parser.add_argument(
        "--one-by-one", action="store_true", help="a configuration over all items, then the next one"
    )
    parser.add_argument(
        "--summarise", action="store_true", help="run nothing, write the JSON of what is there"
    )
    parser.add_argument("--output", type=Path, help="folder; default: bench/results/evaluation/<machine>")
    add_options(parser)
    options = parser.parse_args()

    found = environment()
    if options.environment is not None:
        found = json.loads(options.environment.read_text(encoding="utf-8"))
    output = options.output or RESULTS / machine_name(found)
    tasks = options.task or list(tasks_of(options.scoring))
    for task in tasks:
        if there := read(options.work, task):
            kept(output / file_name(there[0][0]), there)
    if options.summarise:
        for task in tasks:
            if any(options.work.glob(f"{task}.*.jsonl")):
                write_task(options.work, options.data, task, output, found)
        return
    deadline = Deadline(options)
    members = load(options.ensembles, device=options.device, dtype=options.dtype)
    methods = () if options.singles == "only" else options.methods
    ensembles = configurations(members, options.ensembles, methods)
    if options.singles == "without":
        ensembles = {name: one for name, one in ensembles.items() if name not in members}
    rounds = [{name: one} for name, one in ensembles.items()] if options.one_by_one else [ensembles]
    for task in tasks:
        if deadline.passed():
            say(f"{task}: no time left")
            break
        try:
            for some in rounds:
                if deadline.passed():
                    raise OutOfTime
                there = {
                    header["configuration"]["name"]: len(records)
                    for header, records in read(options.work, task)
                }
                evaluate(
                    some,
                    task,
                    options.data,
                    out=options.work,
                    split=options.split,
                    limit=options.limit,
                    scoring=options.scoring,
                    votes=options.votes,
                    batch_size=options.batch_size,
                    on_progress=ending(deadline, {name: there.get(name, 0) for name in some}),
                )
        except OutOfTime:
            say(f"{task}: the time is up")
        finally:  # an interrupted run's too
            write_task(options.work, options.data, task, output, found)


def ending(deadline: Deadline, done: dict[str, int]) -> Callable[[Progress], None]:
    """Tells how far a task is, and ends it between two batches when the time is up.

    Args:
        deadline: the time.
        done: items that each configuration has; all have them in the same order.
    """
    least, before = min(done.values()), sum(done.values())

    def tell(one: Progress) -> None:
        nonlocal least, before
        if one.configuration:
            done[one.configuration] += one.done - before
            before = one.done
        if min(done.values()) > least:  # all have done the batch
            least = min(done.values())
            left = "" if one.seconds_left is None else f", {one.seconds_left / 60:.0f} min left"
            say(f"{one.task}: {one.done} of {one.records} answers{left}")
            if deadline.passed() and one.done < one.records:
                raise OutOfTime

    return tell


def file_name(header: Header) -> str:
    """Of a task's JSON file in the output folder."""
    head = header["task"]
    name = head["name"]
    if by_likelihood(header):
        name += "-likelihood"
    if "votes" in head:
        name += f"-votes{head['votes']['count']}"
    return f"{'dev/' if head['split'] == 'dev' else ''}{name}.json"


def kept(file: Path, there: list[tuple[Header, Records]]) -> dict[str, Any]:
    """The configurations of a task's JSON file that the work folder has not; {} without a file.

    Raises:
        InputError: the folder has results of other defaults, or the file those of other items or settings.
    """
    for header, _ in there:
        one = header["configuration"]
        check_default(file, one["name"], one["fuser"].get("learning_rate"))
    if not file.is_file():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))
    names = {header["configuration"]["name"] for header, _ in there}
    rest = {name: one for name, one in known["configurations"].items() if name not in names}
    now = what_was_asked(there[0][0])
    known["dtype"] = dtype_of(known)
    other = [key for key in now if key != "settings" and known[key] != now[key]]
    if alike(known["settings"]) != alike(now["settings"]):
        other.append("settings")
    if rest and other:
        raise InputError(
            f"{file} has configurations that the --work folder has not ({next(iter(rest))}, ...), with other "
            f"{other[0]}: give another --output, or remove the file"
        )
    return rest


def what_was_asked(header: Header) -> dict[str, Any]:
    """What all configurations in a task's file have in common."""
    head = header["task"]
    return {
        **{key: one for key, one in head.items() if key != "name"},
        "settings": settings_used(),
        "dtype": _dtype(header),
        "shared_forwards": header["configuration"]["share_forwards"],
    }


def _dtype(header: Header) -> str:
    """Of the weights in transformers; of llama.cpp's members alone float32, as their logits are."""
    members = header["configuration"]["members"]
    found = (one.get("dtype") for one in members if one.get("backend", "").startswith("transformers"))
    return next(found, None) or "float32"


def read(work: Path, task: str) -> list[tuple[Header, Records]]:
    """The results of a task, the members alone first."""
    found = []
    for path in sorted(work.glob(f"{task}.*.jsonl")):
        header, records, _ = RecordFile.read(path)
        if header is not None and records:
            found.append((header, {one.index: one for one in records}))
    return sorted(found, key=lambda one: len(one[0]["configuration"]["members"]))


def write_task(work: Path, data: Path, task: str, output: Path, found: dict[str, Any]) -> None:
    """The JSON of a task, from all that the work folder has, and what the file has beside it."""
    there = read(work, task)
    if not there:
        return
    file = output / file_name(there[0][0])
    head = there[0][0]["task"]
    rest = kept(file, there)
    metrics = ("correct", "correct_norm") if by_likelihood(there[0][0]) else ("correct",)
    # By metric and member, which items it has right alone.
    alone: dict[str, dict[str, Outcomes]] = {metric: {} for metric in metrics}
    for name, one in rest.items():
        if one["method"] == "single" and "right" in one:  # the oldest files have numbers alone
            alone["correct"][name] = outcomes(one)
            if "norm" in one:
                alone["correct_norm"][name] = outcomes(one["norm"])
    for header, records in there:
        if len(header["configuration"]["members"]) == 1:
            for metric in metrics:
                alone[metric][header["configuration"]["name"]] = right_by(records, metric)
    scores = {header["configuration"]["name"]: score(header, records, alone) for header, records in there}
    write_json(
        file,
        {
            "task": task,
            **what_was_asked(there[0][0]),
            "items_in_split": len(TASKS[task].items(data, head["split"])),
            "configurations": in_order({**rest, **scores}),
            "environment": found,
            "earlier_environments": earlier(file, found) if rest else [],
        },
    )
    say(f"written to {file}")


def earlier(file: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Environments of the runs before, each machine and commit once, that a task's JSON file is of."""
    known = json.loads(file.read_text(encoding="utf-8"))

    def run(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["machine"]["cpu"], one["machine"].get("gpu", {}).get("name"), one["commit"], one["dirty"]

    before = {run(one): one for one in (*known.get("earlier_environments", []), known["environment"])}
    return [one for key, one in before.items() if key != run(found)]


def in_order(configurations: dict[str, Any]) -> dict[str, Any]:
    """The members alone first, then by name."""
    return dict(sorted(configurations.items(), key=lambda one: (one[1]["ensemble"].count("+"), one[0])))


def outcomes(scores: dict[str, Any]) -> Outcomes:
    """Which items a configuration of a task's JSON has, and which of them it has right."""
    return {int(i): key == "right" for key in ("right", "wrong") for i in scores[key].split()}


def right_by(records: Records, metric: str) -> Outcomes:
    """Which items are right by a field of their records, in the items' order."""
    return {i: bool(getattr(records[i], metric)) for i in sorted(records)}


def score(header: Header, records: Records, alone: Mapping[str, Mapping[str, Outcomes]]) -> dict[str, Any]:
    """What a configuration got right, and beside the best of its members alone."""
    ensemble, _, method = header["configuration"]["name"].partition(" ")
    found = {
        "ensemble": ensemble,
        "method": method or "single",
        "n": len(records),
        **rate(right_by(records, "correct"), ensemble if method else "", alone["correct"]),
    }
    if by_likelihood(header):
        norm = rate(right_by(records, "correct_norm"), ensemble if method else "", alone["correct_norm"])
        seconds = sum(one.timing.seconds for one in records.values())
        return {**found, "norm": norm, "seconds": round(seconds, 1)}
    tokens = sum(one.tokens for one in records.values())
    milliseconds = sum(one.timing.prompt_ms + one.timing.decode_ms for one in records.values())
    return {
        **found,
        "tokens": tokens,
        "changed_share": round(sum(one.changed for one in records.values()) / tokens, 6),
        "unanswered_share": round(sum(one.answer is None for one in records.values()) / len(records), 6),
        "seconds": round(milliseconds / 1e3, 1),
    }


def rate(right: Outcomes, ensemble: str, alone: Mapping[str, Outcomes]) -> dict[str, Any]:
    """How often a configuration is right; "" as ensemble for a member alone."""
    n, correct = len(right), sum(right.values())
    return {
        "correct": correct,
        "accuracy": round(correct / n, 6),
        "interval": [round(one, 6) for one in wilson_interval(correct, n)],
        "against_best_single": compare(right, {one: alone.get(one) for one in ensemble.split("+")})
        if ensemble
        else None,
        # The items by their numbers in the split, in one line each.
        "right": " ".join(str(i) for i, one in right.items() if one),
        "wrong": " ".join(str(i) for i, one in right.items() if not one),
    }


def compare(right: Outcomes, alone: Mapping[str, Outcomes | None]) -> dict[str, Any] | None:
    """McNemar's test against the best member alone, on the items that all of them have.

    None where nothing is known of a member. Beside it the oracle: how many items some member alone has right.
    """
    singles = {name: one for name, one in alone.items() if one is not None}
    shared = sorted(set(right).intersection(*singles.values()))
    if len(singles) < len(alone) or not shared:
        return None
    # Of equally good ones the first: the main model before an assistant.
    best = max(singles, key=lambda name: sum(singles[name][i] for i in shared))
    paired = mcnemar(*([one[i] for i in shared] for one in (right, singles[best])))
    return {
        "configuration": best,
        "n": paired.total,
        "difference": round(paired.difference, 6),
        "interval": [round(paired.low, 6), round(paired.high, 6)],
        "p_value": float(f"{paired.p_value:.4g}"),
        "gained": paired.only_a,
        "lost": paired.only_b,
        "oracle": sum(any(one[i] for one in singles.values()) for i in shared),
    }


if __name__ == "__main__":
    main()
