"""Which settings are honoured, which are refused, and what their values may be.

Every field of transformers' GenerationConfig is in one of HONOURED, NO_EFFECT and REFUSED. A field that a
later transformers adds is in none of them: it is refused once somebody sets it, and a test fails.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import real_number, whole_number

# Whole numbers: the smallest that makes sense.
_COUNTS = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}
# Numbers: what to choose, in words and as a test. transformers leaves out what is outside without a word.
# Scores are divided by the temperature and by penalties, in float32: what is nearer to 0 makes infinities.
LEAST, _MOST = 1e-30, 1e30
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("1e-30 to 100, or do_sample=False (no --sample) for greedy", lambda x: LEAST <= x <= 100),
    "top_p": ("above 0 to 1", lambda x: 0 < x <= 1),
    "min_p": ("0 to 1", lambda x: 0 <= x <= 1),
    "top_h": ("above 0 to 1", lambda x: 0 < x <= 1),
    "typical_p": ("above 0 to 1", lambda x: 0 < x <= 1),
    "epsilon_cutoff": ("0 to below 1", lambda x: 0 <= x < 1),
    "eta_cutoff": ("0 to below 1", lambda x: 0 <= x < 1),
    "repetition_penalty": ("1e-30 to 1e30", lambda x: LEAST <= x <= _MOST),
    "encoder_repetition_penalty": ("1e-30 to 1e30", lambda x: LEAST <= x <= _MOST),
    "max_time": ("seconds above 0", lambda x: x > 0),
}
_FLAGS = {"do_sample", "renormalize_logits"}
# Token ids, alone or in lists, tuples and keys.
_TOKENS = {
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
}
_REST = {"stop_strings", "exponential_decay_length_penalty", "watermarking_config"}
HONOURED = {*_COUNTS, *_NUMBERS, *_FLAGS, *_TOKENS, *_REST}

# They do nothing unless something is drawn.
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}

# Satisfied whatever their value: nothing is padded, no text starts from nothing, nothing is compiled.
NO_EFFECT = {"pad_token_id", "bos_token_id", "disable_compile", "transformers_version"}

_BEAMS = "beam search is not there; the logits processor adapter brings fusion into the main model's own"
_DRAFT = "drafts have settings of their own, `draft` and `drafter`; give those instead"
_CACHE = "the members' caches are the ensemble's own; leave it out"
_OUTPUT = (
    "the result is a text with its token ids and timings, and `trace` explains every token; leave it out"
)
_MAIN_ONLY = "it runs the main model in another way, which would not be the fused distribution; leave it out"
_ENCODER = "the members are decoder-only models; leave it out"
REFUSED = {
    "num_beams": _BEAMS,
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "num_return_sequences": "one text is written for a prompt; repeat the prompt in the list instead",
    "penalty_alpha": _MAIN_ONLY,
    "low_memory": _MAIN_ONLY,
    "dola_layers": _MAIN_ONLY,
    "guidance_scale": _MAIN_ONLY,
    "token_healing": "prompts are read as they are; leave it out",
    "remove_invalid_values": "a member that gives NaN is an error; leave it out",
    "use_mtp": _DRAFT,
    "is_assistant": _DRAFT,
    "num_assistant_tokens": _DRAFT,
    "num_assistant_tokens_schedule": _DRAFT,
    "assistant_confidence_threshold": _DRAFT,
    "prompt_lookup_num_tokens": _DRAFT,
    "max_matching_ngram_size": _DRAFT,
    "assistant_early_exit": _DRAFT,
    "assistant_lookbehind": _DRAFT,
    "target_lookbehind": _DRAFT,
    "assistant_ensemble_weight": _DRAFT,
    "speculation_type": _DRAFT,
    "use_cache": _CACHE,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "prefill_chunk_size": _CACHE,
    "compile_config": "nothing is compiled here; leave it out",
    "continuous_batching_config": "give `generate` a list of prompts instead",
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "decoder_start_token_id": _ENCODER,
}
# Arguments of transformers' generate() that are no fields of GenerationConfig.
_REFUSED_ARGUMENTS = {
    "inputs": "give the prompt as text",
    "input_ids": "give the prompt as text",
    "inputs_embeds": "give the prompt as text",
    "attention_mask": "prompts are not padded; leave it out",
    "past_key_values": _CACHE,
    "tokenizer": "each member has its own; leave it out",
    "assistant_model": _DRAFT,
    "assistant_tokenizer": _DRAFT,
    "synced_gpus": "the members are not sharded by processes; leave it out",
    "negative_prompt_ids": _MAIN_ONLY,
    "negative_prompt_attention_mask": _MAIN_ONLY,
    "custom_generate": "the ensemble has its own loop; leave it out",
    "use_model_defaults": "pass generation_config=model.generation_config to use the model's own settings",
}
_OWN_ARGUMENTS = {"generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}


def known_settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords, if all of them are known."""
    for name in keywords:
        if name in _REFUSED_ARGUMENTS:
            raise InputError(f"{name} is not supported: {_REFUSED_ARGUMENTS[name]}")
        if name not in HONOURED | NO_EFFECT | REFUSED.keys():
            known = sorted(HONOURED | _OWN_ARGUMENTS)
            # "stop" is nearer to top_p by letters than to stop_strings, which it begins.
            begun = [one for one in known if one.startswith(f"{name}_")]
            near = begun or difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"there is no setting '{name}'" + (f"; did you mean {near[0]}?" if near else "; leave it out")
            )
    return dict(keywords)


def fields_set(config: GenerationConfig | None) -> dict[str, Any]:
    """The fields of a GenerationConfig that are set; it takes any name, so they may be unknown ones."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise InputError(
            f"generation_config must be a transformers.GenerationConfig, not {type(config).__name__}"
        )
    values = {name: value for name, value in vars(config).items() if value is not None}
    return known_settings({name: value for name, value in values.items() if not name.startswith("_")})


def refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Raise for a setting that is away from transformers' default and that nothing here follows."""
    defaults = {"guidance_scale": 1, **GenerationConfig._get_default_generation_params()}
    for name, value in values.items():
        if name in REFUSED and value != defaults.get(name, False):
            raise InputError(f"{name} is {value!r}, which is not supported: {REFUSED[name]}")


def check_values(values: dict[str, Any], vocab_size: int) -> None:
    """Raise for values out of range, and for those that only sampling would read; numbers become floats."""
    defaults = GenerationConfig._get_default_generation_params()
    for name, value in values.items():
        if name in _COUNTS:
            values[name] = whole_number(name, value, _COUNTS[name])
        if name in _NUMBERS:
            values[name] = real_number(name, value, *_NUMBERS[name])
        if name in _FLAGS and type(value) is not bool:
            raise InputError(f"{name} is {value!r}; choose True or False")
        if name in _TOKENS and not token_ids(name, value, vocab_size) and name.startswith("forced_"):
            raise InputError(f"{name} holds no token id; leave it out")
        if name in SAMPLING and not values.get("do_sample") and value not in (0, defaults.get(name)):
            raise InputError(
                f"{name} is {value!r}, but nothing is sampled; set do_sample=True, or leave {name} out"
            )


def token_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """The token ids in a setting; InputError where one is none of the main model's."""
    ids = flat_ids(value)
    if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
        raise InputError(f"{name} is {value!r}; token ids of the main model lie in 0..{vocab_size - 1}")
    return ids


def flat_ids(value: Any) -> list[Any]:
    """The token ids in a setting: one, a list of them, lists of lists, or a dict by tuples."""
    if isinstance(value, Mapping):
        return flat_ids(list(value))
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return flat_ids(value.tolist())
    if isinstance(value, list | tuple):
        # A sequence_bias may also be a list of [ids, bias] pairs; the biases are the floats.
        return [token for one in value if not isinstance(one, float) for token in flat_ids(one)]
    return [value]


def stop_list(stop_strings: Any) -> list[str]:
    """One stop string or several as a list."""
    if stop_strings is None:
        return []
    alone = isinstance(stop_strings, str | bytes) or not isinstance(stop_strings, Iterable)
    stops: list[Any] = [stop_strings] if alone else list(stop_strings)
    if any(not isinstance(stop, str) or not stop for stop in stops):
        raise InputError(f"stop_strings must be non-empty strings, not {shown(stop_strings)}")
    return stops


def check_seed(seed: Any) -> int | tuple[int, ...] | None:
    """The seed, which fits in 64 bits; or a seed for each text."""
    if seed is None:
        return None
    if isinstance(seed, (list, tuple)):
        return tuple(whole_number("seed", one, -(2**62), 2**62) for one in seed)
    return whole_number("seed", seed, -(2**62), 2**62)


def check_callable(name: str, given: Any, *methods: str) -> None:
    """Refuse what cannot be called, before anything is computed; with `methods`, what lacks one of these.

    Raises:
        InputError: it is given, and is none.
    """
    if given is None:
        return
    if not methods and not callable(given):
        raise InputError(f"{name} is {shown(given)}; give a function")
    if any(not callable(getattr(given, method, None)) for method in methods):
        raise InputError(f"{name} is {shown(given)}; give an object with {' and '.join(methods)}")


def callables(name: str, given: Any) -> list[Any]:
    """Processors or criteria, one or several, as a list."""
    items = list(given) if isinstance(given, Iterable) else [given] if given is not None else []
    for item in items:
        if not callable(item):
            raise InputError(f"{name} holds a {type(item).__name__}; give a list of callables")
    return items
