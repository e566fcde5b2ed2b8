"""How probable a member finds continuations of a text, in its own tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from deepen_ext.decoding.spans.next_word import NextWord
from deepen_ext.members.asking import common_prefix
from deepen_ext.members.backend import Session
from deepen_ext.members.distribution import Distribution, joined
from deepen_ext.members.member import Member


@dataclass(frozen=True)
class Continuation:
    """A text with what may follow it, as one member reads it.

    Attributes:
        ids: of the text and what follows.
        ends: nothing follows, and the text ends.
    """

    ids: Sequence[int]
    ends: bool = False

    def __len__(self) -> int:
        """How many tokens, the end included."""
        return len(self.ids) + self.ends

    @property
    def fed(self) -> Sequence[int]:
        """The ids before the last token."""
        return self.ids if self.ends else self.ids[:-1]


@dataclass(frozen=True)
class Scored:
    """What a member said of a continuation.

    Attributes:
        mean: natural log probability a token.
        said: before each of these tokens, a position each.
    """

    mean: float
    said: Distribution


def score(
    session: Session,
    member: Member,
    k: int,
    texts: Mapping[int, Sequence[int]],
    continuations: Mapping[int, Sequence[Continuation]],
    words: Mapping[int, NextWord],
    *,
    unwritable: torch.Tensor,
    ends: Collection[int],
) -> dict[int, list[Scored]]:
    """Score the continuations of each text, of every text one in each forward pass.

    A mean is over the tokens from the first that is not the text's own in all of its continuations: where one
    of them makes a longer token of the text's last one, that token counts in all.

    Args:
        session: of the member.
        member: who reads.
        k: how many of its most probable tokens to ask for.
        texts: ids by lane.
        continuations: by lane; of each text two or more.
        words: by lane, what the member itself wrote after the text: this need not be asked again.
        unwritable: ids that have probability 0 (see `Member.unwritable`).
        ends: ids that end a text.

    Returns:
        By lane, in order. A text with a continuation that exceeds the member's context (but for its last
        token, which is not read), or of which it can score no token, is left out.

    Raises:
        ModelError: a forward pass failed.
    """
    scored: dict[int, list[Scored]] = {}
    starts = {}
    for lane, own in continuations.items():
        # At least one id stands before what is scored.
        start = max(1, min(common_prefix(list(one.ids), list(texts[lane])) for one in own))
        if all(len(one) > start and member.fits(len(one.fed)) for one in own):
            scored[lane], starts[lane] = [], start
    ending = torch.tensor(sorted(ends), dtype=torch.long, device=member.device)
    for i in range(max((len(continuations[lane]) for lane in scored), default=0)):
        here = {lane: continuations[lane][i] for lane in scored if i < len(continuations[lane])}
        found = {}
        for lane, one in here.items():
            if lane in words and (known := _known(words[lane], texts[lane], one, starts[lane])) is not None:
                found[lane] = known
        missing = {lane: one for lane, one in here.items() if lane not in found}
        if missing:
            counts = {lane: len(one) - starts[lane] for lane, one in missing.items()}
            answer = session.ask({lane: one.fed for lane, one in missing.items()}, k, counts)
            said = answer.wait().clone().without(unwritable, in_place=True)
            at = 0
            for lane, count in counts.items():
                found[lane] = said.at(range(at, at + count))
                at += count
        for lane, one in here.items():
            scored[lane].append(Scored(_mean(found[lane], one, starts[lane], ending), found[lane]))
    return scored


def _known(word: NextWord, text: Sequence[int], one: Continuation, start: int) -> Distribution | None:
    """What a member said while it wrote these very tokens."""
    count = len(one) - start
    if start != len(text) or count > len(word.said) or list(one.fed) != [*text, *word.ids[: count - 1]]:
        return None
    return joined(word.said[:count])


def _mean(said: Distribution, one: Continuation, start: int, ending: torch.Tensor) -> float:
    """Natural log probability a token, of the tokens from `start` on."""
    scores = said.scores().float()
    ids = torch.tensor(one.ids[start:], dtype=torch.long, device=scores.device)
    total = scores[: len(ids)].gather(1, ids[:, None]).sum() - scores.logsumexp(-1).sum()
    if one.ends:
        total = total + scores[-1, ending].logsumexp(-1)
    return float(total) / len(scores)
