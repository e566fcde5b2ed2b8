"""What an evaluation writes: one file for a task and a configuration, one line of JSON for an item.

The first line is a header with everything that determines the results. The lines of a batch are appended
together and flushed to the disk, so a killed run leaves whole batches and at most one torn line, which is cut
off when the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deepen_ext import __version__
from deepen_ext.decoding.prompt_weights import PROMPT_TOKENS, SHARPNESS
from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import locked
from deepen_ext.measure.evaluation.record_checks import is_header, is_record, read_line

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.measure.evaluation.tasks import Item, Task
    from deepen_ext.members.member import Member

FORMAT = 1  # of the lines; a file of another format cannot be gone on with

Header = dict[str, Any]


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
class ItemRecord:
    """What one configuration wrote for one item; all but `timing` is the same in every run.

    Attributes:
        index: the item's place in the split's file.
        output: the text that was written.
        answer: what it says, by the task's rule; None where no answer was found.
        correct: by the task's metric.
        tokens: of the main model, EOS included.
        changed: how many of them are not the main model's own first choice.
        finish_reason: see `Generation`.
        timing: on the clock.
    """

    index: int
    output: str
    answer: str | None
    correct: bool
    tokens: int
    changed: int
    finish_reason: str
    timing: ItemTiming


def task_header(task: Task, split: str, items: Sequence[Item]) -> Header:
    """What determines the results on a task's side; known before a model is loaded.

    The digest is over the items as they are read: data, which of them, templates, demos and references.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.index, item.prompt, list(item.references)]).encode() + b"\n")
    return {
        "name": task.name,
        "split": split,
        "items": len(items),
        "items_sha256": digest.hexdigest(),
        "max_new_tokens": task.max_new_tokens,
        "stop_strings": list(task.stop_strings),
    }


def configuration_header(
    name: str, ensemble: Ensemble, *, certified_skip: bool, share_forwards: bool
) -> Header:
    """What determines the results, and what the times mean, on the models' side.

    A batch's size is not in it: it may be made smaller when memory runs out.
    """
    fuser = {
        key: value
        for key, value in sorted(vars(ensemble.fuser).items())
        if isinstance(value, bool | int | float | str)
    }
    return {
        "name": name,
        "method": ensemble.method,
        "members": [_describe(member) for member in ensemble.members],
        "weights": _weights(ensemble),
        "fuser": fuser,
        # Not `ensemble.maps`: a variant keeps maps that its fuser has no use for.
        "relative_maps": [one.fingerprint for one in getattr(ensemble.fuser, "maps", [])],
        "boundary_aware": ensemble.boundary_rule is not None,
        "certified_skip": certified_skip,
        "share_forwards": share_forwards,
    }


def make_header(task: Header, configuration: Header) -> Header:
    """The first line of a file, as it reads after a round trip through JSON."""
    header = {"format": FORMAT, "package": __version__, "task": task, "configuration": configuration}
    read: Header = json.loads(json.dumps(header))
    return read


def _weights(ensemble: Ensemble) -> Any:
    if not ensemble.weighs_prompts:
        return list(ensemble.weights)
    return {"prompt": list(ensemble.weights), "sharpness": SHARPNESS, "tokens": PROMPT_TOKENS}


def _describe(member: Member) -> dict[str, Any]:
    return {
        "name": member.name,
        "vocabulary": member.vocabulary.fingerprint,
        "weights": member.backend.fingerprint(),
        "eos_ids": list(member.eos_ids),
        "dtype": member.backend.describe().dtype,
        "device": member.device.type,
    }


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
    """That all files of a task in the folder are of these same items; for before a model is loaded.

    Raises:
        InputError: one is not. The message says what differs.
    """
    for path in sorted(folder.glob(f"{task['name']}.*.jsonl")):
        header = RecordFile.read(path)[0]
        if header is not None:
            _check_same(path, {"task": header["task"]}, {"task": json.loads(json.dumps(task))})


class RecordFile:
    """The lines of one configuration on one task, to be gone on with; `done` are the items it has."""

    def __init__(self, path: Path, header: Header) -> None:
        """Open or begin the file; a torn last line is cut off.

        Args:
            path: see `record_path`.
            header: what must agree with the file's own (`make_header`).

        Raises:
            InputError: the file's header is another one, or its lines are damaged or not of this run.
        """
        self.path = path
        found, records, size = self.read(path) if path.exists() else (None, [], 0)
        if found is not None:
            _check_same(path, found, header)
        self.done = {record.index for record in records}
        self._file = path.open("ab", buffering=0)
        if self._file.tell() > size:
            self._file.truncate(size)
        if found is None:
            self._write([header])
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # or a power cut could lose the new file's name
            finally:
                os.close(folder)

    def append(self, records: Sequence[ItemRecord]) -> None:
        """Add the lines of a batch; they are on the disk when this returns.

        Raises:
            ModelError: the disk does not take them.
        """
        self._write([asdict(record) for record in records])
        self.done.update(record.index for record in records)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    def read(path: Path) -> tuple[Header | None, list[ItemRecord], int]:
        """A file's header (None where not even that is whole), its records, and how many bytes are whole.

        Raises:
            InputError: it cannot be read, a line that is not the last one is damaged, a field is missing or
                of another type, or an item is there twice.
        """
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        del lines[-1]  # what follows the last newline: nothing, or a torn line
        parsed: list[dict[str, Any]] = []
        size = 0
        for number, line in enumerate(lines, start=1):
            try:
                read = read_line(line)
                if not isinstance(read, dict) or ("format" in read) != (number == 1):
                    raise ValueError
                parsed.append(read)
            except ValueError as error:  # UnicodeDecodeError is one too
                if number == len(lines):  # of a power cut, which may leave zeros
                    break
                raise _damaged(path, f"line {number} is damaged") from error
            size += len(line) + 1
        if not parsed:
            return None, [], 0
        if not is_header(parsed[0]):
            raise _damaged(path, "its header has other fields")
        if not all(map(is_record, parsed[1:])):
            raise _damaged(path, "its lines have other fields")
        records = [ItemRecord(**{**one, "timing": ItemTiming(**one["timing"])}) for one in parsed[1:]]
        if len({record.index for record in records}) != len(records):
            raise _damaged(path, "an item is there twice")
        return parsed[0], records, size


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; remove the file, or begin it anew with fresh=True (--fresh)")


def _check_same(path: Path, there: Header, now: Header) -> None:
    try:
        old, new = dict(_flat(there)), dict(_flat(now))
    except RecursionError as error:
        raise _damaged(path, "its header is nested too deeply") from error
    differ = [
        f"{key} is {_short(old.get(key))} there and {_short(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise InputError(
            f"{path} holds results of another run: {'; '.join(differ)}. Give the same settings to go on with "
            "it, another folder (--json), or fresh=True (--fresh) to drop it and begin anew"
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for number, inner in enumerate(value, start=1):
            yield from _flat(inner, f"{name} {number}")
    else:
        yield name, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
