"""What a member would write next by itself: a word."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from deepen_ext.members.backend import Session
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.member import Member
from deepen_ext.ops.topk_softmax import check_status
from deepen_ext.text.characters import whole_characters

LONGEST = 8  # tokens of a word; texts without spaces would have no end


@dataclass
class NextWord:
    """A member's most probable tokens after a text, up to the end of a word.

    A word ends before a token that begins with a space, or after a token that has one behind other characters
    (".\\n"). Spaces before the word belong to it.

    Attributes:
        ids: its own tokens, after the text's.
        data: their bytes, whole characters.
        ends: it would end the text here, and has no tokens.
        said: what it said before each of the ids, and maybe after the last; one position each.
    """

    ids: list[int] = field(default_factory=list)
    data: bytes = b""
    ends: bool = False
    said: list[Distribution] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The word, with the spaces before it."""
        return self.data.decode()

    def add(self, token: int, data: bytes) -> bool:
        """Add a token, if it is of the word; whether the word may go on."""
        body = _readable(self.data).lstrip()
        if not data or (body and _readable(data)[0].isspace()):
            return False
        self.ids.append(token)
        self.data += data
        body = _readable(self.data).lstrip()
        return len(self.ids) < LONGEST and not any(map(str.isspace, body))

    def drop_unfinished(self, member: Member) -> None:
        """Leave out the tokens at the end that are of an unfinished character."""
        while self.ids and whole_characters(self.data).encode() != self.data:
            size = len(member.vocabulary.bytes_of(self.ids.pop()))
            self.data = self.data[: len(self.data) - size]


def next_words(
    session: Session,
    member: Member,
    k: int,
    texts: Mapping[int, Sequence[int]],
    *,
    unwritable: torch.Tensor,
    ends: Collection[int],
    said: Distribution | None = None,
) -> dict[int, NextWord]:
    """The next word of each text, one forward pass a token for all of them.

    Args:
        session: of the member.
        member: who writes.
        k: how many of its most probable tokens to ask for.
        texts: ids by lane.
        unwritable: ids that are never written (see `Member.unwritable`).
        ends: ids that end a text.
        said: by the member after each of the texts, where that is known; without the unwritable ids.

    Raises:
        InputError: a member that gives NaN.
        ModelError: a forward pass failed.
    """
    words = {lane: NextWord() for lane in texts}
    going = list(texts)
    while going:
        if said is None:
            targets = {lane: [*texts[lane], *words[lane].ids] for lane in going}
            said = session.ask(targets, k).wait().clone().without(unwritable, in_place=True)
        check_status(f"logits of {member.name}", said.topk.status.tolist(), range(len(said)))
        following = []
        for row, (lane, token) in enumerate(zip(going, said.topk.ids[:, 0].tolist(), strict=True)):
            word = words[lane]
            word.said.append(said.at([row]))
            goes_on = word.add(token, member.vocabulary.bytes_of(token))
            word.ends = not word.ids and token in ends
            if goes_on and member.fits(len(texts[lane]) + len(word.ids)):
                following.append(lane)
        going, said = following, None
    for word in words.values():
        word.drop_unfinished(member)
    return words


def _readable(data: bytes) -> str:
    return data.decode(errors="replace")
