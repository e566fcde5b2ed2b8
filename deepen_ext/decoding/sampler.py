"""From the main model's new logits to a token for each text; processors and warpers are transformers' own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TopPLogitsWarper

from deepen_ext.decoding.choice_error import ChoiceError
from deepen_ext.decoding.draws import draw, seed_of, seeds_and_numbers
from deepen_ext.decoding.processor_kinds import BATCHED, STATELESS
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.text_ids import TextIds
from deepen_ext.decoding.top_p import top_p
from deepen_ext.errors import InputError
from deepen_ext.members.distribution import select

# Scores that a CPU processes together: copies of more are new pages of memory each time. In one piece 64 rows
# of 151,936 scores took 2 to 3 times as long.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class _Text:
    """What is known of a text.

    Attributes:
        settings: asked for.
        prompt_length: in the main model's tokens.
        ids: as a tensor.
        processors: its own.
        stateless: of these, those that keep no state.
        seed: of its random numbers.
        number: among the texts that have this seed.
    """

    settings: Settings
    prompt_length: int
    ids: TextIds
    processors: LogitsProcessorList
    stateless: LogitsProcessorList
    seed: int
    number: int


class Chooser:
    """The next token of each text of a batch: processors, warpers, then the most probable token or a draw.

    A text's token depends on its scores, its ids, its settings, the seed and the text's number alone. It does
    not depend on the other texts of the batch, nor on what was chosen before and dropped: a token's random
    numbers are a function of the seed, the text's number and how many new tokens come before the token.

    Texts may have settings of their own. Those that are processed alike go through the processors together.
    """

    def __init__(
        self, settings: Settings, prompts: Sequence[Sequence[int]], device: str | torch.device
    ) -> None:
        """Prepare one text for each prompt, numbered from 0; `add` brings more.

        Args:
            settings: of these texts.
            prompts: of each text, in the main model's tokens.
            device: of the scores; a seed gives other random numbers on each kind of device.

        Raises:
            InputError: a list of seeds that has not one for each prompt.
        """
        self._device = torch.device(device)
        self._generator = torch.Generator(device)
        self._texts: dict[int, _Text] = {}
        for text, seed in enumerate(seeds_and_numbers(settings.seed, len(prompts))):
            self._add(text, settings, prompts[text], *seed)

    def add(self, text: int, settings: Settings, prompt: Sequence[int]) -> None:
        """One more text. Its random numbers are those that it has by its seed in a call of its own.

        Args:
            text: its number.
            settings: its own, with one seed.
            prompt: in the main model's tokens.
        """
        self._add(text, settings, prompt, *seeds_and_numbers(settings.seed, 1)[0])

    def forget(self, text: int) -> None:
        """The text is chosen for no more."""
        del self._texts[text]

    def _add(self, text: int, settings: Settings, prompt: Sequence[int], seed: int, number: int) -> None:
        processors = settings.processors(prompt, self._device, text)
        stateless = LogitsProcessorList(one for one in processors if type(one) in STATELESS)
        ids = TextIds(self._device)
        self._texts[text] = _Text(settings, len(prompt), ids, processors, stateless, seed, number)

    def begins(self, text: int, length: int) -> bool:
        """Whether the text's first new token comes after so many ids."""
        return length == self._texts[text].prompt_length

    def samples(self, text: int) -> bool:
        """Whether the text's tokens are drawn."""
        return self._texts[text].settings.do_sample

    def is_plain(self, texts: Iterable[int]) -> bool:
        """Whether all these texts take the most probable token of the scores as they are."""
        return not any(self.samples(text) or self._texts[text].processors for text in texts)

    @property
    def keeps_state(self) -> bool:
        """Whether what a processor gives may depend on its earlier calls.

        Then `choose` must be called once for each token of a text, in order, with one row for the text.
        Otherwise it may be called as often as needed, in any order.
        """
        return any(len(text.stateless) < len(text.processors) for text in self._texts.values())

    @property
    def guesses_by_scores(self) -> bool:
        """Whether `propose` looks at the scores, and of the ids at nothing but how many there are."""
        return all(type(one) in BATCHED for text in self._texts.values() for one in text.stateless)

    def processors(self, text: int) -> LogitsProcessorList:
        """The text's own, in order: processors, then warpers where something is drawn."""
        return self._texts[text].processors

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
            ChoiceError: on the CPU, a text whose processors forbid every token, or give NaN or infinity.
            InputError: a processor of the caller's gives no scores [1, V].
        """
        return self._choose(_all, scores, texts, ids, chosen, check=scores.device.type == "cpu")

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
        return self._choose(_stateless, scores, texts, ids, chosen, check=False)

    def processed(
        self, scores: torch.Tensor, texts: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """The scores after processors and, for sampling, warpers: float32 [b, V]; see `choose`."""
        processed = scores.to(torch.float32, copy=True)
        for rows in self._alike(texts):
            processed[rows] = self._processed(_all, *_of_rows(rows, scores, texts, ids))
        return processed

    def share(self, text: int, length: int) -> float:
        """A random number of 0 to below 1 for a text's next token, beside those that draw the token itself.

        Args:
            text: its number.
            length: of its ids, prompt and new tokens so far.
        """
        own = self._texts[text]
        return (seed_of(own.seed, own.number, length - own.prompt_length, b"share") >> 10) / 2**53

    def _alike(self, texts: Sequence[int]) -> list[list[int]]:
        """The rows of texts that are processed alike."""
        found: dict[object, list[int]] = {}
        for row, text in enumerate(texts):
            found.setdefault(self._texts[text].settings.kind, []).append(row)
        return list(found.values())

    def _choose(
        self,
        kinds: _Kinds,
        scores: torch.Tensor,
        texts: Sequence[int],
        ids: Sequence[Sequence[int]],
        chosen: torch.Tensor | None,
        *,
        check: bool,
    ) -> torch.Tensor:
        """`choose` with these processors of each text; with `check` its error, which waits for the scores."""
        groups = self._alike(texts)
        if len(groups) == 1:
            return self._choose_alike(kinds, scores, texts, ids, chosen, check=check)
        tokens = torch.empty(len(texts), dtype=torch.long, device=scores.device)
        for rows in groups:
            own = _of_rows(rows, scores, texts, ids)
            best = None if chosen is None else chosen[rows]
            tokens[rows] = self._choose_alike(kinds, *own, best, check=check)
        return tokens

    def _choose_alike(
        self,
        kinds: _Kinds,
        scores: torch.Tensor,
        texts: Sequence[int],
        ids: Sequence[Sequence[int]],
        chosen: torch.Tensor | None,
        *,
        check: bool,
    ) -> torch.Tensor:
        first = self._texts[texts[0]]
        if not first.settings.do_sample and not kinds(first):
            return scores.argmax(dim=-1) if chosen is None else chosen.long()
        most = max(1, _AT_ONCE // scores.shape[1])
        if len(texts) > most and scores.device.type == "cpu":
            pieces = (slice(i, i + most) for i in range(0, len(texts), most))
            parts = [
                self._choose_alike(kinds, scores[own], texts[own], ids[own], None, check=check)
                for own in pieces
            ]
            return torch.cat(parts)
        scores = self._processed(kinds, scores, texts, ids)
        if check:
            for text, best in zip(texts, scores.amax(dim=-1).tolist(), strict=True):
                if not math.isfinite(best):
                    raise ChoiceError(text, best)
        if not first.settings.do_sample:
            return scores.argmax(dim=-1)
        seeds = []
        for text, row in zip(texts, ids, strict=True):
            own = self._texts[text]
            seeds.append(seed_of(own.seed, own.number, len(row) - own.prompt_length))
        return draw(torch.softmax(scores, dim=-1), seeds, self._generator)

    def _processed(
        self, kinds: _Kinds, scores: torch.Tensor, texts: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Of texts that are processed alike."""
        # A copy, as in transformers: the caller's own processors may write into what they are given.
        scores = scores.to(torch.float32, copy=True)
        of_rows: list[Any] = [kinds(self._texts[text]) for text in texts]
        if all(type(one) in BATCHED for one in of_rows[0]):  # the classes do not depend on the text
            tokens = [torch.empty(1, 0, dtype=torch.long, device=scores.device)] * len(texts)  # not looked at
        else:
            tokens = [self._texts[text].ids.read(own) for text, own in zip(texts, ids, strict=True)]
        for of_each in zip(*of_rows, strict=True):
            if type(of_each[0]) is TopPLogitsWarper and scores.device.type == "cpu":
                scores = top_p(of_each[0], scores)
                continue
            if type(of_each[0]) in BATCHED:
                scores = of_each[0](tokens[0], scores)
                continue
            parts = [
                _given_by(processor, own, scores[i : i + 1])
                for i, (processor, own) in enumerate(zip(of_each, tokens, strict=True))
            ]
            scores = torch.cat(parts) if len(parts) > 1 else parts[0]
        return scores


def _given_by(processor: Any, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A text's scores [1, V] after a processor, which may be the caller's own.

    Raises:
        InputError: it gives something else.
    """
    given = processor(ids, scores)
    if not isinstance(given, torch.Tensor) or given.shape != scores.shape:
        what = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        name = getattr(processor, "__qualname__", type(processor).__name__)
        raise InputError(
            f"the logits processor {name} gave {what}; it must return scores of shape {list(scores.shape)}"
        )
    return given


_Kinds = Callable[[_Text], LogitsProcessorList]


def _all(text: _Text) -> LogitsProcessorList:
    return text.processors


def _stateless(text: _Text) -> LogitsProcessorList:
    return text.stateless


def _of_rows(
    rows: Sequence[int], scores: torch.Tensor, texts: Sequence[int], ids: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, list[int], list[Sequence[int]]]:
    return select(scores, list(rows)), [texts[row] for row in rows], [ids[row] for row in rows]
