"""Fusion as a logits processor: transformers' own loop, and its beam search, over the fused distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

from deepen_ext.adapters.prompt_texts import AssistantsPrompts
from deepen_ext.assistants import Assistants
from deepen_ext.chat import WithoutTemplate
from deepen_ext.member import forbid
from deepen_ext.prompts import Messages

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble

_LOG_PROBABILITIES = 1e-3  # scores whose exponentials sum to no more than 1, within this much, are no logits


class DeepenLogitsProcessor(LogitsProcessor):
    """Fuses the assistants into the main model's logits, in transformers' own `generate` of the main model.

    For greedy decoding, sampling and beam search, with any batch, padded on the left as transformers wants
    it. The assistants follow the ids they are shown: a row that goes on from a row of the last call, in
    whatever order, costs one step; anything else is a new prompt.

    transformers puts the processors that its settings ask for before this one: a repetition penalty acts on
    the main model's logits alone. To have it act on the fused ones, give that processor after this one, in
    the same list. Warpers (temperature, top-p) come after it in any case. Beam search gives
    log-probabilities and gets such back.

    The assistants' caches are kept from call to call; `close`, or leaving the ``with`` block, frees them. One
    object serves one `generate` at a time.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        messages: Messages | Sequence[Messages] | None = None,
        without_template: WithoutTemplate = "error",
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            ensemble: whose main model generates.
            messages: the chat that the prompt is, in the main model's template (of a batch one for each
                prompt): the assistants then read it in their own. Otherwise they read the prompt's text,
                special tokens written out.
            without_template: see `chat_texts`.
            pad_token_id: what a shorter prompt is padded with; None for the main tokenizer's own.
            eos_token_id: the same as `generate` is given, where that is another one than the model's own: of
                tokens without text only those that end a text are ever written.
        """
        main = ensemble.members[0]
        self._ensemble = ensemble
        self._prompts = AssistantsPrompts(ensemble, messages, without_template)
        self._pad = main.tokenizer.pad_token_id if pad_token_id is None else pad_token_id
        ends = [] if eos_token_id is None else eos_token_id
        self._unwritable = main.unwritable([ends] if isinstance(ends, int) else ends)
        self._seen: torch.Tensor | None = None  # the ids [B, L] of the last call
        self._assistants: Assistants | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The fused scores [B, V] of the tokens after `input_ids` [B, L].

        Raises:
            InputError: scores that are not the main model's, or a text longer than an assistant's context.
            ModelError: an assistant's forward pass failed.
        """
        assistants = self._follow(input_ids)
        writable = forbid(scores, self._unwritable.to(scores.device))
        fused = assistants.step(writable, range(len(input_ids))).fused
        fused.check()
        # Below 0 where a processor before this one forbade tokens; what cannot be written was not forbidden.
        mass = scores.logsumexp(-1, keepdim=True)
        if bool((mass < _LOG_PROBABILITIES).all()):
            return fused.logits.log_softmax(-1) + mass
        return fused.logits

    def close(self) -> None:
        """Free the assistants' caches, and keep the relative rows that were computed."""
        if self._assistants is not None:
            self._assistants.close()
            self._ensemble.save_rows()
        self._assistants = self._seen = None

    def __enter__(self) -> DeepenLogitsProcessor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self, ids: torch.Tensor) -> Assistants:
        """The assistants, having read these ids."""
        sources = self._sources(ids)
        if sources is None or self._assistants is None:
            self.close()
            prompts = [self._without_padding(row) for row in ids.tolist()]
            self._assistants = Assistants(self._ensemble, self._prompts.texts(prompts))
            self._assistants.open()
        else:
            if sources != list(range(len(ids))):
                self._assistants.reorder(sources)
            vocabulary = self._ensemble.members[0].vocabulary
            for row, token in enumerate(ids[:, -1].tolist()):
                self._assistants.append(row, vocabulary.bytes_of(token))
        self._seen = ids.clone()  # beam search writes into its own
        return self._assistants

    def _sources(self, ids: torch.Tensor) -> list[int] | None:
        """Of each row the row of the last call that it goes on from by one token; None where one does not."""
        seen = self._seen
        if seen is None or len(seen) != len(ids) or seen.shape[1] + 1 != ids.shape[1]:
            return None
        same = (ids[:, None, :-1] == seen[None]).all(-1)
        if bool(same.diagonal().all()):
            return list(range(len(ids)))
        return same.int().argmax(1).tolist() if bool(same.any(1).all()) else None

    def _without_padding(self, ids: list[int]) -> list[int]:
        start = 0
        while start < len(ids) and ids[start] == self._pad:
            start += 1
        return ids[start:]
