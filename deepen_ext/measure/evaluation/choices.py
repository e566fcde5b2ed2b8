"""Choice tasks scored by likelihood: which of an item's choices is the most probable one after its question.

Prompts and scores are those of lm-evaluation-harness 0.4.13 (its tasks `arc_challenge`, `piqa` and
`mmlu_<domain>` with five examples). A choice follows the prompt after a space. `acc` takes the choice of the
largest log-likelihood, `acc_norm` that of the largest log-likelihood for each byte of the choice. The harness
calls the latter `acc_bytes`, and its own `acc_norm` divides by characters: the two can differ only where a
choice has letters outside of ASCII. Where the choices are letters, as in MMLU, `acc_norm` is `acc`.

The harness takes off whitespace around MMLU's questions; there is none in this data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen_ext.errors import InputError, shown
from deepen_ext.measure.evaluation.answers import Letter
from deepen_ext.measure.evaluation.tasks import Item, Task, check_text


@dataclass(frozen=True)
class ChoiceItem(Item):
    """One question with its choices.

    Attributes:
        choices: as texts, without the space that stands before each; () where the data has none.
        right: the number of the right choice, from 0; -1 without choices.
    """

    choices: tuple[str, ...]
    right: int

    @property
    def to_read(self) -> str:
        """The prompt with its longest choice."""
        return f"{self.prompt} {max(self.choices, key=lambda choice: len(choice.encode()), default='')}"

    def chosen(self, logprobs: Sequence[float], *, by_bytes: bool) -> int | None:
        """The number of the most probable choice, the first of equals; None where none has a probability.

        Args:
            logprobs: log-likelihoods of the choices.
            by_bytes: for each byte of a choice, as `acc_norm` does.
        """
        sizes = [len(choice.encode()) if by_bytes else 1 for choice in self.choices]
        each = [logprob / size for logprob, size in zip(logprobs, sizes, strict=True)]
        best = max(each)
        return None if best == -math.inf else each.index(best)


@dataclass(frozen=True)
class ChoiceTask(Task):
    """A benchmark whose items have choices. Nothing is written.

    Attributes:
        by_letter: the prompt has the options, and the choices are their letters; otherwise the options.
    """

    answers: Letter
    max_new_tokens: int = 0
    by_letter: bool = False

    def choice_items(self, data: str | Path, split: str, limit: int | None) -> tuple[list[ChoiceItem], int]:
        """The items that have choices, of those that `items` gives; and how many have none.

        ARC has items whose options are empty in the data (see `answers.Letter`): there is nothing to score.

        Raises:
            InputError: see `items`.
        """
        items = self.items(data, split, limit)
        kept = [one for one in items if isinstance(one, ChoiceItem) and one.choices]
        return kept, len(items) - len(kept)

    def _item(self, file: Path, index: int, fields: Mapping[str, Any], demos: Mapping[str, str]) -> Item:
        item = super()._item(file, index, fields, demos)
        letters = self.answers.letters
        where = f"{file}, line {1 + index}"
        for letter in letters:
            if not isinstance(fields.get(letter), str):
                raise InputError(
                    f"{where}: {letter} is {shown(fields.get(letter))}; {self.name} needs a text for each "
                    "option, an empty one where an item has fewer"
                )
            check_text(fields[letter], letter, where)
        there = [letter for letter in letters if fields[letter]]
        (answer,) = item.references
        if answer not in there:
            there = []
        choices = there if self.by_letter else [fields[letter] for letter in there]
        right = there.index(answer) if there else -1
        return ChoiceItem(item.index, item.prompt, item.references, fields, tuple(choices), right)


CHOICE_TASKS: dict[str, ChoiceTask] = {
    task.name: task
    for task in (
        ChoiceTask("arc_challenge", question="Question: {question}\nAnswer:", answers=Letter("ABCD")),
        ChoiceTask("piqa", question="Question: {question}\nAnswer:", answers=Letter("AB")),
        ChoiceTask(
            "mmlu",
            instruction="The following are multiple choice questions (with answers) about {domain}.\n\n",
            question="{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:",
            demo_answer=" {answer}\n\n",
            demos_by="domain",
            answers=Letter("ABCD"),
            by_letter=True,
        ),
    )
}
