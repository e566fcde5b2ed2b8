"""The paper's six benchmarks: prompts, settings and metrics, to the letter of the benchmark data's README.

The data is a folder with a folder for each task, which holds `dev.jsonl` and `test.jsonl` and, for few-shot
tasks, `demos.jsonl`. A prompt is instruction + demos + question; the answer of its own item is no part of it.

Known of the data, and left as it is: GSM8K's demos end in a line end of their own, so that a blank line, the
stop, follows each of them. The question of TriviaQA's test item 7 and one of MMLU's dev items are among the
demos; 8 of MMLU's test items are in its dev split too. ARC has items without options (`answers.Letter`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import whole_number
from deepen_ext.measure.evaluation.answers import Answers, LastNumber, Letter, ShortText, up_to_stop

SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        index: of its line in the split's file, from 0.
        prompt: what the model reads.
        references: what is right: a number or a letter, or several texts of which each is right.
        fields: the item as the file has it, its `answer` included.
    """

    index: int
    prompt: str
    references: tuple[str, ...]
    fields: Mapping[str, Any]

    @property
    def to_read(self) -> str:
        """The longest text that a member reads for the item, before it writes."""
        return self.prompt


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: of the task and of its folder.
        question: template of a question; fields of the item in braces.
        answers: how answers are read and compared.
        max_new_tokens: the paper's setting.
        stop_strings: the paper's setting; a generation ends after the first one.
        instruction: template of what stands once before the demos.
        demo_answer: template of what follows a demo's question; None for a task without demos.
        demos_by: the field in which an item and its demos agree; None if all items have the same demos.
    """

    name: str
    question: str
    answers: Answers
    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    instruction: str = ""
    demo_answer: str | None = None
    demos_by: str | None = None

    def items(self, data: str | Path, split: str, limit: int | None = None) -> list[Item]:
        """The items of a split, in the order of its file.

        Args:
            data: the folder of all benchmarks.
            split: "dev" (for choosing settings) or "test" (for reporting).
            limit: how many of the split's n items: those at i * n // limit for i = 0, 1, ..., spread evenly,
                so that MMLU's 57 domains are all there with a limit of 300. A limit gives the same items
                every time; another limit may give others. None, or n or more, is all of them.

        Raises:
            InputError: no such split or file, a limit below 1, or a line that is no item of this task or
                has no text where the prompt needs one.
        """
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; give one of: {', '.join(SPLITS)}")
        if limit is not None:
            limit = whole_number("limit", limit, 1)
        folder = Path(data) / self.name
        file = folder / f"{split}.jsonl"
        lines = _read(file)
        demos = self._demos(folder / "demos.jsonl")
        count = len(lines) if limit is None else min(limit, len(lines))
        chosen = (i * len(lines) // count for i in range(count))
        return [self._item(file, i, lines[i], demos) for i in chosen]

    def answer(self, output: str) -> str | None:
        """What the output says, up to the first stop string; None if no answer is found there."""
        return self.answers.find(up_to_stop(output, self.stop_strings))

    def correct(self, output: str, item: Item) -> bool:
        """Whether the output's answer matches one of the references. No answer is never right."""
        found = self.answer(output)
        return found is not None and any(self.answers.matches(found, one) for one in item.references)

    def gold(self, item: Item) -> str:
        """The right continuation of the prompt as text, in the format of the demos, for likelihood.

        It is a right output under the paper's setting: a letter after a space (" A") where there is one new
        token, otherwise the worked answer or the first reference, with the stop string that ends it.
        """
        return self.answers.written(item.fields["answer"]) + "".join(self.stop_strings[:1])

    def has_gold(self, item: Item) -> bool:
        """Whether `gold` counts as right, so that its likelihood is about what `correct` is about.

        It does not for the ARC items without options (23 of dev, 9 of test), and for two of GSM8K's test
        items, whose worked answers hold the stop in the middle.
        """
        return self.correct(self.gold(item), item)

    def _item(self, file: Path, index: int, fields: Mapping[str, Any], demos: Mapping[str, str]) -> Item:
        where = f"{file}, line {1 + index}"
        question = _filled(self.question, fields, where)
        try:
            references = self.answers.references(fields.get("answer"))
        except ValueError as error:
            raise InputError(
                f"{where}: answer is {shown(fields.get('answer'))}; {self.name} needs {error}"
            ) from error
        for one in references:
            check_text(one, "answer", where)
        key = _text(fields, self.demos_by, where) if self.demos_by else ""
        if self.demo_answer is not None and key not in demos:
            raise InputError(
                f"{where}: there are no demos for it in {file.parent / 'demos.jsonl'}"
                + (f" (none has {self.demos_by} {key!r})" if self.demos_by else "")
            )
        instruction = _filled(self.instruction, fields, where)
        return Item(index, instruction + demos.get(key, "") + question, references, fields)

    def _demos(self, file: Path) -> dict[str, str]:
        """The demos' text for each value of `demos_by`."""
        if self.demo_answer is None:
            return {}
        template, demos = self.question + self.demo_answer, dict[str, str]()
        for index, fields in enumerate(_read(file)):
            where = f"{file}, line {1 + index}"
            text = _filled(template, fields, where)
            key = _text(fields, self.demos_by, where) if self.demos_by else ""
            demos[key] = demos.get(key, "") + text
        return demos


def _filled(template: str, fields: Mapping[str, Any], where: str) -> str:
    """The template with an item's fields, as they stand in the file."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return template.format(**{name: _text(fields, name, where) for name in names})


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    """A field as it stands in the file. Of anything else the prompt would hold how Python writes it."""
    if name not in fields:
        raise InputError(f"{where}: there is no field {name!r}; docs/evaluation.md names each task's fields")
    value = fields[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {shown(value)}; give a text, as it is to stand in the prompt")
    check_text(value, name, where)
    return value


def check_text(text: str, name: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can name (`\\ud83d` alone) and no model can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {name} has half of a surrogate pair at character {error.start}, which is no "
            "character; write the character itself, or both halves"
        ) from None


def _read(file: Path) -> Sequence[Mapping[str, Any]]:
    """The objects of a file of JSON lines."""
    if not file.is_file():
        there = ", ".join(sorted(one.name for one in file.parent.glob("*.jsonl")))
        advice = f"that folder has {there}" if there else "give the folder that holds the tasks' folders"
        raise InputError(f"there is no {file}; {advice}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if not text:
        raise InputError(f"{file} is empty; docs/evaluation.md says what its lines hold")
    read: list[Mapping[str, Any]] = []
    # Lines end in "\n" alone: texts may hold the other line ends that splitlines() knows.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, too many digits, nested without end
            raise InputError(f"{file}, line {number} is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"{file}, line {number}: {line[:60]!r} is no JSON object")
        read.append(fields)
    return read


_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"


def _open_questions(name: str) -> Task:
    return Task(
        name,
        instruction="Answer this questions:\n",
        question="Question:{question}\nAnswer:",
        demo_answer="{answer}\n",
        answers=ShortText(),
        max_new_tokens=10,
        stop_strings=("\n",),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "gsm8k",
            question="Question: {question}\nLet's think step by step\nAnswer:",
            demo_answer="{answer}\n",
            answers=LastNumber(),
            max_new_tokens=512,
            stop_strings=("\n\n",),
        ),
        Task(
            "arc_challenge",
            question="Question: {question}\n" + _OPTIONS,
            answers=Letter("ABCD"),
            max_new_tokens=1,
        ),
        Task(
            "piqa",
            question="{question}\nA. {A}\nB. {B}\nAnswer:",
            answers=Letter("AB"),
            max_new_tokens=1,
        ),
        Task(
            "mmlu",
            question="There is a single choice question about {domain}. "
            "Answer the question by replying A, B, C or D.\nQuestion: {question}\n" + _OPTIONS,
            demo_answer=" {answer}\n",
            demos_by="domain",
            answers=Letter("ABCD"),
            max_new_tokens=1,
        ),
        _open_questions("triviaqa"),
        _open_questions("nq"),
    )
}
