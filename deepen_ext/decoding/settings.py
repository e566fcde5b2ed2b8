"""What a generation is asked for: transformers' `GenerationConfig` and its names, checked once.

The processors, warpers and criteria themselves are transformers' own, in its order, and act on the fused
distribution. transformers passes over many a setting that does not fit; here every one that is set is either
honoured or refused by name (setting_rules.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria

from deepen_ext.decoding.setting_rules import (
    HONOURED,
    SAMPLING,
    callables,
    check_callable,
    check_seed,
    check_values,
    fields_set,
    flat_ids,
    known_settings,
    refuse_unsupported,
    stop_list,
)
from deepen_ext.errors import InputError
from deepen_ext.members.member import Member

DEFAULT_NEW_TOKENS = 128

# They take single tokens out, or change all scores alike: of some tokens' scores they make the same as they
# do with all others beside them.
_TOKEN_BY_TOKEN = {
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.MinPLogitsWarper,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
}


PrefixAllowedTokens = Callable[[int, torch.Tensor], "list[int]"]


@dataclass(frozen=True, eq=False)
class Settings:
    """What one call asks for, checked.

    Attributes:
        max_new_tokens: at most so many in any text; `new_tokens` says how many after some prompt.
        max_length: at most so many tokens together with the prompt, where that was asked for.
        do_sample: draw from the fused distribution; otherwise its most probable token is taken.
        seed: of sampling, one for all texts or one for each; None for another text every time.
        stop_strings: the text ends once the new text, special tokens written out, holds one of them. (For
            transformers it may begin in the prompt.)
        eos_ids: the main model's token ids that end the text.
        kind: equal for settings whose texts go through the same processors.
    """

    max_new_tokens: int
    max_length: int | None
    do_sample: bool
    seed: int | tuple[int, ...] | None
    stop_strings: list[str]
    eos_ids: frozenset[int]
    kind: object
    _config: GenerationConfig = field(repr=False)
    _vocab_size: int = field(repr=False)
    _asks_processors: bool = field(repr=False)  # whether transformers may make any
    _max_time: float | None = None
    _logits_processor: Sequence[Any] = ()
    _stopping_criteria: Sequence[Any] = ()
    _prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None

    @property
    def every_stop_string(self) -> list[str]:
        """`stop_strings`, and those of transformers' own criterion for them."""
        criteria = (getattr(one, "stop_strings", ()) for one in self._stopping_criteria)
        return [*self.stop_strings, *(stop for stops in criteria for stop in stops)]

    @classmethod
    def read(
        cls,
        main: Member,
        generation_config: GenerationConfig | None = None,
        *,
        logits_processor: Iterable[Any] | None = None,
        stopping_criteria: Iterable[Any] | None = None,
        prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
        seed: int | Sequence[int] | None = None,
        **keywords: Any,
    ) -> Settings:
        """Check what was asked for.

        Args:
            main: the main model; its EOS ids end the text, unless `eos_token_id` is given.
            generation_config: its fields that are set count, and keywords override them (a length given as a
                keyword, either way, overrides both of its lengths). Of what is not set the defaults are:
                greedy, 128 new tokens, no processor and no warper. The model's own generation_config.json is
                no source of settings; pass `model.generation_config` to make it one. top_k, too, is off
                unless set, where transformers would take 50.
            logits_processor: more of them, after those the settings ask for. They are called for each text
                with ids [1, L] and scores [1, V], the same object for all texts.
            stopping_criteria: more of them, called for each text with ids [1, L] and the fused
                logits in a tuple, ([1, V],).
            prefix_allowed_tokens_fn: (number of the text, ids [L]) -> the token ids allowed next.
            seed: of sampling. A token's random numbers depend on the seed, the text's number in this call and
                how many new tokens come before the token. Or a list of seeds, one for each text, which then
                has the random numbers that it has with its seed in a call of its own.
            keywords: fields of GenerationConfig; None is as good as not given.

        With `max_new_tokens` and `max_length` from one source the shorter holds, with `min_new_tokens` and
        `min_length` the longer.

        Raises:
            InputError: a setting out of range, not supported (the message names it) or not known.
        """
        check_callable("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn)
        given = known_settings({name: value for name, value in keywords.items() if value is not None})
        from_config = fields_set(generation_config)
        if given.get("do_sample") is False:  # what the config says about sampling falls with it
            from_config = {name: from_config[name] for name in from_config.keys() - SAMPLING}
        if given.keys() & {"max_new_tokens", "max_length"}:
            from_config.pop("max_new_tokens", None)
            from_config.pop("max_length", None)
        values = {**from_config, **given}
        refuse_unsupported(values)
        values = {name: value for name, value in values.items() if name in HONOURED}
        check_values(values, main.vocab_size)
        eos = flat_ids(values.pop("eos_token_id")) if "eos_token_id" in values else list(main.eos_ids)
        words = values.get("bad_words_ids")
        if isinstance(words, list) and any([eos_id] in words for eos_id in eos):
            raise InputError(
                "bad_words_ids holds an EOS id, which transformers would leave out of it; "
                "forbid it with suppress_tokens"
            )
        max_length = values.pop("max_length", None)
        default = DEFAULT_NEW_TOKENS if max_length is None else max_length
        settings: dict[str, Any] = {
            "max_new_tokens": values.pop("max_new_tokens", default),
            "max_length": max_length,
            "do_sample": values.get("do_sample", False),
            "seed": check_seed(seed),
            "stop_strings": stop_list(values.pop("stop_strings", None)),
            "eos_ids": frozenset(eos),
            "kind": (repr(sorted(values.items())), frozenset(eos)),
            "_vocab_size": main.vocab_size,
            "_max_time": values.pop("max_time", None),
            "_logits_processor": callables("logits_processor", logits_processor),
            "_stopping_criteria": callables("stopping_criteria", stopping_criteria),
            "_prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
        }
        asks = settings["do_sample"] or prefix_allowed_tokens_fn or values.keys() - {"do_sample"}
        settings["_asks_processors"] = bool(asks)
        if settings["_logits_processor"] or prefix_allowed_tokens_fn is not None:
            settings["kind"] = object()  # what these do is not known
        for criterion in settings["_stopping_criteria"]:
            if type(criterion) in (MaxLengthCriteria, EosTokenCriteria):
                raise InputError(
                    f"stopping_criteria holds a {type(criterion).__name__}; "
                    "give max_new_tokens, max_length or eos_token_id instead"
                )
        try:  # what is wrong with the values themselves, transformers says when it makes its processors
            config = GenerationConfig(**values)  # type: ignore[no-untyped-call]
            read = cls(**settings, _config=config)
            asked = read._make_processors([0], "cpu", 0, [])
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise InputError(f"transformers refuses a setting: {error}") from error
        for processor in settings["_logits_processor"]:
            if type(processor) in map(type, asked):
                raise InputError(
                    f"logits_processor holds a {type(processor).__name__}, and the settings ask for one too, "
                    "which transformers would drop; leave out one of them"
                )
        return read

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may follow a prompt of so many.

        Raises:
            InputError: the prompt alone reaches max_length.
        """
        if self.max_length is not None and prompt_length >= self.max_length:
            raise InputError(
                f"the prompt's {prompt_length} tokens reach max_length, which is {self.max_length}; "
                "give a larger one, or max_new_tokens instead"
            )
        return self._end(prompt_length) - prompt_length

    def processors(
        self, prompt_ids: Sequence[int], device: str | torch.device = "cpu", text: int = 0
    ) -> LogitsProcessorList:
        """transformers' processors and, for sampling, warpers, in its order; fresh ones for a text.

        Args:
            prompt_ids: the prompt in the main model's tokens.
            device: of the scores.
            text: what prefix_allowed_tokens_fn is told.
        """
        return self._make_processors(prompt_ids, device, text, self._logits_processor)

    @property
    def top_k(self) -> int:
        """Sampling is from this many tokens; 0 for all."""
        return int(self._config.top_k or 0)

    def processors_of_all_scores(self) -> str | None:
        """The class of the first processor asked for that needs the logits of all tokens, or None."""
        made = self._make_processors([0], "cpu", 0, self._logits_processor)
        return next((type(one).__name__ for one in made if type(one) not in _TOKEN_BY_TOKEN), None)

    def criteria(self) -> StoppingCriteriaList:
        """What ends a text besides EOS, its length and stop strings; fresh, and max_time counts from now."""
        criteria = StoppingCriteriaList(self._stopping_criteria)
        if self._max_time is not None:
            criteria.append(MaxTimeCriteria(self._max_time))
        return criteria

    def _end(self, prompt_length: int) -> int:
        """How long prompt and new tokens may get."""
        end = prompt_length + self.max_new_tokens
        return end if self.max_length is None else min(end, self.max_length)

    def _make_processors(
        self, prompt_ids: Sequence[int], device: str | torch.device, text: int, more: Sequence[Any]
    ) -> LogitsProcessorList:
        if not self._asks_processors:
            return LogitsProcessorList(more)
        from deepen_ext.decoding.processor_maker import processor_maker  # slow to import

        config = copy.copy(self._config)
        eos = sorted(self.eos_ids)
        config._eos_token_tensor = torch.tensor(eos, device=device) if eos else None
        config.max_length = self._end(len(prompt_ids))  # where forced_eos_token_id goes
        config.num_beams = 1
        allowed = self._prefix_allowed_tokens_fn
        made: LogitsProcessorList = processor_maker(self._vocab_size)._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=torch.tensor([list(prompt_ids)], device=device),
            prefix_allowed_tokens_fn=None if allowed is None else lambda _, ids: allowed(text, ids),
            logits_processor=LogitsProcessorList(more),
            device=device,
        )
        return made
