"""DeePEn itself: average in relative space, inverse search (arXiv 2404.12715, sections 3.2 to 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from deepen_ext import ops
from deepen_ext.errors import InputError
from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.ingredients import Common, Ingredients
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.search_bound import SearchBound
from deepen_ext.fusers.settings import check_learning_rate, check_min_probability, check_steps
from deepen_ext.ops.fuse import MOST_MEMBERS
from deepen_ext.ops.rows import RelativeRows
from deepen_ext.ops.topk_softmax import TopK
from deepen_ext.space.relative_map import RelativeMap

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DeepenFuser(Fuser):
    """DeePEn; see `fuse_logits` for the mathematics.

    A token whose probability is below `min_probability` is not worth its row: it counts as part of its
    member's tail, and is no candidate. Whether a row happens to be known already never matters, so results do
    not depend on what is cached.

    On CUDA a step is launches alone: it never waits for the device, reads nothing back, and after a first
    step copies nothing there, so that a CUDA graph can capture it. Missing rows are all computed by the first
    step (or before, by `RelativeMap.fill`).
    """

    name: ClassVar[str] = "deepen"
    uses_maps: ClassVar[bool] = True
    uses_recipe: ClassVar[bool] = True
    assistants_need_logits: ClassVar[bool] = False
    main_needs_logits: ClassVar[bool] = False

    def __init__(
        self,
        maps: Sequence[RelativeMap],
        *,
        learning_rate: float,
        steps: int = 5,
        min_probability: float = 0.0,
        log_probs: bool = True,
        **common: Unpack[Common],
    ) -> None:
        """Check the settings.

        Args:
            maps: of each member, the main model's first.
            learning_rate: eta of the inverse search, above 0 to 10.
            steps: T of the inverse search, 1 to 64.
            min_probability: see above.
            log_probs: search on the main model's log-probabilities: a constant added to its logits then
                changes nothing. False: on its logits as they are, as in the paper.
            common: candidates, rule, names: see `Fuser`.

        Raises:
            InputError: a setting out of range, or maps that do not fit together.
        """
        if not maps:
            raise InputError("there are no relative maps; give one for each member, the main model's first")
        if len(maps) > MOST_MEMBERS:
            raise InputError(
                f"there are {len(maps)} members, and the search fuses at most {MOST_MEMBERS}: leave some "
                "out, or use fuser='union-vocab'"
            )
        super().__init__([one.vocab_size for one in maps], maps[0].device, **common)
        self.min_probability = check_min_probability(min_probability)
        check_maps(maps)
        self.maps = list(maps)
        self.learning_rate = check_learning_rate(learning_rate)
        self.steps = check_steps(steps)
        self.log_probs = log_probs

    @classmethod
    def make(cls, given: Ingredients) -> DeepenFuser:
        """See `Fuser.make`."""
        settings = given.settings
        return cls(
            given.relative_maps.maps,
            learning_rate=settings.learning_rate,
            steps=settings.steps,
            min_probability=settings.min_probability,
            log_probs=settings.recipe != "paper",
            **given.common,
        )

    def search_bound(self) -> SearchBound:
        """See `Fuser.search_bound`."""
        return SearchBound.of(self.learning_rate, self.steps, log_probs=self.log_probs)

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """One fusion step; see `Fuser.fuse`."""
        main, *assistants = said
        rows = needed_rows(self.maps[main.member], main, self.min_probability)
        return self._search(logits, main.topk, rows, assistants, weights)[1]

    def logprobs(self, said: Sequence[Said], weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Fuser.logprobs`. Only candidates move: the step runs over a vocabulary of them alone."""
        main, *assistants = said
        rows = torch.arange(len(tokens), device=self.device)
        candidates = main.topk.ids.long()
        found: tuple[torch.Tensor, torch.Tensor] = candidates.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        ids, numbers = found
        logits = main.logits_at(rows[:, None], ids).float()
        every = needed_rows(self.maps[main.member], main, self.min_probability)
        own = every._replace(
            columns=None if every.columns is None else every.columns[ids],
            values=every.values[ids],
            rest=None if every.rest is None else every.rest[ids],
        )
        fused = self._search(logits, main.topk._replace(ids=numbers.int()), own, assistants, weights)[
            0
        ].double()
        # What no candidate has keeps its logits.
        others = main.log_sums() + main.topk.tail.double().clamp(min=0).log()
        total = torch.logaddexp(others, fused.logsumexp(dim=1))
        same = candidates == tokens[:, None]
        moved = fused.gather(1, same.int().argmax(dim=1, keepdim=True))[:, 0]
        return torch.where(same.any(dim=1), moved, main.logits_at(rows, tokens)) - total

    def _search(
        self,
        logits: torch.Tensor,
        candidates: TopK,
        rows: RelativeRows,
        assistants: Sequence[Said],
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`ops.fuse` with the main model's logits, candidates and relative rows.

        Where a rule of weighing leaves the main model alone its logits stay as they are. A search without a
        gradient would still move the candidates, by weight decay and rounding noise.
        """
        heard = [
            ops.FuseInput(one.topk, needed_rows(self.maps[one.member], one, self.min_probability))
            for one in assistants
        ]
        alone = None if self.rule is None else (weights[:, 1:] == 0).all(dim=1)
        if alone is not None and alone.device.type == "cpu" and not bool(alone.any()):
            alone = None  # on CUDA to look would be to wait
        if alone is not None:
            # On CUDA a row without a softmax may have any ids: it is refused when its token is read.
            ids = candidates.ids.long().clamp(0, logits.shape[1] - 1)
            before = logits.gather(1, ids)
        fused, chosen = ops.fuse(
            logits,
            [ops.FuseInput(candidates, rows), *heard],
            weights,
            learning_rate=self.learning_rate,
            steps=self.steps,
            min_probability=self.min_probability,
            log_probs=self.log_probs,
        )
        if alone is None:
            return fused, chosen
        logits.scatter_(1, ids, torch.where(alone[:, None], before, logits.gather(1, ids)))
        fused = torch.where(alone[:, None], before.float(), fused)
        return fused, torch.where(alone, candidates.ids[:, 0], chosen)


def check_maps(maps: Sequence[RelativeMap]) -> None:
    """Raise InputError unless the maps have the same anchors and are on one device."""
    anchors = {one.anchors for one in maps}
    if len(anchors) > 1:
        raise InputError(f"the relative maps have {sorted(anchors)} anchors; all must have the same ones")
    devices = {str(one.device) for one in maps}
    if len(devices) > 1:
        raise InputError(
            f"the relative maps are on {' and '.join(sorted(devices))}; move them to one device with .to()"
        )


def needed_rows(relative: RelativeMap, said: Said, min_probability: float) -> RelativeRows:
    """The map's rows, with those of every token said that counts computed."""
    if relative.device.type == "cuda":
        relative.fill()
    if not relative.is_complete:
        topk = said.part.topk
        # The most probable token always counts (the fuse operation keeps at least one).
        needed = topk.probs >= min_probability
        needed[:, 0] = True
        relative.ensure(topk.ids[needed])
    return relative.rows
