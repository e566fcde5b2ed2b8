"""What a team's runs found out about the members' speed and about drafts, for the runs that follow."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepen_ext.decoding.observed.acceptance import Acceptance
from deepen_ext.decoding.observed.costs import Costs

FUSION = -1  # among the costs of reading: what is no member's


@dataclass
class History:
    """What a team's runs found out, for those that follow.

    Attributes:
        costs: of reading and writing, by member index and `FUSION`.
        acceptance: of each drafter's tokens (`MAIN`, `LOOKUP`, member indices).
        spent: milliseconds and tokens of recent cycles, fading, by number of lanes.
        opened: of recent tokens, fading, those that an assistant could change, and all.
    """

    costs: dict[int, Costs] = field(default_factory=dict)
    acceptance: dict[int, Acceptance] = field(default_factory=dict)
    spent: dict[int, tuple[float, float]] = field(default_factory=dict)
    opened: tuple[float, float] = (1.0, 1.0)

    def cost(self, who: int) -> Costs:
        """Of this member, or `FUSION`."""
        return self.costs.setdefault(who, Costs())

    def accepted(self, drafter: int) -> Acceptance:
        """Of this drafter."""
        return self.acceptance.setdefault(drafter, Acceptance())
