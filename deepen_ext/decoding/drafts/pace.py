"""How far to write ahead, and who writes: decided by measured times and by how often drafts stood.

A cycle writes some tokens ahead and has them verified. Going on with one more token costs a forward of the
main model, and makes the verification longer. It gains a token where all tokens before it stand. So it pays
while

    sum over texts of P(the draft stands so far) * r  >  write + read(w + 1) - read(w),

r the milliseconds that a token costs at the present pace, read(w) the verification of w tokens a text: the
one-step rule of renewal-reward theory for when to end a cycle. All of it is estimated, and what is gained by
a narrow margin may as well be lost: the left side has to be larger by a tenth.

Where the length has to be known beforehand (a member writes, or the main model on a device that the host
does not wait for), it is the one of the fewest milliseconds a token: with a the share of tokens that stand, a
draft of g tokens takes (g + 1) * write + read(g + 1) and gives 1 + a + ... + a^g of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deepen_ext.decoding.accept import Accepted
from deepen_ext.decoding.assistants import AssistedStep
from deepen_ext.decoding.drafts.draft_settings import LONGEST, LOOKUP, MAIN, DraftSettings
from deepen_ext.decoding.observed.acceptance import expected_tokens
from deepen_ext.decoding.observed.history import FUSION
from deepen_ext.decoding.places import Ahead, Draft
from deepen_ext.decoding.team import Team

MOST_OFFERED = 8  # tokens that are written ahead where the length is chosen beforehand
_CLEARLY = 0.9  # by this much the other way has to be cheaper: estimates are no measurements
_PLAIN_EVERY = 16  # cycles with drafts, after which one has none: what that costs is measured again
_WARM_UP = 2  # forward passes of a shape on CUDA: one as it is, and one that is captured
_FADE = 0.9  # of a cycle's weight in the average time of a token, with each later cycle


@dataclass(frozen=True)
class Plan:
    """Who writes a cycle's draft, and how many tokens; None where `Pace.goes_on` decides token by token."""

    drafter: int
    length: int | None


class Pace:
    """Of one run."""

    def __init__(self, team: Team, settings: DraftSettings, *, sampled: bool, at_once: bool) -> None:
        """Nothing is known but what the team's earlier runs found out.

        Args:
            team: of the run.
            settings: what was asked for.
            sampled: whether tokens are drawn.
            at_once: the main model writes a draft of a length known beforehand.
        """
        self._at_once = at_once
        self.settings = settings
        self._team = team
        self._history = team.histories[sampled]
        self._assistants = list(range(1, len(team.members)))
        self._learns = settings.length is None
        self._warm_up = 0 if team.device.type == "cpu" else _WARM_UP
        # Most tokens that others than the main model write: more after drafts that stood, fewer after a miss.
        self._longest: dict[int, int] = {}
        self._unread: dict[int, int] = {}  # main tokens of each text since the assistants read it last

    def leave_out(self, member: int) -> None:
        """This assistant is not asked any more. Where nobody else may write drafts, the main model does."""
        self._assistants = [i for i in self._assistants if i != member]
        left = tuple(one for one in self.settings.drafters if one != member)
        self.settings = replace(self.settings, drafters=left or (MAIN,))

    def forget(self, text: int) -> None:
        """The text has ended."""
        self._unread.pop(text, None)

    def plan(self, lanes: int, looked_up: Sequence[int]) -> Plan:
        """Who writes the next draft.

        Args:
            lanes: number of texts.
            looked_up: of each of them, how many tokens prompt lookup has.
        """
        drafters, length = self.settings.drafters, self.settings.length
        if length is not None:
            return Plan(drafters[0], length)
        with self._history.lock:
            # With drafts at once, those of the main model are compared with none, not with the present pace.
            rate = self._rate_alone(lanes) if self._at_once else self._rate(lanes)
            if rate is None or self._history.drafting.get(lanes, 0) >= _PLAIN_EVERY:  # to be measured (again)
                return Plan(MAIN, 0)
            if MAIN in drafters and not self._at_once:
                # It may not have drafted yet; then the others are compared with what its drafts would cost.
                rate = min([rate, *(expected for _, expected in self._rates_at_once(lanes))])
            best = Plan(MAIN, None if MAIN in drafters and not self._at_once else 0)
            for drafter in drafters:
                for tokens, expected in self._expected_rates(drafter, lanes, looked_up):
                    if expected < rate * _CLEARLY:
                        best, rate = Plan(drafter, tokens), expected / _CLEARLY
            return best

    def goes_on(self, drafts: Mapping[int, Draft], going: Sequence[int], length: int | None) -> bool:
        """Whether the main model writes on after these drafts.

        Args:
            drafts: of all texts of the cycle.
            going: the texts whose drafts can go on.
            length: of the cycle's `Plan`.
        """
        opened = max(sum(one.place.is_open for one in draft) for draft in drafts.values())
        if length is not None:
            return opened <= length
        with self._history.lock:
            lanes, width = len(drafts), self._width(drafts)
            rate, write = self._rate(lanes), self._history.cost(MAIN).ms(len(going), 1)
            now, then = self._read_ms(lanes, width), self._read_ms(lanes, width + 1)
            if rate is None or write is None or now is None or then is None or opened > LONGEST:
                return False
            accepted = self._history.accepted(MAIN)
            gain = 0.0
            for number in going:
                stands = 1.0
                for one in drafts[number]:
                    if one.place.is_open:
                        stands *= accepted.chance(one.margin)
                gain += stands
            return gain * rate * _CLEARLY > write + then - now

    def read(self, lanes: int, width: int, ms: float) -> None:
        """A forward of the main model, of so many lanes and tokens a lane, took so long."""
        if self._learns:
            with self._history.lock:
                self._history.cost(MAIN).add(lanes, width, ms, warm_up=self._warm_up)

    def learn(
        self,
        ahead: Ahead,
        step: AssistedStep,
        accepted: Sequence[Accepted],
        *,
        verified_ms: float,
        cycle_ms: float,
    ) -> None:
        """A cycle is done.

        Args:
            ahead: its drafts.
            step: their verification.
            accepted: the tokens that were written.
            verified_ms: what verification and choice took.
            cycle_ms: what all took.
        """
        if not self._learns:
            return
        with self._history.lock:
            self._learn_costs(ahead.drafts, step, verified_ms)
            self._learn_acceptance(ahead, step, accepted)
            lanes = len(ahead.drafts)
            self._history.drafting[lanes] = self._history.drafting.get(lanes, 0) + 1 if ahead.drafted else 0
            if ahead.drafter == MAIN:
                spent, tokens = self._history.spent.get(lanes, (0.0, 0.0))
                self._history.spent[lanes] = (spent * _FADE + cycle_ms, tokens * _FADE + len(accepted))
        for number, kept in Counter(one.proposal.place.text for one in accepted).items():
            asked = [i for i, one in enumerate(ahead.drafts[number][:kept]) if one.place.is_open]
            self._unread[number] = kept - 1 - asked[-1] if asked else self._unread.get(number, 0) + kept

    def _learn_costs(self, drafts: Mapping[int, Draft], step: AssistedStep, ms: float) -> None:
        if not any(one.place.is_open for draft in drafts.values() for one in draft):
            return
        # Of all texts, those that need no verification among them: so every width of a batch is found again.
        lanes, width = len(drafts), self._width(drafts)
        by_member = {i: own for i, own in enumerate(step.members_ms.values(), start=1) if own}
        if step.fused.logits.device.type != "cpu":
            # There forward passes are only queued, and done when the tokens are read: each gets its share.
            by_member = {i: ms / len(by_member) for i in by_member}
        for who, spent in by_member.items():
            self._history.cost(who).add(lanes, width, spent, warm_up=self._warm_up)
        rest = max(ms - sum(by_member.values()), 0.0)
        self._history.cost(FUSION).add(lanes, width, rest, warm_up=self._warm_up)

    def _learn_acceptance(self, ahead: Ahead, step: AssistedStep, accepted: Sequence[Accepted]) -> None:
        """Of who wrote, what stood. Of who did not, whether it would have written that token."""
        history, drafter = self._history, ahead.drafter
        opened, every = history.opened
        count = sum(one.proposal.place.is_open for one in accepted)
        history.opened = (opened * _FADE + count, every * _FADE + len(accepted))
        history.forget_offers(len(accepted) // len(ahead.drafts))
        offers = [one.token == one.proposal.offered for one in accepted if one.proposal.offered is not None]
        for stood in offers:
            history.saw_offer(drafter, stood)
        if offers:
            longer = 2 * self._longest.get(drafter, 1) if all(offers) else sum(offers) // len(ahead.drafts)
            self._longest[drafter] = max(1, min(longer, MOST_OFFERED))
        for one in accepted:
            proposal = one.proposal
            if proposal.place.is_open:
                guess = proposal.token if proposal.own is None else proposal.own
                history.accepted(MAIN).see(proposal.margin, one.token == guess)
            found = ahead.looked_up.get(proposal.place.text)
            if drafter != LOOKUP and found and proposal is ahead.drafts[proposal.place.text][0]:
                history.accepted(LOOKUP).see(0.0, one.token == found[0])
        if step.fused.logits.device.type != "cpu":
            return  # to look would be to wait for the device
        written = {one.row: self._team.main.vocabulary.bytes_of(one.token) for one in accepted}
        for part in step.fused.parts[1:]:
            if part.member not in self.settings.drafters or part.member == drafter:
                continue
            tokens = self._team.members[part.member].vocabulary
            for row, token in zip(part.rows, part.topk.ids[:, 0].tolist(), strict=True):
                if row in written:
                    agrees = begins_alike(tokens.bytes_of(token), written[row])
                    history.accepted(part.member).see(0.0, agrees)

    def _rate(self, lanes: int) -> float | None:
        """Milliseconds that a token costs, over all texts: as measured, and no more than without drafts."""
        alone = self._rate_alone(lanes)
        spent, tokens = self._history.spent.get(lanes, (0.0, 0.0))
        return alone if alone is None or not tokens else min(alone, spent / tokens)

    def _rate_alone(self, lanes: int) -> float | None:
        """The same without drafts."""
        write, read = self._history.cost(MAIN).ms(lanes, 1), self._read_ms(lanes, 1)
        if write is None or read is None:
            return None
        opened, every = self._history.opened
        needed = 1 - (1 - opened / every) ** lanes  # whether there is anything to verify
        return (write + read * needed) / lanes

    def _read_ms(self, lanes: int, width: int, but: int | None = None) -> float | None:
        """Verification of so many tokens a text, by all assistants but one."""
        if not self._assistants:
            return 0.0
        costs = (self._history.costs.get(who) for who in (*self._assistants, FUSION) if who != but)
        known = [ms for one in costs if one is not None and (ms := one.ms(lanes, width)) is not None]
        return sum(known) if known else None

    def _width(self, drafts: Mapping[int, Draft]) -> int:
        """How many main tokens the assistants have to read, of the text with the most of them."""
        widths = [1]
        for number, draft in drafts.items():
            asked = [i for i, one in enumerate(draft) if one.place.is_open]
            if asked:
                widths.append(self._unread.get(number, 0) + asked[-1] + 1)
        return max(widths)

    def _expected_rates(
        self, drafter: int, lanes: int, looked_up: Sequence[int]
    ) -> Iterator[tuple[int, float]]:
        """Milliseconds a token with drafts of 1, 2, ... tokens, where the length is chosen beforehand."""
        if drafter == MAIN:
            yield from self._rates_at_once(lanes) if self._at_once else ()
            return
        history, stands = self._history, self._history.offers_stand(drafter)
        most = self._longest.get(drafter, 1)
        if drafter == LOOKUP:
            most = min(most, max(looked_up))
        # The place after its last token is one that a member has to be asked about, too.
        writing = 0.0 if drafter == LOOKUP else history.cost(drafter).ms(lanes, 1)
        for length in range(1, most + 1):
            read = history.cost(MAIN).ms(lanes, length + 1)
            verified = self._read_ms(lanes, length + 1, but=drafter)
            if writing is None or read is None or verified is None or math.inf in (read, verified):
                return
            lengths = [min(own, length) for own in looked_up] if drafter == LOOKUP else [length] * lanes
            tokens = sum(expected_tokens(stands, own) for own in lengths)
            yield length, (writing * (length + 1) + read + verified) / tokens

    def _rates_at_once(self, lanes: int) -> Iterator[tuple[int, float]]:
        """The same of the main model, which writes one token more than it drafts: the choice after them.

        Where it decides token by token it does better than this.
        """
        opened, every = self._history.opened
        share = opened / every  # of places that an assistant is asked about; at the others a token stands
        stands = 1 - share * (1 - self._history.accepted(MAIN).mean)
        write = self._history.cost(MAIN).ms(lanes, 1)
        for length in range(1, MOST_OFFERED + 1):
            read = self._read_ms(lanes, length + 1)
            if write is None or read is None or math.isinf(read):
                return
            tokens = lanes * expected_tokens(stands, length)
            needed = 1 - (1 - share) ** (lanes * (length + 1))  # whether there is anything to verify
            yield length, (write * (length + 1) + read * needed) / tokens


def begins_alike(one: bytes, other: bytes) -> bool:
    """Whether two tokens' texts may go on to the same text."""
    return bool(one and other) and (one.startswith(other) or other.startswith(one))
