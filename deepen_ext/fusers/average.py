"""The plain average: what assistants say in relative space, added to the main model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from deepen_ext.errors import InputError
from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.deepen import check_maps, needed_rows
from deepen_ext.fusers.ingredients import Common, Ingredients
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.settings import check_min_probability
from deepen_ext.space.relative_map import RelativeMap

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AverageFuser(Fuser):
    """``p = w_0 p_0 + sum_i w_i r_i``: relative representations without a search.

    The assistants' ``r_i = p_i R_i`` are those of DeePEn; an anchor's share goes to the main model's token
    for that anchor. The main model's distribution stays as it is, also on tokens that are no anchors.
    """

    name: ClassVar[str] = "average"
    uses_maps: ClassVar[bool] = True
    assistants_need_logits: ClassVar[bool] = False

    def __init__(
        self,
        maps: Sequence[RelativeMap],
        anchor_ids: torch.Tensor,
        *,
        min_probability: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        """Check the settings.

        Args:
            maps: relative maps of sparse rows, the main model's first.
            anchor_ids: int64 [A], the main model's token for each anchor.
            min_probability: less probable tokens count as their member's tail, spread over all anchors.
            common: candidates, rule, names: see `Fuser`.
        """
        if not maps or any(one.is_dense for one in maps):
            raise InputError("the average needs relative maps of sparse rows, the main model's first")
        super().__init__([one.vocab_size for one in maps], maps[0].device, **common)
        check_maps(maps)
        self.maps = list(maps)
        self.min_probability = check_min_probability(min_probability)
        self._anchor_ids = anchor_ids.to(self.device)
        self._anchors_by_token = torch.full((maps[0].vocab_size,), -1, device=self.device)
        self._anchors_by_token[self._anchor_ids] = torch.arange(len(anchor_ids), device=self.device)

    @classmethod
    def make(cls, given: Ingredients) -> AverageFuser:
        """See `Fuser.make`."""
        maps, least = given.relative_maps, given.settings.min_probability
        return cls(maps.maps, maps.anchors.token_ids[0], min_probability=least, **given.common)

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`."""
        fused = said[0].probabilities() * weights[:, :1]
        for i, one in enumerate(said[1:], start=1):
            fused[:, self._anchor_ids] += weights[:, i : i + 1] * self._relative(one)
        logits.copy_(fused.log())
        return logits.argmax(dim=-1).int()

    def logprobs(self, said: Sequence[Said], weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Fuser.logprobs`. Of ``r_i`` one entry is needed: that of the token's anchor."""
        rows = torch.arange(len(tokens), device=self.device)
        found, total = weights[:, 0] * said[0].logprobs(rows, tokens).exp(), weights[:, 0].double()
        anchors = self._anchors_by_token[tokens]
        for i, one in enumerate(said[1:], start=1):
            every, columns, mass = self._spread(one)
            entry = every + (mass * (columns == one.taken(anchors)[:, None])).sum(dim=1)
            found += weights[:, i] * one.placed(entry) * (anchors >= 0)
            # 1 up to the rounding of the rows
            total += weights[:, i] * one.placed(
                every.double() * self.maps[one.member].anchors + mass.sum(dim=1)
            )
        return (found / total).log()

    def _relative(self, said: Said) -> torch.Tensor:
        """r = p R, float32 [b, A]."""
        every, columns, mass = self._spread(said)
        found = every[:, None].repeat(1, self.maps[said.member].anchors)
        return said.placed(found.scatter_add_(1, columns.clamp(min=0).long(), mass))

    def _spread(self, said: Said) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """r = p R of the part's rows as what its rows share out.

        Returns:
            what every anchor gets, float32 [n]; anchors int32 [n, entries], -1 for none; what these get
            beside it, float32 [n, entries], 0 for none.
        """
        relative, topk = self.maps[said.member], said.part.topk
        rows = needed_rows(relative, said, self.min_probability)
        assert rows.columns is not None
        assert rows.rest is not None
        anchors = relative.anchors
        counts = topk.probs >= self.min_probability
        counts[:, 0] = True
        probs = topk.probs * counts
        tail = topk.tail + (topk.probs * ~counts).sum(dim=1)
        ids = torch.where(counts, topk.ids, topk.ids[:, :1]).long()  # rows that are surely known
        columns, values, rest = rows.columns[ids], rows.values[ids], rows.rest[ids]
        named = columns >= 0
        uniform = rest / (anchors - named.sum(dim=-1)).clamp(min=1)
        mass = probs[..., None] * (values - uniform[..., None]) * named
        every = (probs * uniform).sum(dim=1) + tail / anchors
        return every, columns.flatten(1), mass.flatten(1)
