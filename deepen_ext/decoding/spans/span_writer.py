"""AdaFuse: where the main model is torn, members propose words and take the one that all find most probable.

Cui et al., arXiv 2601.06022. A cycle of one text:

    1. the main model reads the text. Where its first choice is ahead of the second by `margin` or more, it
       writes the token alone;
    2. elsewhere every member writes the next word, its most probable tokens      next_word.py
    3. every member scores every word, by its mean log probability a token        reading.py
    4. the word with the largest weighted mean over the members is written, in the main model's tokens.

What differs from the paper: it looks at each member's margin where a word begins, and here the main model's
at every token counts; its spans are up to three words while a margin is large, and here the main model goes
on alone; it tries several first tokens where a member is torn, and here each member proposes one word; it
averages the members' means, and here the weights count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.drafts.draft_settings import MAIN
from deepen_ext.decoding.drafts.main_word import WordReader
from deepen_ext.decoding.places import Ahead, Draft, Place, Proposal, Reason
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.skips import Skips
from deepen_ext.decoding.spans.next_word import NextWord, next_words
from deepen_ext.decoding.spans.reading import Continuation, Scored, score
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress
from deepen_ext.errors import InputError
from deepen_ext.members.backend import Session
from deepen_ext.members.distribution import Distribution


@dataclass(frozen=True)
class _Span:
    """A word that somebody proposed, or the end of the text."""

    text: str
    ids: Sequence[int]  # in the main model's tokens
    ends: bool


class SpanWriter:
    """Makes the drafts of a run by spans. Nobody verifies them: their tokens are decided."""

    def __init__(
        self,
        team: Team,
        main: Session,
        assistants: Assistants,
        texts: Mapping[int, TextInProgress],
        chooser: Chooser,
        skips: Skips,
        margin: float,
        *,
        unwritable: torch.Tensor,
        eos_ids: frozenset[int],
    ) -> None:
        """Nothing is computed.

        Args:
            team: of the run.
            main: the main model's session.
            assistants: of the run; their texts follow the drafts.
            texts: of the run.
            chooser: picks the main model's tokens: greedy, without processors.
            skips: says which places need no assistant.
            margin: members propose where the main model's first choice is ahead by less.
            unwritable: the main model's ids that are never written.
            eos_ids: the main model's ids that end a text.
        """
        self._team = team
        self._main = main
        self._assistants = assistants
        self._texts = texts
        self._ends = [eos_ids, *(member.eos_ids for member in team.members[1:])]
        self._unwritable = [unwritable, *(member.unwritable() for member in team.members[1:])]
        self._margin = margin
        self._words = WordReader(team, assistants, chooser, skips)

    def write(self, active: Sequence[int], *, alone: bool) -> Ahead:
        """The next token of each of these texts, or its next word. `alone`: see `Writer.write`; unused."""
        ahead = Ahead({number: [] for number in active}, MAIN, decided=True)
        lanes, ids = self._assistants.lanes, [self._texts[number].ids for number in active]
        began = perf_counter()
        answer = self._main.ask(dict(zip((lanes[n] for n in active), ids, strict=True)), self._k)
        said = answer.wait().clone().without(self._unwritable[0], in_place=True)
        word = self._words.read(said, active, ids, began=began)
        ahead.add_ms(MAIN, word.spent_ms)
        torn: dict[int, int] = {}
        proposers: dict[int, list[int]] = {}  # member indices
        for row, number in enumerate(active):
            sure: Reason | None = "sure" if word.margins[row] >= self._margin else None
            place = self._assistants.place(number, word.reasons[row] or sure, word.candidates.get(row, ()))
            speak = [i + 1 for i in place.asked]
            place = Place(number, place.reason, {}, place.weights)
            before = self._assistants.texts[number]
            ahead.drafts[number].append(
                Proposal(place, word.tokens[row], word.margins[row], said, row, before)
            )
            if speak:
                torn[number], proposers[number] = row, speak
        if torn:
            for number, draft in self._spans(ahead, said, torn, proposers).items():
                ahead.drafts[number] = draft
                ahead.drafted += len(draft) - 1
        return ahead

    def forget(self, number: int) -> None:
        """The text has ended: nothing of it is kept here."""

    @property
    def _k(self) -> int:
        return self._team.fuser.candidates

    def _spans(
        self,
        ahead: Ahead,
        said: Distribution,
        torn: Mapping[int, int],
        proposers: Mapping[int, Sequence[int]],
    ) -> dict[int, Draft]:
        """Drafts of the words that are taken; none of a text for which the main model has no whole word.

        Args:
            ahead: gets the times.
            said: by the main model.
            torn: of each text that is in question, its row there.
            proposers: of each of them, the assistants that propose, by member index.
        """
        words = self._propose(ahead, said, torn, proposers)
        spans = {}
        for number in torn:
            if (own := self._candidates(number, words)) is not None:
                spans[number] = own
        rivals = {number: own for number, own in spans.items() if len(own) > 1}
        scored = self._score(ahead, rivals, words) if rivals else {}
        began = perf_counter()
        drafts = {}
        for number, own in spans.items():
            taken, places = 0, words[0][number].said
            if number in rivals:
                taken = self._best(
                    number, {m: found[number] for m, found in scored.items() if number in found}
                )
                of_main = scored[0][number][taken].said
                places = [of_main.at([i]) for i in range(len(of_main))]
            drafts[number] = self._draft(number, own[taken], places)
        ahead.handoff_ms += (perf_counter() - began) * 1e3
        return drafts

    def _propose(
        self,
        ahead: Ahead,
        said: Distribution,
        torn: Mapping[int, int],
        proposers: Mapping[int, Sequence[int]],
    ) -> list[dict[int, NextWord]]:
        """Of each member the words that it wrote, by text."""
        found = []
        for i, member in enumerate(self._team.members):
            texts = [number for number in torn if not i or i in proposers[number]]
            began = perf_counter()
            words = next_words(
                self._session(i),
                member,
                self._k,
                {self._assistants.lanes[number]: self._ids(i, number) for number in texts},
                unwritable=self._unwritable[i],
                ends=self._ends[i],
                said=said.at([torn[number] for number in texts]) if i == 0 else None,
            )
            found.append(dict(zip(texts, words.values(), strict=True)))
            ahead.add_ms(i, (perf_counter() - began) * 1e3)
        return found

    def _candidates(self, number: int, words: Sequence[Mapping[int, NextWord]]) -> list[_Span] | None:
        """What is proposed for a text, the main model's first, no two alike; None where it has none."""
        own = words[0][number]
        if not own.ids and not own.ends:
            return None
        main, vocabulary = self._team.main, self._team.main.vocabulary
        spans = {own.text: _Span(own.text, own.ids or [self._end(own)], own.ends)}
        for one in (given[number] for given in words[1:] if number in given):
            if one.text in spans or not (one.ids or (one.ends and self._ends[0])):
                continue
            ids = [self._end(own)] if one.ends else vocabulary.encode_part(one.text, 1)[0]
            same = one.ends or b"".join(map(vocabulary.bytes_of, ids)) == one.data
            # The last token is not read, so it may exceed the context, as that of the main model's own word.
            if same and main.fits(len(self._texts[number].ids) + len(ids) - 1):
                spans[one.text] = _Span(one.text, ids, one.ends)
        return list(spans.values())

    def _end(self, word: NextWord) -> int:
        """Of the ids that end a text, the one that the main model finds most probable."""
        ends = sorted(self._ends[0])
        return ends[int(word.said[0].scores()[0, ends].argmax())]

    def _score(
        self, ahead: Ahead, spans: Mapping[int, Sequence[_Span]], words: Sequence[Mapping[int, NextWord]]
    ) -> dict[int, dict[int, list[Scored]]]:
        """Of each member what it makes of the spans, by text."""
        lanes = self._assistants.lanes
        longer = {}
        for number, own in spans.items():
            longer[number] = [self._assistants.texts[number].copy() for _ in own]
            for text, span in zip(longer[number], own, strict=True):
                text.append(span.text.encode())
        found = {}
        for i, member in enumerate(self._team.members):
            began = perf_counter()
            continuations = {
                lanes[number]: [
                    Continuation(
                        [*self._texts[number].ids, *(() if span.ends else span.ids)]
                        if i == 0
                        else text.ids(i - 1),
                        span.ends,
                    )
                    for text, span in zip(longer[number], own, strict=True)
                ]
                for number, own in spans.items()
                if i == 0 or self._assistants.weights[number][i] > 0
            }
            numbers = {lanes[number]: number for number in spans if lanes[number] in continuations}
            scored = score(
                self._session(i),
                member,
                self._k,
                {lane: self._ids(i, number) for lane, number in numbers.items()},
                continuations,
                {lane: words[i][number] for lane, number in numbers.items() if number in words[i]},
                unwritable=self._unwritable[i],
                ends=self._ends[i],
            )
            found[i] = {numbers[lane]: own for lane, own in scored.items()}
            ahead.add_ms(i, (perf_counter() - began) * 1e3)
        return found

    def _best(self, number: int, scored: Mapping[int, Sequence[Scored]]) -> int:
        """Which of a text's spans has the largest weighted mean; of equal ones the first."""
        weights = self._assistants.weights[number]
        means = [
            math.fsum(weights[member] * own[span].mean for member, own in scored.items() if weights[member])
            for span in range(len(scored[0]))
        ]
        if any(map(math.isnan, means)):
            raise InputError(f"{', '.join(self._team.names[member] for member in scored)}: one gives NaN")
        return means.index(max(means))

    def _draft(self, number: int, span: _Span, places: Sequence[Distribution]) -> Draft:
        """The span's tokens, each with what the main model said before it."""
        draft: Draft = []
        for token, said in zip(span.ids, places, strict=False):
            if draft:
                last = draft[-1]
                self._assistants.texts[number] = last.go_on(self._team.main.bytes_written(last.token))
            place = Place(number, None, {}, self._assistants.weights[number])
            draft.append(Proposal(place, token, 0.0, said, 0, self._assistants.texts[number]))
        return draft

    def _session(self, member: int) -> Session:
        return self._assistants.session(member) if member else self._main

    def _ids(self, member: int, number: int) -> Sequence[int]:
        """A text as a member reads it."""
        return list(self._assistants.texts[number].ids(member - 1)) if member else self._texts[number].ids
