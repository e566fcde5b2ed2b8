"""What settings are chosen on: a task's dev items, or a text. There is no way to name a test split."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number
from deepen_ext.ground.paths import user_path
from deepen_ext.measure.evaluation.tasks import TASKS, Item, Task
from deepen_ext.measure.likelihood.text_reading import pieces

_PIECE, _CONTEXT = 400, 400  # characters of a text that are scored together, and that are read before them


@dataclass(frozen=True)
class DevItem:
    """A text whose likelihood counts, after what comes before it; with the task's item where there is one."""

    context: str
    text: str
    item: Item | None = None


@dataclass(frozen=True)
class DevSet:
    """What settings are chosen on.

    Attributes:
        name: of the task, or of the file.
        items: in the order in which they are read: a beginning of it is a sample of the whole.
        task: None for a text.
        left_out: items whose right continuation the task's own rule does not count as right.

    Raises:
        InputError: fewer than two items.
    """

    name: str
    items: tuple[DevItem, ...]
    task: Task | None = None
    left_out: int = 0

    def __post_init__(self) -> None:
        if len(self.items) < 2:  # one item has no standard error
            more = f"a text of more than {_PIECE} characters" if self.task is None else "more items"
            raise InputError(
                f"{self.name}: one item alone cannot tell a better setting from a lucky one; give {more}, "
                "and a limit of 2 or more"
            )

    @classmethod
    def from_task(cls, name: str, data: str | Path, limit: int | None = None) -> DevSet:
        """A task's dev items and their right continuations.

        Raises:
            InputError: no such task or data, or a task without a dev split.
        """
        if name not in TASKS:
            raise InputError(f"task is {name!r}; use one of {', '.join(TASKS)}")
        folder = Path(data) / name
        if folder.is_dir() and not (folder / "dev.jsonl").exists():
            raise InputError(
                f"{name} has no dev split ({folder / 'dev.jsonl'} is not there), and settings are never "
                "chosen on a test split; tune on a text of the same kind with --text FILE"
            )
        task = TASKS[name]
        found = task.items(data, "dev", limit)
        kept = [DevItem(one.prompt, task.gold(one), one) for one in found if task.has_gold(one)]
        if not kept:
            raise InputError(f"{folder / 'dev.jsonl'} has no item with a right continuation; take more items")
        return cls(name, _mixed(kept), task, len(found) - len(kept))

    @classmethod
    def from_text(cls, path: str | Path, limit: int | None = None) -> DevSet:
        """A text in pieces, each after what stands before it; with a limit so many, spread evenly.

        Raises:
            InputError: no such file, not UTF-8, empty, JSON Lines, or the file of a test split.
        """
        file = user_path(path)
        if file.name == "test.jsonl":
            raise InputError(f"{file} is a test split; settings are never chosen on one")
        if file.suffix == ".jsonl":
            raise InputError(
                f"{file}: lines of JSON would be read as they stand, field names and quotes too; give the "
                "texts alone, in a file of another name, or questions with answers by --task and --data"
            )
        try:
            text = file.read_bytes().decode("utf-8")  # read_text would read other line ends as "\n"
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as a text file: {error}") from error
        if not text.strip():
            raise InputError(f"{file} is empty; give some text")
        if limit is not None:
            limit = whole_number("limit", limit, 1)
        found = [DevItem(*one) for one in pieces(text, length=_PIECE, context=_CONTEXT)]
        if limit is not None and limit < len(found):
            found = [found[i * len(found) // limit] for i in range(limit)]
        return cls(file.name, _mixed(found))


def _mixed(items: Sequence[DevItem]) -> tuple[DevItem, ...]:
    mixed = list(items)
    random.Random(0).shuffle(mixed)
    return tuple(mixed)
