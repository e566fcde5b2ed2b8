"""The ensemble's loop in the place of transformers' own, for `generate(custom_generate=...)`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from deepen_ext.adapters.generate_call import GENERATE
from deepen_ext.adapters.logits_processor import DeepenLogitsProcessor
from deepen_ext.adapters.prompt_texts import AssistantsPrompts, check_not_empty
from deepen_ext.decoding.drafts.draft_settings import DraftSettings
from deepen_ext.decoding.loop import Run
from deepen_ext.decoding.prompts import Messages, Prompt
from deepen_ext.decoding.setting_rules import SAMPLING, callables, flat_ids, stop_list
from deepen_ext.decoding.settings import Settings
from deepen_ext.errors import InputError
from deepen_ext.ground.warning import warn
from deepen_ext.members.chat import WithoutTemplate
from deepen_ext.members.member import Member

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble


def custom_generate(ensemble: Ensemble) -> Callable[..., Any]:
    """What `Ensemble.custom_generate` is: see there."""
    # transformers takes keywords of its own out of the way for a callable that names them. It must not name
    # attention_mask and the like: transformers would then not know them and pass them twice.
    # stop_strings: named here, transformers does not ask for a tokenizer, which it would not pass on.

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        *,
        messages: Messages | Sequence[Messages] | None = None,
        without_template: WithoutTemplate = "error",
        stop_strings: str | list[str] | None = None,
        seed: int | None = None,
        certified_skip: bool = False,
        confidence_gate: float | None = None,
        draft: Literal["auto"] | int | None = None,
        drafter: str = "auto",
        trace: str | Path | Callable[[dict[str, Any]], object] | None = None,
        **model_inputs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        given = _given_to_generate(logits_processor, stopping_criteria)
        streamer = given.pop("streamer", None)
        run = None
        try:
            main = ensemble.members[0]
            _check_call(main, model, given, model_inputs)
            if generation_config.do_sample and seed is None:
                seed = int(torch.randint(2**31, ()))  # so that transformers.set_seed counts
            criteria = callables("stopping_criteria", given["stopping_criteria"])
            if stops := stop_list(stop_strings):
                # transformers' own criterion: it looks at the prompt too, and at special tokens' names.
                criteria.append(StopStringCriteria(main.tokenizer, stops))
            settings = Settings.read(
                main,
                _settings_for_rows(generation_config, input_ids.shape[1], model.generation_config),
                logits_processor=given["logits_processor"],
                stopping_criteria=criteria,
                prefix_allowed_tokens_fn=given.get("prefix_allowed_tokens_fn"),
                seed=seed,
            )
            rows = _unmasked(input_ids, model_inputs.get("attention_mask"))
            prompts = AssistantsPrompts(ensemble.members, messages, without_template)
            prompts.check(rows)
            run = Run(
                ensemble.team,
                [Prompt(ids, *prompts.read(row, len(rows), ids)) for row, ids in enumerate(rows)],
                settings,
                certified_skip=certified_skip,
                confidence_gate=confidence_gate,
                drafts=DraftSettings.read(ensemble.team, draft, drafter),
                trace=trace,
                streamer=None if streamer is None else _AfterPrompt(streamer),
            )
            for _ in run:
                pass
        finally:
            if run is not None:
                run.close()
            elif streamer is not None:
                streamer.end()  # whoever reads from it must not wait for ever
        padding = generation_config.pad_token_id
        if padding is None:
            padding = next(iter(main.eos_ids), 0)
        sequences = _sequences(input_ids, run, int(padding))
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast("torch.LongTensor", sequences))
        return sequences

    return decode


def _given_to_generate(logits_processor: Any, stopping_criteria: Any) -> dict[str, Any]:
    """The arguments of `generate` that it does not hand on to a callable as they were given.

    transformers (5.17 to 5.23) keeps the streamer to itself, and mixes processors and criteria with those it
    made for padded rows. So they are read where they are: in the frame of `generate`, which called `decode`.
    Where something else called it, they are what it was called with.
    """
    caller = sys._getframe(2)
    if caller.f_code is not GENERATE:
        return {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    names = ("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", *_REFUSED)
    return {name: caller.f_locals.get(name) for name in names}


_REFUSED = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask")
# What `generate` prepares for the main model's forward pass. The ensemble's own loop has no use for it.
_PREPARED = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_position",
    "token_type_ids",
    "use_cache",
    "logits_to_keep",
}


def _check_call(main: Member, model: Any, given: dict[str, Any], model_inputs: dict[str, Any]) -> None:
    if model is not main.model:
        raise InputError(
            f"this custom_generate belongs to {main.name}, the main model of its ensemble; call "
            "ensemble.members[0].model.generate"
        )
    cache = model_inputs.get("past_key_values")
    unknown = [name for name, value in model_inputs.items() if name not in _PREPARED and value is not None]
    if cache is not None and cache.get_seq_length() > 0:
        unknown.append("past_key_values")
    unknown += [name for name in _REFUSED if given.get(name) is not None]
    if unknown:
        raise InputError(f"custom_generate has no use for {', '.join(unknown)}; leave it out")
    if any(isinstance(one, DeepenLogitsProcessor) for one in given["logits_processor"] or ()):
        raise InputError("custom_generate fuses already; leave DeepenLogitsProcessor out")


def _settings_for_rows(
    prepared: GenerationConfig, padded_length: int, models_own: GenerationConfig
) -> GenerationConfig:
    """The settings as `generate` prepared them for rows padded to one length, for rows without padding."""
    config = copy.deepcopy(prepared)
    assert config.max_length is not None
    config.max_new_tokens = config.max_length - padded_length
    if config.min_length and not config.min_new_tokens:
        config.min_new_tokens = max(config.min_length - padded_length, 0)
    config.max_length = config.min_length = None
    config.num_return_sequences = None  # `generate` has repeated the rows
    config.return_dict_in_generate = None
    if set(flat_ids(config.eos_token_id)) == set(flat_ids(models_own.eos_token_id)):
        # Nobody asked for others. The main model's own may be more: its config and tokenizer name some too.
        config.eos_token_id = None
    if not config.do_sample:
        for name in SAMPLING:  # what a model's generation_config.json says about sampling
            setattr(config, name, None)
    return config


def _unmasked(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's ids without its padding."""
    kept = torch.ones_like(input_ids) if mask is None else mask
    rows = [row[keep != 0].tolist() for row, keep in zip(input_ids, kept, strict=True)]
    check_not_empty(rows)
    return rows


def _sequences(input_ids: torch.Tensor, run: Run, padding: int) -> torch.Tensor:
    """Prompts and new tokens, int64 [B, L + longest], padded after the end of a row."""
    results = run.results()
    for i, one in enumerate(results):
        if one.finish_reason == "context":
            warn(f"row {i} ended early, because a member's context is full")
    new = [torch.tensor(one.token_ids, dtype=torch.long, device=input_ids.device) for one in results]
    return torch.cat([input_ids, pad_sequence(new, batch_first=True, padding_value=padding)], dim=1)


class _AfterPrompt:
    """A streamer that `generate` has given the prompt already."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._had_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._had_prompt:
            self._streamer.put(value)
        self._had_prompt = True

    def end(self) -> None:
        self._streamer.end()
