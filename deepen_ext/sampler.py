"""From the main model's new logits to one token for each row; the warpers are transformers' own."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from deepen_ext.errors import InputError
from deepen_ext.fusion import FusedStep


class Sampler:
    """Greedy, or temperature and top-p sampling with a seed of its own."""

    def __init__(
        self,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Check the settings; `device` is the logits', and each has its own sequence for a seed.

        Raises:
            InputError: temperature not above 0 or top_p not in (0, 1].
        """
        if not 0 < temperature <= 100:
            raise InputError(
                f"temperature is {temperature}; choose above 0 to 100, or do_sample=False for greedy"
            )
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}; choose above 0 to 1")
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList()
        if not do_sample:
            return
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        if temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, fused: FusedStep) -> torch.Tensor:
        """One token id for each row, int64 [B], where the logits are. Nothing waits for a CUDA device."""
        if self._generator is None:
            return fused.chosen.long()
        # The warpers here look at the scores alone; the token ids they take are for repetition penalties.
        ids = torch.empty(len(fused.logits), 0, dtype=torch.long, device=fused.logits.device)
        scores = self._warpers(ids, fused.logits.float())  # type: ignore[arg-type]
        # What torch.multinomial computes for one draw, without its look at the probabilities: on CUDA that
        # ends the whole process for a row of NaN, which the status of the step reports as an error instead.
        probs = torch.softmax(scores, dim=-1)
        noise = torch.empty_like(probs).exponential_(1, generator=self._generator)
        return probs.div_(noise).argmax(dim=-1)
