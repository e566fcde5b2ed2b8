"""What rules look at: how sure members are of a token, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.parts import Said


def entropies(said: Sequence[Said]) -> torch.Tensor:
    """Of what each member says, in nats, float32 [b, n].

    The tail of a top-k counts as k more tokens of one probability: whatever the vocabulary's size, a member
    that knows nothing has about the same entropy.
    """
    columns = []
    for one in said:
        tail = one.topk.tail.clamp(min=0)
        in_tail = torch.special.entr(tail) + tail * math.log(one.topk.probs.shape[1])
        columns.append(torch.special.entr(one.topk.probs).sum(dim=-1) + in_tail)
    return torch.stack(columns, dim=1)


def margins(said: Sequence[Said]) -> torch.Tensor:
    """How far each member's first choice is ahead of its second, as probabilities, float32 [b, n]."""
    return torch.stack([one.topk.probs[:, 0] - one.topk.probs[:, 1:2].sum(dim=1) for one in said], dim=1)


class Agreement:
    """Whether each member's first choice is the main model's, or a text that begins with it."""

    def __init__(self, bridge: TokenBridge) -> None:
        self._bridge = bridge
        self._tables: dict[int, torch.Tensor] = {}

    def __call__(self, said: Sequence[Said]) -> torch.Tensor:
        """Bool [b, n]; the main model agrees with itself."""
        first = said[0].topk.ids[:, 0].long()
        columns = [torch.ones_like(first, dtype=torch.bool)]
        for one in said[1:]:
            if one.member not in self._tables:
                self._tables[one.member] = self._bridge.table(one.member, 0).to(first.device)
            columns.append(self._tables[one.member][one.topk.ids[:, 0].long()] == first)
        return torch.stack(columns, dim=1)
