"""Where an assistant speaks in a text that is given, and what it has read there: by the rules of the loop."""

from __future__ import annotations

from typing import NamedTuple

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.boundary import BoundaryRule, candidates_of
from deepen_ext.measure.likelihood.readings import Reading
from deepen_ext.members.chat import PromptText


class Speech(NamedTuple):
    """A scored token of the main model's at which an assistant speaks."""

    token: int  # its number
    said: int  # the number in `Reading.said` of what the assistant says there
    share: float  # of its weight that the assistant keeps, if enough is left then: see `share_left`


def where_it_speaks(
    main: Reading,
    assistant: Reading,
    rule: BoundaryRule | None,
    candidates: int,
    leads: bool,
) -> list[Speech]:
    """The main model's scored tokens at which an assistant speaks, by the rules of the loop.

    No weight is known here, so where it leads there are tokens among them at which too little of it may be
    left to have a say: see `share_left`.

    Args:
        main: the main model's reading of the text.
        assistant: the assistant's of the same text.
        rule: the ensemble's.
        candidates: k of the ensemble's fuser: the rule looks at no more.
        leads: whether the assistant counts more than the main model.

    Returns:
        the tokens, rising.
    """
    main.read()
    tokens = range(len(main.ends))
    known: dict[int, list[tuple[int, float]]] = {}
    if rule is not None:
        known = candidates_of(main.said.top(tokens, candidates, main.member.device, written=True), tokens)
    text = AssistantsText([assistant.member], [PromptText("", prefix=False)])
    text.append(main.data[: main.begin])
    speaks: dict[int, list[int]] = {}  # by scored token: the ids that the assistant has read there
    shares: list[float] = []
    begin = main.begin
    weights = (0.0, 1.0) if leads else (0.5, 0.5)
    for token, end in enumerate(main.ends):
        if share := text.share(0, rule, known.get(token, ()), weights):
            shares.append(share)
            speaks[token] = list(assistant.after_prefix(text.ids(0)))
        text.append(main.data[begin:end])
        begin = end
    numbers = assistant.numbers_after(speaks.values())
    return [Speech(*one) for one in zip(speaks, numbers, shares, strict=True)]
