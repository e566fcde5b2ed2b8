"""The summary of a folder of results: scores with intervals, and comparisons with the best single member.

A summary depends on the files alone, so it is the same however often a run was ended and gone on with. What
depends on the clock stands apart under `timing`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepen_ext import __version__
from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_write
from deepen_ext.measure.evaluation.headers import Header
from deepen_ext.measure.evaluation.records import Record, RecordFile, check_folder
from deepen_ext.measure.evaluation.scores import ChoiceScore, TextScore, identity, is_alone, score_of
from deepen_ext.measure.evaluation.tasks import TASKS


@dataclass(frozen=True)
class TaskSummary:
    """One task.

    Attributes:
        split: of the data.
        n: how many items.
        items_sha256: over the items as they were read.
        left_out: items without choices; they are not among the n.
        configurations: the finished ones by name, members alone first.
        unfinished: the other configurations by name, and how many records they have.
    """

    split: str
    n: int
    items_sha256: str
    left_out: int
    configurations: dict[str, TextScore | ChoiceScore]
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


def _task_summary(read: Sequence[tuple[Header, list[Record]]]) -> TaskSummary:
    task = read[0][0]["task"]
    found = [
        (header["configuration"], sorted(records, key=lambda record: record.index))
        for header, records in read
    ]
    found.sort(key=lambda one: (not is_alone(one[0]), one[0]["name"]))
    finished = [one for one in found if len(one[1]) == task["items"]]
    singles = {
        identity(configuration["members"][0]): (configuration["name"], records)
        for configuration, records in finished
        if is_alone(configuration)
    }
    return TaskSummary(
        split=task["split"],
        n=task["items"],
        items_sha256=task["items_sha256"],
        left_out=task.get("left_out", 0),
        configurations={one["name"]: score_of(one, records, singles) for one, records in finished},
        unfinished={one["name"]: len(records) for one, records in found if len(records) < task["items"]},
    )
