"""What a member said at many positions, kept in the blocks it came in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from deepen_ext.members.distribution import Distribution, joined
from deepen_ext.ops.topk_softmax import TopK, check_status


class SaidRows:
    """A member's distributions, numbered from 0 as they were added, and their most probable tokens.

    As a main model's, `written`, they have probability 0 for what cannot be written.
    """

    def __init__(self, unwritable: torch.Tensor) -> None:
        self._unwritable = unwritable
        self._blocks: list[Distribution] = []
        self._begins: list[int] = []
        # By k, device and `written`: of how many blocks, and their top-k one after the other.
        self._top: dict[tuple[int, torch.device, bool], tuple[int, Distribution]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, block: Distribution) -> range:
        """Keep these; returns their numbers."""
        self._blocks.append(block)
        self._begins.append(self._count)
        self._count += len(block)
        return range(self._count - len(block), self._count)

    def take(self, numbers: Sequence[int], *, written: bool = False) -> Distribution:
        """The distributions of these numbers: read only, a view where they follow one another in a block."""
        found = []
        for i, group in groupby(numbers, key=lambda number: bisect_right(self._begins, number) - 1):
            found.append(self._blocks[i].at([number - self._begins[i] for number in group]))
        taken = joined(found)
        return taken.without(self._unwritable) if written else taken

    def top(self, numbers: Sequence[int], k: int, device: torch.device, *, written: bool = False) -> TopK:
        """The k most probable tokens of these, on a device; each is looked at once for every k."""
        done, found = self._top.get((k, device, written), (0, None))
        if done < len(self._blocks):
            parts = [] if found is None else [found]
            for begin, block in zip(self._begins[done:], self._blocks[done:], strict=True):
                said = block.top(k)
                topk = (said.without(self._unwritable) if written else said).topk
                status = topk.status.tolist()
                check_status(f"logits of {block.name}", status, range(begin, begin + len(status)))
                moved = TopK(*(one.to(device) for one in topk))
                parts.append(replace(said, logits=None, known_topk=moved))
            found = joined(parts)
            self._top[k, device, written] = len(self._blocks), found
        assert found is not None
        return found.at(numbers).topk
