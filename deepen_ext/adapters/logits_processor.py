"""Fusion as a logits processor: transformers' own loop, and its beam search, over the fused distribution."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import LogitsProcessor

from deepen_ext.adapters.generate_call import GenerateCall, generate_call, is_drafting
from deepen_ext.adapters.prompt_texts import AssistantsPrompts, check_not_empty
from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.prompt_ids import written
from deepen_ext.decoding.prompt_weights import read_prompts
from deepen_ext.decoding.prompts import Messages
from deepen_ext.decoding.setting_rules import token_ids
from deepen_ext.errors import InputError
from deepen_ext.ground.closing import Closing
from deepen_ext.members.chat import PromptText, WithoutTemplate
from deepen_ext.members.distribution import Distribution, forbid
from deepen_ext.ops.transfer import to_device

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble

_LOG_PROBABILITIES = 1e-3  # scores whose exponentials sum to no more than 1, within this much, are no logits


class DeepenLogitsProcessor(Closing, LogitsProcessor):
    """Fuses the assistants into the main model's logits, in transformers' own `generate` of the main model.

    For greedy decoding, sampling, beam search and assisted decoding, with any batch, padded on the left as
    transformers wants it. What the assistants read depends on the ids alone, not on the calls before: their
    text, special tokens written out, up to the last whole character. A row that goes on from a row of the
    last call, in whatever order, costs one step; of any other what it begins with in common is kept. A draft
    (by an assistant model or prompt lookup) is left as it is: its tokens are checked against fused scores.

    Which ids are padding the attention mask of `generate` says. Where other code calls the processor, it is
    the `pad_token_id`s that a row begins with.

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
            pad_token_id: what a row that has ended goes on with, and what shorter prompts are padded with
                where no attention mask says it; None for the main tokenizer's own.
            eos_token_id: the same as `generate` is given, where that is another one than the model's own: of
                tokens without text only those that end a text are ever written.

        Raises:
            InputError: an ensemble that goes on without a lost assistant: nothing here could tell of it.
        """
        ensemble.team.require_stop("only Ensemble.generate tells what was written without whom")
        main = ensemble.members[0]
        self._team = ensemble.team
        self._prompts = AssistantsPrompts(ensemble.members, messages, without_template)
        self._pad = main.tokenizer.pad_token_id
        if pad_token_id is not None:
            found = token_ids("pad_token_id", pad_token_id, main.vocab_size)
            if len(found) != 1:
                raise InputError(f"pad_token_id is {pad_token_id!r}; give one token id")
            self._pad = found[0]
        ends = [] if eos_token_id is None else token_ids("eos_token_id", eos_token_id, main.vocab_size)
        self._unwritable = main.unwritable(ends)
        self._own_ends = not ends or set(ends) == set(main.eos_ids)
        self._endings = {self._pad, *main.eos_ids, *ends}
        self._call: GenerateCall | None = None
        self._prompts_of: list[_RowPrompt] = []
        self._seen: list[list[int]] = []  # the ids that each row's assistants have read, with padding
        self._assistants: Assistants | None = None
        self._weights: dict[tuple[int, ...], Sequence[float]] = {}  # by the prompt's ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The fused scores [B, V] of the tokens after `input_ids` [B, L].

        Raises:
            InputError: scores that are not the main model's, a text longer than an assistant's context, or
                prompts that are empty, embeddings, or padded on the right.
            ModelError: an assistant's forward pass failed.
        """
        if is_drafting():
            return scores
        assistants = self._follow(input_ids)
        writable = forbid(scores, self._unwritable.to(scores.device))
        fuser, main = self._team.fuser, self._team.main
        said = Distribution(main.name, writable.shape[-1], fuser.candidates, writable)
        part, rows = fuser.part(0, said), range(len(input_ids))
        candidates = assistants.candidates(part.topk, [None] * len(input_ids))
        places = [assistants.place(row, None, candidates.get(row, ())) for row in rows]
        fused = assistants.step(part, places, self._firsts(input_ids, writable)).fused
        fused.check()
        # Below 0 where a processor before this one forbade tokens; what cannot be written was not forbidden.
        mass = scores.logsumexp(-1, keepdim=True)
        if bool((mass < _LOG_PROBABILITIES).all()):
            return fused.logits.log_softmax(-1) + mass
        return fused.logits

    def _firsts(self, ids: torch.Tensor, writable: torch.Tensor) -> list[int]:
        """Rows that get their first token, where processors before this one left more than an end.

        None where the caller named EOS ids that are not the main model's own.
        """
        firsts = [i for i, prompt in enumerate(self._prompts_of) if len(prompt.ids) == ids.shape[1]]
        if not firsts or not self._own_ends:
            return []
        ends = to_device(self._team.main.eos_ids, writable.device)
        more = writable[firsts].index_fill(1, ends, -torch.inf).isfinite().any(dim=1).tolist()
        return [i for i, one in zip(firsts, more, strict=True) if one]

    def close(self) -> None:
        """Free the assistants' caches, and keep the relative rows that were computed."""
        if self._assistants is not None:
            self._assistants.close()
            self._team.save_rows()
        self._assistants = self._call = None
        self._seen = []

    def _follow(self, ids: torch.Tensor) -> Assistants:
        """The assistants, having read these ids."""
        rows: list[list[int]] = ids.tolist()
        self._find_prompts(rows, generate_call())
        # What is a prompt only `generate` knows for certain; its prompts all have one length.
        prompt = 0 if self._call is None else self._call.prompts.shape[1]
        rows = [self._without_end(row, prompt) for row in rows]
        seen, self._seen = self._seen, []  # should this fail, the next call begins anew
        if self._assistants is None or len(seen) != len(rows):
            self.close()
            read = [self._read(i, row) for i, row in enumerate(rows)]
            self._assistants = assistants = Assistants(self._team, [texts for texts, _ in read])
            assistants.open()
            for i, (_, data) in enumerate(read):
                assistants.texts[i].append(data)
        else:
            assistants = self._assistants
            sources = [self._source(i, row, seen) for i, row in enumerate(rows)]
            order = [i if source is None else source for i, source in enumerate(sources)]
            if order != list(range(len(rows))):
                assistants.reorder(order)
            main = self._team.main
            for i, (row, source) in enumerate(zip(rows, sources, strict=True)):
                if source is None:
                    texts, data = self._read(i, row)
                    assistants.restart(i, texts)
                else:
                    data = written(main, row[len(seen[source]) :])
                assistants.texts[i].append(data)
        self._weigh(assistants, rows)
        self._seen = rows
        return assistants

    def _weigh(self, assistants: Assistants, rows: list[list[int]]) -> None:
        """Give each row the weights of its prompt, where they come from prompts.

        A logits processor never sees what the main model says of a prompt, so it reads each prompt once more.
        """
        team = self._team
        if not team.weighs_prompts:
            return
        prompts = [tuple(one.own(one.ids)) for one in self._prompts_of]
        new = {prompt: i for i, prompt in enumerate(prompts) if prompt not in self._weights}
        if new:
            with closing(team.main.backend.open(len(new), max(map(len, new)))) as session:
                main = read_prompts(session, team.main, {n: list(ids) for n, ids in enumerate(new)})
            texts = list(new.values())
            if all(rows[i] == self._prompts_of[i].ids for i in texts):
                for i in texts:
                    assistants.weights[i] = team.weights  # not those of a prompt before
                assistants.weigh(texts, list(main.values()))  # they then hold the prompts
                found = [assistants.weights[i] for i in texts]
            else:
                read = [self._read(i, self._prompts_of[i].ids) for i in texts]
                with closing(Assistants(team, [one for one, _ in read])) as beside:
                    beside.open()
                    for n, (_, data) in enumerate(read):
                        beside.texts[n].append(data)
                    beside.weigh(range(len(read)), list(main.values()))
                    found = [beside.weights[n] for n in range(len(read))]
            self._weights |= dict(zip(new, found, strict=True))
        for i, prompt in enumerate(prompts):
            assistants.weights[i] = self._weights[prompt]

    def _find_prompts(self, rows: list[list[int]], call: GenerateCall | None) -> None:
        """What each row's prompt is: by the call of `generate`, else what the rows were when they began."""
        known = len(self._prompts_of) == len(rows)
        if call is not None:
            # The tensors are kept, so that no other call's can be taken for them.
            old = self._call
            if known and old is not None and call.prompts is old.prompts and call.mask is old.mask:
                return
            prompts: list[list[int]] = call.prompts.tolist()
            kept = [[True] * len(ids) for ids in prompts] if call.mask is None else (call.mask != 0).tolist()
        else:
            begun = known and all(map(_begins, rows, (one.ids for one in self._prompts_of)))
            if begun and self._call is None:
                return
            prompts = rows
            kept = [self._by_pad_id(ids) for ids in rows]
        found = [_RowPrompt(*one) for one in zip(prompts, kept, strict=True)]
        own = [prompt.own(prompt.ids) for prompt in found]
        check_not_empty(own)
        if call is not None:
            self._prompts.check(own)
        if found != self._prompts_of:
            self._weights.clear()
            self._seen = [[] for _ in self._seen]  # no row goes on from what it was
        self._prompts_of, self._call = found, call

    def _by_pad_id(self, ids: list[int]) -> list[bool]:
        start = next((i for i, token in enumerate(ids) if token != self._pad), len(ids))
        return [i >= start for i in range(len(ids))]

    def _without_end(self, ids: list[int], prompt: int) -> list[int]:
        """The ids without what follows the end of a row: of EOS and padding at its end the first is kept.

        The first `prompt` ids are kept as they are: a chat's template may end a turn with several EOS ids.
        """
        end = len(ids)
        while end > prompt + 1 and ids[end - 1] in self._endings and ids[end - 2] in self._endings:
            end -= 1
        return ids[:end]

    def _source(self, i: int, row: list[int], seen: list[list[int]]) -> int | None:
        """The row of the last call that this one goes on from; None where it begins anew."""
        prompts = self._prompts_of
        prefix = len(self._team.main.vocabulary.prefix_ids)
        for j in (i, *range(len(seen))):
            # Nothing but BOS: whether the first token's space is its own is known with the whole.
            some_text = len(seen[j]) - prompts[j].kept.count(False) > prefix
            if some_text and prompts[j] == prompts[i] and _begins(row, seen[j]):
                return int(j)
        return None

    def _read(self, i: int, row: list[int]) -> tuple[list[PromptText], bytes]:
        """What the assistants read first as this row's text, and the bytes that go on from it."""
        prompt = self._prompts_of[i]
        return self._prompts.read(i, len(self._prompts_of), prompt.own(row), row[len(prompt.ids) :])


class _RowPrompt(NamedTuple):
    ids: list[int]  # with padding
    kept: list[bool]  # False: padding

    def own(self, row: list[int]) -> list[int]:
        """What there is of the prompt in a row, without padding."""
        return [token for token, keep in zip(row, self.kept, strict=False) if keep]


def _begins(row: list[int], start: list[int]) -> bool:
    return row[: len(start)] == start
