"""A draft by one of the assistants: its own tokens, to be read by the main model as tokens of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.places import Place
from deepen_ext.decoding.team import Team
from deepen_ext.members.distribution import Distribution
from deepen_ext.text.characters import whole_characters


@dataclass
class MemberDraft:
    """What an assistant wrote after a text.

    Attributes:
        ids: in its own tokens: the text, then the draft.
        start: how many of them are the text's.
        said: what it said after the text, after the text and one more token, and so on; one position each.
    """

    ids: list[int]
    start: int
    said: list[Distribution]

    def known(self, ids: Sequence[int]) -> Distribution | None:
        """What it said after these ids, should they be the text and a beginning of the draft."""
        at = len(ids) - self.start
        return self.said[at] if 0 <= at < len(self.said) and self.ids[: len(ids)] == ids else None


@dataclass
class Offer:
    """Main-model tokens that a drafter has for a text."""

    ids: list[int]
    written: MemberDraft | None = None

    def mark_known(self, place: Place, member: int) -> None:
        """What the member said while it wrote, it need not be asked again."""
        asked = place.asked.get(member - 1)
        if self.written is not None and asked is not None:
            known = self.written.known(asked)
            if known is not None:
                place.known[member - 1] = known


def write_by_member(
    team: Team, assistants: Assistants, member: int, texts: Sequence[int], length: int
) -> dict[int, MemberDraft]:
    """Let an assistant go on with these texts: its most probable tokens, until it would end the text.

    A text with an unfinished character has no draft.

    Args:
        team: of the run.
        assistants: with the texts as they stand.
        member: its index.
        texts: their numbers.
        length: how many tokens.
    """
    tokens = team.members[member].vocabulary
    drafts = {}
    for number in texts:
        if not assistants.texts[number].unfinished:
            ids = list(assistants.texts[number].ids(member - 1))
            drafts[number] = MemberDraft(ids, len(ids), [])
    going = list(drafts)
    for _ in range(length):
        going = [number for number in going if team.members[member].fits(len(drafts[number].ids))]
        if not going:
            break
        targets = {assistants.lanes[number]: drafts[number].ids for number in going}
        said = assistants.session(member).ask(targets, team.fuser.candidates).wait().clone()
        first = said.topk.ids[:, 0].tolist()
        for row, number in enumerate(going):
            drafts[number].said.append(said.at([row]))
        ended = [not tokens.bytes_of(token) for token in first]
        for number, token, end in zip(going, first, ended, strict=True):
            if not end:
                drafts[number].ids.append(token)
        going = [number for number, end in zip(going, ended, strict=True) if not end]
    return drafts


def in_main_tokens(team: Team, member: int, draft: MemberDraft) -> list[int]:
    """The draft as the main model would write it, up to its last whole character."""
    data = team.members[member].vocabulary.decode(draft.ids[draft.start :], continues=True)
    # As text that goes on from earlier text: no dummy space, nothing before it.
    return team.main.vocabulary.encode_part(whole_characters(data), 1)[0]
