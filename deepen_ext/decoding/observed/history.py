"""What a team's runs found out about the members' speed and about drafts, for the runs that follow."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from deepen_ext.decoding.observed.acceptance import Acceptance
from deepen_ext.decoding.observed.costs import Costs

FUSION = -1  # among the costs of reading: what is no member's
_OFFERS = 16.0  # tokens of a drafter that count; older ones fade
_OFFERS_AGE = 64.0  # tokens of a text after which they have faded too
_PRIOR = 4.0  # tokens that what was only overheard counts for


@dataclass
class History:
    """What a team's runs found out, for those that follow.

    Attributes:
        costs: of reading and writing, by member index and `FUSION`.
        acceptance: of each drafter's tokens (`MAIN`, `LOOKUP`, member indices); of others than the main
            model, of tokens that they would have written.
        offered: of what others than the main model did write, how many stood, and how many; fading.
        spent: milliseconds and tokens of recent cycles, fading, by number of lanes.
        opened: of recent tokens, fading, those that an assistant could change, and all.
        drafting: by number of lanes, how many cycles had drafts since the last one without.
        lock: whoever reads or writes any of this holds it (`drafts.pace` does): threads may share a team.
    """

    costs: dict[int, Costs] = field(default_factory=dict)
    acceptance: dict[int, Acceptance] = field(default_factory=dict)
    offered: dict[int, tuple[float, float]] = field(default_factory=dict)
    spent: dict[int, tuple[float, float]] = field(default_factory=dict)
    opened: tuple[float, float] = (1.0, 1.0)
    drafting: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def cost(self, who: int) -> Costs:
        """Of this member, or `FUSION`."""
        return self.costs.setdefault(who, Costs())

    def accepted(self, drafter: int) -> Acceptance:
        """Of this drafter."""
        return self.acceptance.setdefault(drafter, Acceptance())

    def saw_offer(self, drafter: int, stood: bool) -> None:
        """A token that this drafter wrote was verified."""
        count, seen = self.offered.get(drafter, (0.0, 0.0))
        fade = 1 - 1 / _OFFERS
        self.offered[drafter] = (count * fade + stood, seen * fade + 1)

    def forget_offers(self, tokens: int) -> None:
        """So many tokens were written: what was seen of offers counts less, so that they are tried again."""
        fade = (1 - 1 / _OFFERS_AGE) ** tokens
        self.offered = {one: (count * fade, seen * fade) for one, (count, seen) in self.offered.items()}

    def offers_stand(self, drafter: int) -> float:
        """The chance that this drafter's next token stands.

        By those that it wrote; at first by those that it would have written. These say too much where the
        main model's tokens are longer than the drafter's.
        """
        count, seen = self.offered.get(drafter, (0.0, 0.0))
        return (count + _PRIOR * self.accepted(drafter).mean) / (seen + _PRIOR)
