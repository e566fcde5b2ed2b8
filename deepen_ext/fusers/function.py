"""A function of the caller's in place of a fuser."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deepen_ext.errors import InputError
from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.ingredients import Common, Ingredients
from deepen_ext.fusers.mapped import MappedFuser
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.settings import FuseFunction

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_arguments(function: FuseFunction) -> None:
    """Seen before models are loaded, and not at the first token.

    Raises:
        InputError: the function cannot be called with three arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are built in have none
        return
    try:
        signature.bind("logits", "said", "weights")
    except TypeError as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise InputError(
            f"the fuser {name} takes {signature}, but is called with (logits, said, weights): {error}"
        ) from error


class FunctionFuser(MappedFuser):
    """Calls a function of the caller's: (logits, said, weights) -> new logits."""

    def __init__(
        self,
        function: FuseFunction,
        vocab_sizes: Sequence[int],
        bridge: TokenBridge,
        device: torch.device,
        **common: Unpack[Common],
    ) -> None:
        """See `Fuser`.

        Args:
            function: (logits [b, V_main], said, weights float32 [b, n]) -> new logits [b, V_main], of rows in
                which some assistant speaks. `said` is what each member says (`Said`), the main model first;
                a member with weight 0 says nothing of that row. Its logits and weights may be written to.
                What the logits have as -inf cannot be written and stays so, whatever the function gives.
            vocab_sizes: see `Fuser`.
            bridge: for `Said.on_main`.
            device: see `Fuser`.
            common: candidates, rule, names: see `Fuser`.
        """
        super().__init__(vocab_sizes, bridge, device, **common)
        self.function = function

    @classmethod
    def make(cls, given: Ingredients) -> FunctionFuser:
        """See `Fuser.make`. Nothing is looked up here, on CUDA either: few functions call `Said.on_main`."""
        function = given.settings.fuser
        assert not isinstance(function, str)
        return cls(function, given.vocab_sizes, given.bridge(), given.device, **given.common)

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`.

        Raises:
            InputError: the function gives something else than logits of the same shape.
        """
        forbidden = logits == -torch.inf  # cannot be written: not by the function's leave either
        # A copy: these weights are kept for the steps that follow.
        given = self.function(logits, [replace(one, to_main=self._on_main) for one in said], weights.clone())
        if not isinstance(given, torch.Tensor) or given.shape != logits.shape:
            what = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise InputError(f"the fuser gave {what}; it must return logits of shape {list(logits.shape)}")
        if given.device.type == "cpu" and bool(given.isnan().any()):
            raise InputError("the fuser gave NaN; it must return logits, with -inf for what is impossible")
        if given is not logits:
            logits.copy_(given)
        logits.masked_fill_(forbidden, -torch.inf)
        return logits.argmax(dim=-1).int()

    def _on_main(self, said: Said) -> torch.Tensor:
        return self.mapped(said) if said.member else said.probabilities()
