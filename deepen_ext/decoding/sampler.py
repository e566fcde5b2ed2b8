"""From the main model's new logits to a token for each text; processors and warpers are transformers' own."""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, TopPLogitsWarper

from deepen_ext.decoding.processor_kinds import BATCHED, STATELESS
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.top_p import top_p
from deepen_ext.errors import InputError
from deepen_ext.members.asking import common_prefix


class Chooser:
    """The next token of each text of a batch: processors, warpers, then the most probable token or a draw.

    A text's token depends on its scores, its ids, the seed and the text's number alone. It does not depend on
    the other texts of the batch, nor on what was chosen before and dropped: a token's random numbers are a
    function of the seed, the text's number and how many new tokens come before the token.
    """

    def __init__(
        self, settings: Settings, prompts: Sequence[Sequence[int]], device: str | torch.device
    ) -> None:
        """Prepare one text for each prompt.

        Args:
            settings: of the generation.
            prompts: of each text, in the main model's tokens.
            device: of the scores; a seed gives other random numbers on each kind of device.

        Raises:
            InputError: a list of seeds that has not one for each prompt.
        """
        self.settings = settings
        self._prompt_lengths = [len(one) for one in prompts]
        self._ids = [_TextIds(torch.device(device)) for _ in prompts]
        self._processors = [settings.processors(one, device, text) for text, one in enumerate(prompts)]
        self._stateless = [
            LogitsProcessorList(one for one in own if type(one) in STATELESS) for own in self._processors
        ]
        self._seeds = _seeds_and_numbers(settings.seed, len(prompts))
        if settings.do_sample:
            self._generator = torch.Generator(device)

    @property
    def keeps_state(self) -> bool:
        """Whether what a processor gives may depend on its earlier calls.

        Then `choose` must be called once for each token of a text, in order, with one row for the text.
        Otherwise it may be called as often as needed, in any order.
        """
        return len(self._stateless[0]) < len(self._processors[0])  # the classes do not depend on the text

    @property
    def guesses_by_scores(self) -> bool:
        """Whether `propose` looks at the scores, and of the ids at nothing but how many there are."""
        return all(type(one) in BATCHED for one in self._stateless[0])

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
        """One token id for each row, int64 [b], where the scores are.

        A text may have several rows with different ids, such as the places of a draft, in any order.
        Nothing here waits for a CUDA device (a processor of the caller's might).

        Args:
            scores: the main model's new logits [b, V], in any float dtype; left as they are.
            texts: the number of the text of each row.
            ids: of each row, prompt and new tokens so far.
            chosen: their argmax, if it is known: greedy decoding without processors then costs nothing.

        Raises:
            InputError: on the CPU, a text whose processors forbid every token or give NaN.
        """
        return self._choose(self._processors, scores, texts, ids, chosen, check=scores.device.type == "cpu")

    def propose(
        self,
        scores: torch.Tensor,
        texts: Sequence[int],
        ids: Sequence[Sequence[int]],
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A guess for each row what `choose` will take there, for a draft; int64 [b], where the scores are.

        It is what `choose` takes of these scores, with the same random numbers, but without the processors
        that may keep a state: these must not see a token that may be dropped. Where processors forbid every
        token or give NaN, the guess is any token.

        Args:
            scores: the logits of the model that drafts [b, V], as in `choose`.
            texts: as in `choose`.
            ids: as in `choose`; the draft's tokens so far are among them.
            chosen: as in `choose`.
        """
        return self._choose(self._stateless, scores, texts, ids, chosen, check=False)

    def processed(
        self, scores: torch.Tensor, texts: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """The scores after processors and, for sampling, warpers: float32 [b, V]; see `choose`."""
        return self._processed(self._processors, scores, texts, ids)

    def share(self, text: int, length: int) -> float:
        """A random number of 0 to below 1 for a text's next token, beside those that draw the token itself.

        Args:
            text: its number.
            length: of its ids, prompt and new tokens so far.
        """
        seed = _seed_of(*self._seeds[text], length - self._prompt_lengths[text], b"share")
        return (seed >> 10) / 2**53

    def _choose(
        self,
        processors: Sequence[LogitsProcessorList],
        scores: torch.Tensor,
        texts: Sequence[int],
        ids: Sequence[Sequence[int]],
        chosen: torch.Tensor | None,
        *,
        check: bool,
    ) -> torch.Tensor:
        """`choose` with these processors of each text; with `check` its error, which waits for the scores."""
        if not self.settings.do_sample and not processors[texts[0]]:
            return scores.argmax(dim=-1) if chosen is None else chosen.long()
        scores = self._processed(processors, scores, texts, ids)
        if check:
            for text, best in zip(texts, scores.amax(dim=-1).tolist(), strict=True):
                if not math.isfinite(best):
                    raise InputError(
                        f"text {text}: the processors forbid every token, or give NaN; forbid fewer"
                    )
        if not self.settings.do_sample:
            return scores.argmax(dim=-1)
        seeds = [
            _seed_of(*self._seeds[text], len(own) - self._prompt_lengths[text])
            for text, own in zip(texts, ids, strict=True)
        ]
        return _draw(torch.softmax(scores, dim=-1), seeds, self._generator)

    def _processed(
        self,
        processors: Sequence[LogitsProcessorList],
        scores: torch.Tensor,
        texts: Sequence[int],
        ids: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        # A copy, as in transformers: the caller's own processors may write into what they are given.
        scores = scores.to(torch.float32, copy=True)
        of_rows: list[Any] = [processors[text] for text in texts]
        if all(type(one) in BATCHED for one in of_rows[0]):  # the classes do not depend on the text
            tokens = [torch.empty(1, 0, dtype=torch.long, device=scores.device)] * len(texts)  # not looked at
        else:
            tokens = [self._ids[text].read(own) for text, own in zip(texts, ids, strict=True)]
        for of_each in zip(*of_rows, strict=True):
            if type(of_each[0]) is TopPLogitsWarper and scores.device.type == "cpu":
                scores = top_p(of_each[0], scores)
                continue
            if type(of_each[0]) in BATCHED:
                scores = of_each[0](tokens[0], scores)
                continue
            parts = [
                processor(own, scores[i : i + 1])
                for i, (processor, own) in enumerate(zip(of_each, tokens, strict=True))
            ]
            scores = torch.cat(parts) if len(parts) > 1 else parts[0]
        return scores


def _seeds_and_numbers(seed: int | Sequence[int] | None, count: int) -> list[tuple[int, int]]:
    """Of each text, a seed, and its number among the texts that have this seed."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise InputError(f"{len(seed)} seeds for {count} prompts; give one for each, or one for all")
        return [(one, 0) for one in seed]
    seed = secrets.randbits(62) if seed is None else seed
    return [(seed, text) for text in range(count)]


def _seed_of(seed: int, text: int, position: int, use: bytes = b"") -> int:
    """The seed, of 63 bits, of one token's random numbers for some use: b"" for the draw of the token."""
    data = hashlib.blake2b(struct.pack("<qqq", seed, text, position), digest_size=8, person=use).digest()
    return int.from_bytes(data, "little") >> 1


def _draw(probs: torch.Tensor, seeds: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """One draw for each row of probabilities [b, V], with the random numbers of the row's seed; int64 [b].

    A draw is an exponential race. Every token has a random number E ~ Exp(1), and the token with the largest
    p / E wins: token v with probability p_v. Races with the same random numbers from two distributions are
    coupled ("Gumbel coupling": log p - log E is log p plus Gumbel noise). Their winners differ with
    probability 2 TV / (1 + TV) at most, where TV is the total variation distance of the distributions
    (Daliri, Musco and Suresh, arXiv 2408.07978). So a draft and its verification, which draw with the same
    random numbers from similar distributions, mostly take the same token. With one random number and the
    running sum of the probabilities they would not: what the first tokens gain moves all tokens behind them.

    V random numbers take 20 ns each on a CPU. Two races need 2 sqrt(V) of them: the tokens are laid out in a
    square, row by row; the columns race by their sums, then the tokens of the column that won. Tokens of
    neighbouring ids, which are often alike, are in different columns.

    Nothing waits for a device, and NaN gives some token (torch.multinomial ends the process on CUDA). A token
    of probability 0 is never drawn.
    """
    count, vocab_size = probs.shape
    width = math.isqrt(vocab_size - 1) + 1
    height = -(-vocab_size // width)
    noise = probs.new_empty(count, width + height, dtype=torch.float64)
    for row, seed in zip(noise, seeds, strict=True):
        row.exponential_(generator=generator.manual_seed(seed))
    noise.clamp_min_(torch.finfo(torch.float64).tiny)  # 0 / 0 would win
    if width * height > vocab_size:
        probs = torch.nn.functional.pad(probs, (0, width * height - vocab_size))
    square = probs.view(count, height, width)
    # In float64, so that the order of the terms, which depends on b, does not matter.
    column = (square.sum(dim=1, dtype=torch.float64) / noise[:, :width]).argmax(dim=-1)
    inside = square.gather(2, column[:, None, None].expand(-1, height, 1)).squeeze(2)
    return (inside / noise[:, width:]).argmax(dim=-1) * width + column


class _TextIds:
    """One text's ids as a tensor; only what is new is copied.

    For CUDA they lie in pinned memory: a copy from there does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: list[int] = []
        self._buffer = torch.empty(0, dtype=torch.long)

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """The ids as int64 [1, L] on the device.

        What was given out is never written over: it may still be looked at, or on its way to the device.
        """
        ids = list(ids)
        shared = common_prefix(self._held, ids)
        if shared < len(ids):
            if shared < len(self._held) or len(ids) > len(self._buffer):
                pinned = self._device.type == "cuda"
                buffer = torch.empty(2 * len(ids), dtype=torch.long, pin_memory=pinned)
                buffer[:shared] = self._buffer[:shared]
                self._buffer = buffer
            self._buffer[shared : len(ids)] = torch.tensor(ids[shared:], dtype=torch.long)
            self._held = ids
        return self._buffer[None, : len(ids)].to(self._device, non_blocking=True)
