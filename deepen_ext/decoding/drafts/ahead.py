"""Writing ahead: the main model's word on each place of a draft, and the token it would write there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import cast

import torch

from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.drafts.by_member import Offer, in_main_tokens, write_by_member
from deepen_ext.decoding.drafts.draft_settings import LOOKUP, MAIN
from deepen_ext.decoding.drafts.lookup import PromptLookup
from deepen_ext.decoding.drafts.main_word import Word, WordReader
from deepen_ext.decoding.drafts.pace import MOST_OFFERED, Pace, Plan
from deepen_ext.decoding.places import Ahead, Draft, Place, Proposal
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.skips import Skips
from deepen_ext.decoding.stopping import Stopping
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress
from deepen_ext.members.backend import Session, WritingSession
from deepen_ext.members.distribution import Distribution, forbid

# What a cycle keeps: the logits of one member at the places of all drafts.
_MOST_PLACES, _MOST_BYTES = 64, 128 << 20


class Writer:
    """Makes the drafts of a run. A draft of one place is a step without a draft."""

    def __init__(
        self,
        team: Team,
        main: Session,
        assistants: Assistants,
        texts: Mapping[int, TextInProgress],
        chooser: Chooser,
        skips: Skips,
        stopping: Stopping,
        pace: Pace,
        *,
        unwritable: torch.Tensor,
        in_place: bool,
        at_once: bool,
    ) -> None:
        """Nothing is computed.

        Args:
            team: of the run.
            main: the main model's session.
            assistants: of the run; their texts follow the drafts.
            texts: of the run.
            chooser: picks the tokens.
            skips: says which places need no assistant.
            stopping: says which tokens end a text.
            pace: decides how far to write.
            unwritable: ids that are never written.
            in_place: what the main model's session gives nobody else reads.
            at_once: the main model's session is a `WritingSession`, and writes whole drafts.
        """
        self._team = team
        self._main = main
        self._assistants = assistants
        self._texts = texts
        self._chooser = chooser
        # Where assistants may be spared, one elsewhere is asked when it is known that it is needed.
        self._asks_first = not (skips.spares or team.fuser.draws)
        # Whether what the main model would write is looked at: by a draft, or by who plans the next one.
        self._guesses = len(team.members) > 1 and pace.settings.length != 0
        self._stopping = stopping
        self._pace = pace
        self._unwritable = unwritable
        self._in_place = in_place
        self._at_once = at_once
        self._words = WordReader(team, assistants, chooser, skips)
        self._lookups: dict[int, PromptLookup] = {}

    def write(self, active: Sequence[int], *, alone: bool) -> Ahead:
        """Drafts for these texts, each of one place or more.

        Args:
            active: their numbers.
            alone: of one place: the first token of a text is not to wait for others.
        """
        ahead = Ahead({number: [] for number in active}, MAIN)
        plan = Plan(MAIN, 0) if alone else self._plan(ahead, active)
        if plan.drafter != MAIN:
            ahead.drafter = plan.drafter
            offers = self._offers(ahead, active, plan.length or 0)
            self._read(ahead, active, offers)
            return ahead
        length = plan.length
        if self._at_once and length:
            length = max(0, min(length, *map(self._room, active)))
        if self._at_once and length:
            self._write_at_once(ahead, active, length)
            return ahead
        going = list(active)
        while True:
            said = self._read(ahead, going, {}, timed=not alone)  # the first reads a prompt
            if not any(one.place.is_open for draft in ahead.drafts.values() for one in draft):
                return ahead
            going = [number for number in going if self._can_go_on(number, ahead.drafts[number])]
            if not going or not self._pace.goes_on(ahead.drafts, going, length):
                return ahead
            _keep(ahead.drafts, said)
            ahead.drafted += len(going)
            for number in going:
                self._go_on(ahead.drafts[number][-1])
            going = [number for number in going if self._fits(number, ahead.drafts[number])]
            if not going:
                return ahead

    def forget(self, number: int) -> None:
        """The text has ended."""
        self._lookups.pop(number, None)

    def _plan(self, ahead: Ahead, active: Sequence[int]) -> Plan:
        if LOOKUP in self._pace.settings.drafters:
            ahead.looked_up = {number: self._looked_up(number) for number in active}
        return self._pace.plan(len(active), list(map(len, ahead.looked_up.values())))

    def _looked_up(self, number: int) -> list[int]:
        """What prompt lookup has for this text."""
        found = self._lookups.setdefault(number, PromptLookup()).find(self._texts[number].ids, MOST_OFFERED)
        return self._writable_part(number, found)

    def _offers(self, ahead: Ahead, active: Sequence[int], length: int) -> dict[int, Offer]:
        """What a drafter other than the main model has for these texts."""
        if not length:
            return {}
        if ahead.drafter == LOOKUP:
            return {number: Offer(ids[:length]) for number, ids in ahead.looked_up.items()}
        began = perf_counter()
        written = write_by_member(self._team, self._assistants, ahead.drafter, active, length)
        ahead.add_ms(ahead.drafter, (perf_counter() - began) * 1e3)
        return {
            number: Offer(self._writable_part(number, in_main_tokens(self._team, ahead.drafter, own)), own)
            for number, own in written.items()
        }

    def _writable_part(self, number: int, ids: list[int]) -> list[int]:
        """The ids up to the first without text, and as many as fit before the text's last token."""
        vocabulary = self._team.main.vocabulary
        ends = (i for i, token in enumerate(ids) if not vocabulary.bytes_of(token))
        return ids[: max(0, min(self._room(number), next(ends, len(ids))))]

    def _room(self, number: int) -> int:
        """How many tokens may be drafted, so that one more can follow."""
        text, most = self._texts[number], self._team.main.context_length
        room = text.new_tokens - text.written - 1
        return room if most is None else min(room, most - len(text.ids))

    def _write_at_once(self, ahead: Ahead, active: Sequence[int], count: int) -> None:
        """The main model writes so many tokens of each text; the host reads them when all are there."""
        lanes, lengths = self._assistants.lanes, [len(self._texts[n].ids) for n in active]

        def choose(logits: torch.Tensor, n: int) -> torch.Tensor:
            writable = forbid(logits, self._unwritable, in_place=self._in_place)
            # Of the ids only their number counts (`Chooser.guesses_by_scores`).
            return self._chooser.propose(writable, active, [range(length + n) for length in lengths])

        asked_ms = self._ask_ahead(ahead, active)
        began = perf_counter()
        tokens, said = cast(WritingSession, self._main).write(
            {lanes[n]: self._texts[n].ids for n in active}, self._team.fuser.candidates, count, choose
        )
        said = said.without(self._unwritable, in_place=self._in_place)
        last = choose(said.scores()[count :: count + 1], count)
        word = self._words.read(
            said,
            [n for n in active for _ in range(count + 1)],
            [range(length + i) for length in lengths for i in range(count + 1)],
            torch.cat([tokens, last[:, None]], dim=1).flatten(),
            began=began,
        )
        ahead.add_ms(MAIN, word.spent_ms)
        self._pace.read(len(active), 1, (asked_ms + word.spent_ms) / (count + 1))
        starts = {n: i * (count + 1) for i, n in enumerate(active)}
        self._add_places(ahead, said, word, {n: word.tokens[at : at + count] for n, at in starts.items()}, {})
        ahead.drafted += sum(one.piece is not None for draft in ahead.drafts.values() for one in draft)

    def _read(
        self, ahead: Ahead, going: Sequence[int], offers: Mapping[int, Offer], *, timed: bool = True
    ) -> Distribution:
        """One forward of the main model: the next place of each draft, and those after what is on offer."""
        team, lanes, drafts = self._team, self._assistants.lanes, ahead.drafts
        offered = {number: offers[number].ids if number in offers else [] for number in going}
        starts = {n: self._texts[n].ids + [one.token for one in drafts[n]] for n in going}
        asked_ms = self._ask_ahead(ahead, going, prompts=not timed)
        began = perf_counter()
        said = self._main.ask(
            {lanes[n]: starts[n] + offered[n] for n in going},
            team.fuser.candidates,
            {lanes[n]: len(offered[n]) + 1 for n in going},
        ).wait()
        said = said.without(self._unwritable, in_place=self._in_place)
        numbers = [n for n in going for _ in range(len(offered[n]) + 1)]
        prefixes = [starts[n] + offered[n][:i] for n in going for i in range(len(offered[n]) + 1)]
        guess = self._guesses or bool(offers)
        word = self._words.read(said, numbers, prefixes, began=began, guess=guess)
        ahead.add_ms(MAIN, word.spent_ms)
        if timed:
            self._pace.read(len(going), max(map(len, offered.values())) + 1, asked_ms + word.spent_ms)
        ahead.drafted += sum(map(len, offered.values()))
        self._add_places(ahead, said, word, offered, offers)
        return said

    def _ask_ahead(self, ahead: Ahead, going: Sequence[int], *, prompts: bool = False) -> float:
        """Members elsewhere begin before the main model does; how many milliseconds it took to ask them.

        Args:
            ahead: its drafts' places may not be asked about yet; gets the times.
            going: the texts that the main model goes on with.
            prompts: some of them are prompts that nobody has read.
        """
        began = perf_counter()
        places = [one.place for draft in ahead.drafts.values() for one in draft]
        texts = going if self._asks_first or prompts else ()
        spent = self._assistants.ask_ahead(places, texts, ahead.drafter)
        for member, ms in spent.items():
            ahead.add_ms(member, ms)
        whole = (perf_counter() - began) * 1e3
        ahead.handoff_ms += whole - sum(spent.values())
        return whole

    def _add_places(
        self,
        ahead: Ahead,
        said: Distribution,
        word: Word,
        following: Mapping[int, list[int]],
        offers: Mapping[int, Offer],
    ) -> None:
        """The next places of each draft: one, and one more after each token that follows and stands.

        Args:
            ahead: gets them.
            said: by the main model, of each text one position more than tokens follow.
            word: of it, what the host has read.
            following: tokens of each text that were read, or written, after its draft.
            offers: of these, what another drafter had.
        """
        began = perf_counter()
        row = 0
        for n, tokens in following.items():
            draft = ahead.drafts[n]
            for i, token in enumerate([*tokens, None]):
                at = row + i
                place = self._assistants.place(
                    n, word.reasons[at], word.candidates.get(at, ()), self._share(n, draft)
                )
                text = self._assistants.texts[n]
                one = Proposal(place, word.tokens[at], word.margins[at], said, at, text)
                draft.append(one)
                if n in offers:
                    one.offered = token
                    offers[n].mark_known(place, ahead.drafter)
                    if token is not None and self._leads(ahead.drafter, place):
                        one.token, one.own = token, one.token
                # Where the main model would write something else, the offer is most likely wrong.
                if token != one.token or self._stopping.ends_text(n, one.token):
                    break
                self._go_on(one)
                if not self._fits(n, draft):
                    break
            row += len(tokens) + 1
        ahead.handoff_ms += (perf_counter() - began) * 1e3

    def _leads(self, drafter: int, place: Place) -> bool:
        """Whether the fused token is more likely this assistant's choice than the main model's.

        Not where a search keeps the text close to the main model, nor where nobody but it is asked.
        """
        if drafter in (MAIN, LOOKUP) or not place.is_open or place.weights[drafter] <= place.weights[0]:
            return False
        return self._team.fuser.search_bound() is None or not self._team.fuser.bounded(place.weights)

    def _share(self, number: int, draft: Draft) -> float | None:
        """What draws the member that speaks of a draft's next place, where the fuser draws."""
        length = len(self._texts[number].ids) + len(draft)
        return self._chooser.share(number, length) if self._team.fuser.draws else None

    def _can_go_on(self, number: int, draft: Draft) -> bool:
        """Whether the text goes on after the draft's last token."""
        text = self._texts[number]
        more = text.written + len(draft) < text.new_tokens and len(draft) < self._most_places()
        return more and not self._stopping.ends_text(number, draft[-1].token)

    def _most_places(self) -> int:
        """Of a draft, those that need no verification among them."""
        largest = max(member.vocab_size for member in self._team.members) * 4
        return max(2, min(_MOST_PLACES, _MOST_BYTES // (largest * len(self._assistants.lanes))))

    def _fits(self, number: int, draft: Draft) -> bool:
        """Whether every member can read the text with the draft."""
        longer = len(self._texts[number].ids) + len(draft)
        return self._team.main.fits(longer) and self._assistants.texts[number].fits()

    def _go_on(self, one: Proposal) -> None:
        """The next place comes after this token."""
        self._assistants.texts[one.place.text] = one.go_on(self._team.main.bytes_written(one.token))


def _keep(drafts: Mapping[int, Draft], said: Distribution) -> None:
    """What the main model said just now is copied: its session may write over it at the next forward."""
    copy = said.clone()
    for one in (one for draft in drafts.values() for one in draft if one.main is said):
        one.main = copy
