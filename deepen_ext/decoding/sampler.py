"""From the main model's new logits to a token for each text; processors and warpers are transformers' own."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from deepen_ext.decoding.settings import Settings
from deepen_ext.errors import InputError

# They look at the scores alone, and are the same for all texts.
_BATCHED = {
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
}


class Chooser:
    """The next token of each text of a batch: processors, warpers, then the most probable token or a draw.

    A text's token depends on its own scores, ids and seed alone, never on its batch mates.
    """

    def __init__(
        self, settings: Settings, prompts: Sequence[Sequence[int]], device: str | torch.device
    ) -> None:
        """Prepare one text for each prompt; text b draws by `settings.seed + b`.

        Args:
            settings: of the generation.
            prompts: of each text, in the main model's tokens.
            device: of the scores; a seed has another sequence on each kind of device.
        """
        self.settings = settings
        self._ids = [_TextIds(torch.device(device)) for _ in prompts]
        self._processors = [settings.processors(one, device, text) for text, one in enumerate(prompts)]
        self._generators: list[torch.Generator] = []
        if settings.do_sample:
            seed = secrets.randbits(60) if settings.seed is None else settings.seed
            self._generators = [
                torch.Generator(device).manual_seed(seed + text) for text in range(len(prompts))
            ]

    def processors(self, text: int) -> LogitsProcessorList:
        """The text's own, in order: processors, then warpers where something is drawn."""
        return self._processors[text]

    def choose(
        self,
        scores: torch.Tensor,
        texts: Sequence[int],
        ids: Sequence[Sequence[int]],
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token id for each of some texts, int64 [b], where the scores are.

        Nothing here waits for a CUDA device (a processor of the caller's might).

        Args:
            scores: the main model's new logits [b, V], in any float dtype; left as they are.
            texts: the numbers of the texts they are of, one for each row.
            ids: of each of them, prompt and new tokens so far.
            chosen: their argmax, if it is known: greedy decoding without processors then costs nothing.

        Raises:
            InputError: on the CPU, a text whose processors forbid every token or give NaN.
        """
        if not self.settings.do_sample and not self._processors[texts[0]]:
            return scores.argmax(dim=-1) if chosen is None else chosen.long()
        scores = self.processed(scores, texts, ids)
        on_cpu = scores.device.type == "cpu"
        if on_cpu:
            for text, best in zip(texts, scores.amax(dim=-1).tolist(), strict=True):
                if not math.isfinite(best):
                    raise InputError(
                        f"text {text}: the processors forbid every token, or give NaN; forbid fewer"
                    )
        if not self.settings.do_sample:
            return scores.argmax(dim=-1)
        probs = torch.softmax(scores, dim=-1)
        generators = [self._generators[text] for text in texts]
        return _draw_one_number(probs, generators) if on_cpu else _draw_noise(probs, generators)

    def processed(
        self, scores: torch.Tensor, texts: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """The scores after processors and, for sampling, warpers: float32 [b, V]; see `choose`."""
        # A copy, as in transformers: the caller's own processors may write into what they are given.
        scores = scores.to(torch.float32, copy=True)
        if not self._processors[texts[0]]:  # how many there are does not depend on the text
            return scores
        tokens = [self._ids[text].read(own) for text, own in zip(texts, ids, strict=True)]
        for processors in zip(*(self._processors[text] for text in texts), strict=True):
            if type(processors[0]) in _BATCHED:
                # The ids it takes are for repetition penalties and the like.
                scores = processors[0](tokens[0], scores)
                continue
            parts = [
                processor(own, scores[i : i + 1])
                for i, (processor, own) in enumerate(zip(processors, tokens, strict=True))
            ]
            scores = torch.cat(parts) if len(parts) > 1 else parts[0]
        return scores


def _draw_one_number(probs: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Where the running sum first exceeds a random share of the whole: one random number a text, not V."""
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    share = torch.cat([torch.rand(1, 1, dtype=torch.float64, generator=one) for one in generators])
    # Below the whole even after rounding. A token of probability 0 is never the first to exceed anything.
    wanted = share * (1 - 2**-50) * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(1)


def _draw_noise(probs: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """What torch.multinomial computes for one draw, without its look at the probabilities.

    On CUDA that look ends the whole process for a row of NaN, which the step's status reports as an error.
    """
    noise = torch.empty_like(probs)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(1, generator=generator)
    return probs.div_(noise).argmax(dim=-1)


class _TextIds:
    """One text's ids as a tensor; only what is new is copied.

    For CUDA they lie in pinned memory: a copy from there does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._length = 0
        self._buffer = torch.empty(0, dtype=torch.long)

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """The ids as int64 [1, L] on the device. They are those of the last call, and more of them."""
        start = self._length
        if len(ids) > len(self._buffer):
            start = 0
            self._buffer = torch.empty(2 * len(ids), dtype=torch.long, pin_memory=self._device.type == "cuda")
        self._buffer[start : len(ids)] = torch.tensor(ids[start:], dtype=torch.long)
        self._length = len(ids)
        return self._buffer[None, : len(ids)].to(self._device, non_blocking=True)
