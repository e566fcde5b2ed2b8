"""Two small fusers: the main model alone, and a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deepen_ext.errors import InputError
from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.parts import FusedStep, Part, Said

# (main model's logits [b, V_main], what the members say, weights float32 [b, n]) -> new logits [b, V_main]
FuseFunction = Callable[[torch.Tensor, Sequence[Said], torch.Tensor], torch.Tensor]


class SingleFuser(Fuser):
    """The main model alone, on the same loop: what every ensemble is compared with."""

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """Nothing to fuse."""
        return said[0].topk.ids[:, 0]

    def step_parts(
        self,
        parts: Sequence[Part],
        weights: Sequence[float] | Sequence[Sequence[float]],
    ) -> FusedStep:
        """The main model's logits as they are."""
        choice = parts[0].topk.ids[:, 0]
        return FusedStep(parts[0].said.scores(), choice, choice, tuple(parts[:1]))


class FunctionFuser(Fuser):
    """A function of the caller's in the place of the fusion."""

    def __init__(
        self,
        function: FuseFunction,
        vocab_sizes: Sequence[int],
        device: torch.device,
        *,
        candidates: int = 128,
        confidence: float = 0.0,
        names: Sequence[str] | None = None,
    ) -> None:
        """See `Fuser`.

        Args:
            function: (logits [b, V_main], said, weights float32 [b, n]) -> new logits [b, V_main], of rows in
                which some assistant speaks. `said` is what each member says (`Said`), the main model first;
                a member with weight 0 says nothing of that row. Its logits may be written to. What they have
                as -inf cannot be written and stays so, whatever the function gives.
            vocab_sizes: see `Fuser`, as the rest.
        """
        super().__init__(vocab_sizes, device, candidates=candidates, confidence=confidence, names=names)
        self._function = function

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`.

        Raises:
            InputError: the function gives something else than logits of the same shape.
        """
        forbidden = logits == -torch.inf  # cannot be written: not by the function's leave either
        given = self._function(logits, said, weights)
        if not isinstance(given, torch.Tensor) or given.shape != logits.shape:
            what = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise InputError(f"the fuser gave {what}; it must return logits of shape {list(logits.shape)}")
        if given.device.type == "cpu" and bool(given.isnan().any()):
            raise InputError("the fuser gave NaN; it must return logits, with -inf for what is impossible")
        if given is not logits:
            logits.copy_(given)
        logits.masked_fill_(forbidden, -torch.inf)
        return logits.argmax(dim=-1).int()
