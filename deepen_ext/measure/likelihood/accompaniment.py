"""Where an assistant speaks in a text that is given, and what it has read there: by the rules of the loop."""

from __future__ import annotations

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.boundary import CANDIDATES, BoundaryRule, candidates_of
from deepen_ext.measure.likelihood.readings import Reading
from deepen_ext.members.chat import PromptText


class Accompaniment:
    """What an assistant has to say at each scored token of the main model, by the rules of the loop."""

    def __init__(self, main: Reading, assistant: Reading) -> None:
        self._main = main
        self._assistant = assistant
        self._found: dict[tuple[BoundaryRule | None, int], list[tuple[int, int]]] = {}

    def speaks(self, rule: BoundaryRule | None, candidates: int) -> list[tuple[int, int]]:
        """(scored token of the main model, number in what the assistant said) wherever the assistant speaks.

        Args:
            rule: the ensemble's.
            candidates: k of the ensemble's fuser: the rule looks at no more.
        """
        key = rule, min(candidates, CANDIDATES) if rule is not None else 0
        if key not in self._found:
            takes_part = self._takes_part(rule, candidates)
            numbers = self._assistant.numbers_after(ids for _, ids in takes_part)
            self._found[key] = [(token, n) for (token, _), n in zip(takes_part, numbers, strict=True)]
        return self._found[key]

    def _takes_part(self, rule: BoundaryRule | None, candidates: int) -> list[tuple[int, list[int]]]:
        """The main model's scored tokens that the assistant speaks at, and the ids it has read there."""
        main, assistant = self._main, self._assistant
        main.read()
        tokens = range(len(main.ends))
        known: dict[int, list[tuple[int, float]]] = {}
        if rule is not None:
            top = main.said.top(tokens, candidates, main.member.device, written=True)
            known = candidates_of(top, tokens)
        text = AssistantsText([assistant.member], [PromptText("", prefix=False)])
        text.append(main.data[: main.begin])
        found = []
        begin = main.begin
        for token, end in enumerate(main.ends):
            if text.speaks(0, rule, known.get(token, ())):
                found.append((token, list(assistant.after_prefix(text.ids(0)))))
            text.append(main.data[begin:end])
            begin = end
        return found
