"""Where an assistant speaks in a text that is given, and what it has read there: by the rules of the loop."""

from __future__ import annotations

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.boundary import BoundaryRule, candidates_of
from deepen_ext.measure.likelihood.readings import Reading
from deepen_ext.members.chat import PromptText


def where_it_speaks(
    main: Reading, assistant: Reading, rule: BoundaryRule | None, candidates: int
) -> list[tuple[int, int]]:
    """The main model's scored tokens at which an assistant speaks, by the rules of the loop.

    Args:
        main: the main model's reading of the text.
        assistant: the assistant's of the same text.
        rule: the ensemble's.
        candidates: k of the ensemble's fuser: the rule looks at no more.

    Returns:
        (number of the scored token, number in `assistant.said` of what it says there), rising.
    """
    main.read()
    tokens = range(len(main.ends))
    known: dict[int, list[tuple[int, float]]] = {}
    if rule is not None:
        known = candidates_of(main.said.top(tokens, candidates, main.member.device, written=True), tokens)
    text = AssistantsText([assistant.member], [PromptText("", prefix=False)])
    text.append(main.data[: main.begin])
    speaks: dict[int, list[int]] = {}  # by scored token: the ids that the assistant has read there
    begin = main.begin
    for token, end in enumerate(main.ends):
        if text.speaks(0, rule, known.get(token, ())):
            speaks[token] = list(assistant.after_prefix(text.ids(0)))
        text.append(main.data[begin:end])
        begin = end
    return list(zip(speaks, assistant.numbers_after(speaks.values()), strict=True))
