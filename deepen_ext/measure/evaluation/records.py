"""What an evaluation writes: one file for a task and a configuration, one line of JSON for an item.

The first line is a header (`headers.py`). The lines of a batch are appended together and flushed to the disk,
so a killed run leaves whole batches and at most one torn line, which is cut off when the run goes on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import locked
from deepen_ext.ground.private_file import open_private
from deepen_ext.measure.evaluation.headers import Header, by_likelihood, check_same, damaged
from deepen_ext.measure.evaluation.record_checks import is_choice_record, is_header, is_record, votes_of


@dataclass(frozen=True)
class ItemTiming:
    """An item's share of its batch's time, divided evenly, so that items add up to batches.

    Attributes:
        prompt_ms: the step that reads the prompts and gives the first tokens.
        decode_ms: all later steps.
        rows: items in the batch.
    """

    prompt_ms: float
    decode_ms: float
    rows: int


@dataclass(frozen=True)
class Vote:
    """One of the texts of an item that voted: its fields are those of `ItemRecord`."""

    output: str
    answer: str | None
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class ItemRecord:
    """One record: what a configuration wrote for an item. All but `timing` is the same in every run.

    Attributes:
        index: of the item in the split's file, from 0.
        output: the text that was written.
        answer: what it says, by the task's rule; None where no answer was found.
        correct: by the task's metric.
        tokens: of the main model, EOS included.
        changed: how many of them are not the main model's own first choice.
        finish_reason: see `Generation`.
        timing: on the clock.
        votes: the texts that voted, where there was a vote (see `votes.py`). The fields above are then the
            majority's and sums. A line without a vote does not have it.
    """

    index: int
    output: str
    answer: str | None
    correct: bool
    tokens: int
    changed: int
    finish_reason: str
    timing: ItemTiming
    votes: list[Vote] = field(default_factory=list)


@dataclass(frozen=True)
class ChoiceTiming:
    """Seconds that a configuration took for an item; where forwards are shared, its even part of them."""

    seconds: float


@dataclass(frozen=True)
class ChoiceRecord:
    """One record: how a configuration scored an item's choices. All but `timing` is the same in every run.

    Attributes:
        index: of the item in the split's file, from 0.
        logprobs: log-likelihood (natural) of each choice after the prompt; None for a probability of 0.
        chosen: the number of the choice with the largest one; None where no choice has a probability.
        chosen_norm: the same by the log-likelihood for each byte.
        correct: whether `chosen` is right.
        correct_norm: whether `chosen_norm` is.
        timing: on the clock.
    """

    index: int
    logprobs: list[float | None]
    chosen: int | None
    chosen_norm: int | None
    correct: bool
    correct_norm: bool
    timing: ChoiceTiming


Record = ItemRecord | ChoiceRecord


def record_path(folder: Path, task: str, configuration: str) -> Path:
    """``FOLDER/<task>.<configuration>.jsonl``, with what a file name should not hold as ``_``."""
    return folder / f"{task}.{re.sub(r'[^A-Za-z0-9+-.]', '_', configuration)}.jsonl"


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """The folder, created when missing, for this process alone.

    Raises:
        InputError: it cannot be written to, or another process is writing to it.
    """

    def taken() -> None:
        raise InputError(
            f"{folder}: another evaluation is writing there; wait for it, or name another folder"
        )

    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file; results are a folder, name another one")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "evaluation", on_wait=taken))
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written to ({error.strerror}); name another folder"
            ) from error
        yield


def check_folder(folder: Path, task: Header) -> None:
    """Check that all files of a task in the folder are of these same items; before a model is loaded.

    Raises:
        InputError: a file is not. The message says what differs.
    """
    for path in sorted(folder.glob(f"{task['name']}.*.jsonl")):
        header = RecordFile.read(path)[0]
        if header is not None:
            check_same(path, {"task": header["task"]}, {"task": task})


class RecordFile:
    """The file of one configuration on one task, open for more records.

    Attributes:
        done: the indices of the items that the file has.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Open or begin the file; a torn last line is cut off.

        Args:
            path: see `record_path`.
            header: what the file's own header must agree with (`make_header`).

        Raises:
            InputError: the file's header differs, its lines are damaged, or it cannot be written to.
        """
        self.path = path
        found, records, size = self.read(path) if path.exists() else (None, [], 0)
        if found is not None:
            check_same(path, found, header)
        self.done = {record.index for record in records}
        try:
            self._file = open_private(path, "ab", buffering=0)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written to ({error.strerror}); give the right to write there, or name "
                "another folder"
            ) from error
        if self._file.tell() > size:
            self._file.truncate(size)
        if found is None:
            self._write([header])
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # or a power cut could lose the new file's name
            finally:
                os.close(folder)

    def append(self, records: Sequence[Record]) -> None:
        """Add the lines of a batch; they are on the disk when this returns.

        Raises:
            ModelError: the disk does not take them.
        """
        lines = [asdict(record) for record in records]
        self._write([{key: one[key] for key in one if key != "votes" or one[key]} for one in lines])
        self.done.update(record.index for record in records)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        rest = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ModelError(
                f"{self.path}: cannot be written to ({error.strerror}); what is done is kept: make room and "
                "give the same command again"
            ) from error

    @staticmethod
    def read(path: Path) -> tuple[Header | None, list[Record], int]:
        """A file's header (None where not even it is whole), its records, and how many bytes are whole.

        The records are all `ChoiceRecord` where the header's task names likelihood, else `ItemRecord`.

        Raises:
            InputError: it cannot be read, a line that is not the last one is damaged, a field is missing or
                of another type, or an item is there twice.
        """
        advice = "remove it, or name another folder"
        if path.exists() and not path.is_file():  # nothing may ever come out of a pipe
            raise InputError(f"{path} is a folder, a pipe or a device, and no file of results; {advice}")
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
        del lines[-1]  # what follows the last newline: nothing, or a torn line
        parsed: list[dict[str, Any]] = []
        size = 0
        for number, line in enumerate(lines, start=1):
            try:
                read = json.loads(line)
                if not isinstance(read, dict) or ("format" in read) != (number == 1):
                    raise ValueError
                parsed.append(read)
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end
                if number == len(lines):  # of a power cut, which may leave zeros
                    break
                raise damaged(path, f"line {number} is damaged") from error
            size += len(line) + 1
        if not parsed:
            return None, [], 0
        if not is_header(parsed[0]):
            raise damaged(path, "its header has other fields")
        if by_likelihood(parsed[0]):
            known = all(map(is_choice_record, parsed[1:]))
            read_line: Callable[[Mapping[str, Any]], Record] = _choice_record
        else:
            votes = votes_of(parsed[0])
            known = all(is_record(one, votes) for one in parsed[1:])
            read_line = _record
        if not known:
            raise damaged(path, "its lines have other fields")
        records = [read_line(one) for one in parsed[1:]]
        if len({record.index for record in records}) != len(records):
            raise damaged(path, "an item is there twice")
        return parsed[0], records, size


def _choice_record(line: Mapping[str, Any]) -> ChoiceRecord:
    return ChoiceRecord(**{**line, "timing": ChoiceTiming(**line["timing"])})


def _record(line: Mapping[str, Any]) -> ItemRecord:
    votes = [Vote(**one) for one in line.get("votes", [])]
    return ItemRecord(**{**line, "timing": ItemTiming(**line["timing"]), "votes": votes})
