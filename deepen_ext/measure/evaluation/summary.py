"""The summary of a folder of results: scores with intervals, and comparisons with the best single member.

A summary depends on the files alone, so it is the same however often a run was ended and gone on with. What
depends on the clock stands apart under `timing`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepen_ext import __version__
from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_write
from deepen_ext.measure.evaluation.headers import Header
from deepen_ext.measure.evaluation.records import ItemRecord, RecordFile, check_folder
from deepen_ext.measure.evaluation.statistics import mcnemar, wilson_interval
from deepen_ext.measure.evaluation.tasks import TASKS


@dataclass(frozen=True)
class Comparison:
    """A fused configuration beside the best of its members alone, on the same items.

    The best member is picked on these items themselves, which favours it: the comparison is strict.

    Attributes:
        configuration: the best member's.
        difference: accuracy of the fused configuration minus that of the best member.
        interval: 95 %, of the difference.
        p_value: of McNemar's exact test.
        gained: items that only the fused configuration has right.
        lost: items that only the best member has right.
    """

    configuration: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    gained: int
    lost: int


@dataclass(frozen=True)
class Timing:
    """What the clock said.

    Attributes:
        seconds: in all.
        ms_per_token: the time of all steps but those that read the prompts, divided by the tokens that these
            steps wrote. None where every text has one token.
        shared_forwards: configurations had forwards in common. Then times say what all of them took, and not
            what each would take.
    """

    seconds: float
    ms_per_token: float | None
    shared_forwards: bool


@dataclass(frozen=True)
class Score:
    """One configuration on one task.

    Attributes:
        method: how it fuses; "single" for a member alone.
        members: their names, the main model first.
        weights: of the members; for weights from the prompt, the rule and what it starts from.
        n: how many items.
        votes: how many texts of an item voted; 1 where there was no vote.
        correct: how many of them are right, by the task's metric.
        accuracy: correct / n.
        interval: 95 %, Wilson's.
        tokens: how many were written.
        changed_share: share of the tokens that are not the main model's own first choice.
        unanswered_share: share of the items without an answer in any of their texts.
        finish_reasons: how many texts ended for each reason.
        against_best_single: None for a member alone, and where some member is not there alone.
        timing: apart from everything else, because no two runs have the same times.
    """

    method: str
    members: list[str]
    weights: list[float] | dict[str, Any]
    n: int
    votes: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    tokens: int
    changed_share: float
    unanswered_share: float
    finish_reasons: dict[str, int]
    against_best_single: Comparison | None
    timing: Timing


@dataclass(frozen=True)
class TaskSummary:
    """One task.

    Attributes:
        split: of the data.
        n: how many items.
        items_sha256: over the items as they were read.
        configurations: the finished ones by name, members alone first.
        unfinished: the other configurations by name, and how many records they have.
    """

    split: str
    n: int
    items_sha256: str
    configurations: dict[str, Score]
    unfinished: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """All tasks of a folder, by name."""

    tasks: dict[str, TaskSummary]

    def as_dict(self) -> dict[str, Any]:
        """As `summary.json` has it."""
        return {"package": __version__, **asdict(self)}


def summarise(folder: str | Path) -> Summary:
    """Summarise all result files of a folder.

    Raises:
        InputError: no result files; files of one task that are of other items; a damaged file.
    """
    folder = Path(folder)
    tasks = {}
    for task in TASKS:
        paths = sorted(folder.glob(f"{task}.*.jsonl"))
        read = [(header, records) for header, records, _ in map(RecordFile.read, paths) if header is not None]
        if read:
            check_folder(folder, read[0][0]["task"])
            tasks[task] = _task_summary(read)
    if not tasks:
        raise InputError(f"{folder}: there are no results; name a folder that deepen-ext eval has written")
    return Summary(tasks)


def write_summary(folder: Path, summary: Summary) -> None:
    """Write ``summary.json``, whole or not at all.

    Raises:
        ModelError: the disk does not take it.
    """
    target = folder / "summary.json"
    try:
        with atomic_write(target) as path:
            path.write_text(json.dumps(summary.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise ModelError(
            f"{target}: cannot be written ({error.strerror}); every answer is kept: make room and give the "
            "same command again"
        ) from error


def _task_summary(read: Sequence[tuple[Header, list[ItemRecord]]]) -> TaskSummary:
    task = read[0][0]["task"]
    found = [
        (header["configuration"], sorted(records, key=lambda record: record.index))
        for header, records in read
    ]
    found.sort(key=lambda one: (not _alone(one[0]), one[0]["name"]))
    finished = [one for one in found if len(one[1]) == task["items"]]
    singles = {
        _identity(configuration["members"][0]): (configuration["name"], records)
        for configuration, records in finished
        if _alone(configuration)
    }
    return TaskSummary(
        split=task["split"],
        n=task["items"],
        items_sha256=task["items_sha256"],
        configurations={one["name"]: _score(one, records, singles) for one, records in finished},
        unfinished={one["name"]: len(records) for one, records in found if len(records) < task["items"]},
    )


def _alone(configuration: Header) -> bool:
    return len(configuration["members"]) == 1


def _identity(member: Mapping[str, Any]) -> str:
    """A member by what it computes, whatever it is called."""
    return json.dumps({key: value for key, value in member.items() if key != "name"})


def _score(
    configuration: Header,
    records: Sequence[ItemRecord],
    singles: Mapping[str, tuple[str, Sequence[ItemRecord]]],
) -> Score:
    n, correct = len(records), sum(record.correct for record in records)
    tokens = sum(record.tokens for record in records)
    votes = len(records[0].votes) or 1
    later = tokens - n * votes  # after the first of each text
    reasons = [one.finish_reason for record in records for one in record.votes]
    reasons = reasons or [record.finish_reason for record in records]
    decoding = sum(record.timing.decode_ms for record in records)
    milliseconds = sum(record.timing.prompt_ms for record in records) + decoding
    return Score(
        method=configuration["method"],
        members=[member["name"] for member in configuration["members"]],
        weights=configuration["weights"],
        n=n,
        votes=votes,
        correct=correct,
        accuracy=correct / n,
        interval=wilson_interval(correct, n),
        tokens=tokens,
        changed_share=sum(record.changed for record in records) / tokens,
        unanswered_share=sum(record.answer is None for record in records) / n,
        finish_reasons=dict(sorted(Counter(reasons).items())),
        against_best_single=_compare(configuration, records, singles),
        timing=Timing(
            seconds=round(milliseconds / 1e3, 3),
            ms_per_token=round(decoding / later, 3) if later else None,
            shared_forwards=configuration["share_forwards"],
        ),
    )


def _compare(
    configuration: Header,
    records: Sequence[ItemRecord],
    singles: Mapping[str, tuple[str, Sequence[ItemRecord]]],
) -> Comparison | None:
    own = [_identity(member) for member in configuration["members"]]
    if _alone(configuration) or any(one not in singles for one in own):
        return None
    # Of equally good members the first: the main model before an assistant.
    name, best = max((singles[one] for one in own), key=lambda one: sum(r.correct for r in one[1]))
    paired = mcnemar([record.correct for record in records], [record.correct for record in best])
    return Comparison(
        configuration=name,
        difference=paired.difference,
        interval=(paired.low, paired.high),
        p_value=paired.p_value,
        gained=paired.only_a,
        lost=paired.only_b,
    )
