"""What every fuser needs that looks tokens up in other members' vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.ingredients import Common, Ingredients

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class BridgedFuser(Fuser):
    """A fuser with a `TokenBridge`."""

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        bridge: TokenBridge,
        device: torch.device,
        **common: Unpack[Common],
    ) -> None:
        """See `Fuser`."""
        super().__init__(vocab_sizes, device, **common)
        self._bridge = bridge

    @classmethod
    def make(cls, given: Ingredients) -> Self:
        """See `Fuser.make`."""
        return cls(given.vocab_sizes, given.bridge(), given.device, **given.common)
