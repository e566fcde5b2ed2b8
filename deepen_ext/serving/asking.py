"""From a request's body to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepen_ext.decoding.prompts import Messages, read_prompts
from deepen_ext.decoding.setting_rules import LEAST
from deepen_ext.fusers import FUSERS
from deepen_ext.fusers.make import parse_fuser, recipe_of
from deepen_ext.members.chat import WithoutTemplate
from deepen_ext.serving.bodies import (
    CHAT_TOKENS,
    COMPLETION_TOKENS,
    MOST_TEXTS,
    ChatBody,
    CompletionBody,
)
from deepen_ext.serving.errors import refused
from deepen_ext.serving.models import Model
from deepen_ext.serving.penalties import CountPenalty
from deepen_ext.serving.requests import Request

Prompt = str | list[int] | Messages


@dataclass(frozen=True)
class Asked:
    """What one body asks of the engine.

    Attributes:
        model: who writes.
        requests: one for each text: those of the first prompt, then those of the second, ...
        stops: stop strings, which the answer leaves out.
        top: candidates that the answer shows at each token; None for no logprobs.
        prompt_top: the same of the prompt's tokens.
        echo: the prompts' texts, where they stand before the answers.
        n: texts for each prompt.
        write: whether tokens are wanted at all; one is written where not, and left out.
    """

    model: Model
    requests: Sequence[Request]
    stops: Sequence[str]
    top: int | None = None
    prompt_top: int | None = None
    echo: Sequence[str] = ()
    n: int = 1
    write: bool = True


def completion(model: Model, body: CompletionBody) -> Asked:
    """What a completion asks for.

    Raises:
        ApiError: a field that does not go with another, or with this model.
        InputError: a setting out of range.
    """
    prompts = [_without_bos(model, one, body.add_special_tokens) for one in body.prompts]
    for one in prompts:
        _check_ids(model, one)
    if len(prompts) * body.n > MOST_TEXTS:
        raise refused(f"{len(prompts)} prompts with n={body.n} are more than {MOST_TEXTS} texts", "n")
    if body.best_of is not None and body.best_of > body.n:
        raise refused("best_of is not supported beyond n; leave it out", "best_of")
    for name, value in (("logprobs", body.logprobs), ("prompt_logprobs", body.prompt_logprobs)):
        if value is not None and value > model.most_logprobs:
            kind = "a member alone" if model.alone else "an ensemble"
            raise refused(f"{name} is {value}; at most {model.most_logprobs} of {kind}", name)
    of_prompt = body.logprobs if body.echo else None
    if not model.alone and (of_prompt is not None or body.prompt_logprobs is not None):
        name = "prompt_logprobs" if body.prompt_logprobs is not None else "echo"
        with_it = " with logprobs" if name == "echo" else ""
        raise refused(f"{name}{with_it} is of a member alone; an ensemble has no distribution there", name)
    tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise refused("max_tokens is 0, so there is nothing to answer; set it, or echo", "max_tokens")
    tops = [one for one in (of_prompt, body.prompt_logprobs) if one is not None]
    requests = [
        Request(
            model=model.name,
            prompt=prompt,
            decoding=_decoding(model, body, prompt, max(tokens, 1), number),
            fusion=_fusion(model, body),
            draft=body.draft,
            top=0 if body.logprobs is None else max(body.logprobs, 1),
            prompt_top=max(1, *tops) if tops else 0,
            explain=body.explain,
        )
        for prompt in prompts
        for number in range(body.n)
    ]
    return Asked(
        model,
        requests,
        body.stops,
        top=body.logprobs,
        prompt_top=body.prompt_logprobs,
        echo=[_plain(model, one) for one in body.prompts] if body.echo else (),
        n=body.n,
        write=tokens > 0,
    )


def chat(model: Model, body: ChatBody, without_template: WithoutTemplate) -> Asked:
    """What a chat asks for; see `completion`."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise refused("max_tokens and max_completion_tokens are the same; give one of them", "max_tokens")
    if body.max_tokens == 0:
        raise refused("max_tokens is 0; ask for 1 or more", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    template = body.without_template or without_template
    roles = {"developer": "system"}
    messages = [{"role": roles.get(one.role, one.role), "content": one.text} for one in body.messages]
    tokens = body.max_completion_tokens or body.max_tokens
    if tokens is None:
        tokens = _room(model, messages, template)
    requests = [
        Request(
            model=model.name,
            prompt=messages,
            decoding=_decoding(model, body, messages, tokens, number, template),
            fusion=_fusion(model, body),
            draft=body.draft,
            top=max(body.top_logprobs or 0, 1) if body.logprobs else 0,
            explain=body.explain,
            without_template=template,
        )
        for number in range(body.n)
    ]
    top = (body.top_logprobs or 0) if body.logprobs else None
    return Asked(model, requests, body.stops, top=top, n=body.n)


def _decoding(
    model: Model,
    body: CompletionBody | ChatBody,
    prompt: Prompt,
    tokens: int,
    number: int,
    template: WithoutTemplate = "error",
) -> dict[str, Any]:
    """Keywords of `Ensemble.generate`. At temperature 0 what only sampling reads is left out."""
    _check_choice(model, body)
    found: dict[str, Any] = {"max_new_tokens": tokens, "stop_strings": body.stops or None}
    if body.temperature > 0:
        found |= {
            "do_sample": True,
            "temperature": body.temperature if body.temperature != 1 else None,
            "top_p": body.top_p if body.top_p != 1 else None,
            "top_k": body.top_k if body.top_k > 0 else None,
            "min_p": body.min_p or None,
            "seed": None if body.seed is None else body.seed + number,
        }
    if body.repetition_penalty != 1:
        found["repetition_penalty"] = body.repetition_penalty
    if body.logit_bias:
        biases = {int(one): bias for one, bias in body.logit_bias.items()}
        if (largest := max(biases)) >= model.main.vocab_size:
            raise refused(
                f"logit_bias has the token {largest}; those of {model.main.name} are below "
                f"{model.main.vocab_size}",
                "logit_bias",
            )
        found["sequence_bias"] = {(one,): float(bias) for one, bias in biases.items()}
    if body.presence_penalty or body.frequency_penalty:
        length = len(_prompt_ids(model, prompt, template))
        found["logits_processor"] = [CountPenalty(length, body.presence_penalty, body.frequency_penalty)]
    return {name: value for name, value in found.items() if value is not None}


def _check_choice(model: Model, body: CompletionBody | ChatBody) -> None:
    """That the fuser goes with how tokens are picked, and that penalties and temperature are in range.

    The engine refuses these too, but by the names of `Ensemble.generate`: a request has no do_sample.
    """
    if 0 < body.temperature < LEAST:
        why = f"temperature is {body.temperature}; choose {LEAST} to 100, or 0 for greedy decoding"
        raise refused(why, "temperature")
    if body.repetition_penalty < LEAST:
        why = f"repetition_penalty is {body.repetition_penalty}; choose {LEAST} to 100"
        raise refused(why, "repetition_penalty")
    name = body.fuser or model.ensemble.method
    fuser = FUSERS.get(name)
    if fuser is None or model.alone:  # None: auto, a recipe of deepen's, or a function of the server's owner
        return
    if fuser.draws and body.temperature == 0:
        raise refused(
            f"fuser {name} is a way to sample; set temperature above 0, or for greedy decoding use fuser "
            "union-vocab, whose average it samples from",
            "temperature",
        )
    if not fuser.spans:
        return
    if body.temperature > 0:
        raise refused(
            f"fuser {name} writes the most probable words; set temperature to 0 (a request without one "
            "has 1), or use another fuser",
            "temperature",
        )
    others = {
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty != 1,
        "logit_bias": body.logit_bias,
    }
    for field, given in others.items():
        if given:
            raise refused(
                f"fuser {name} writes whole words, and {field} changes single tokens; leave it out, or use "
                "another fuser",
                field,
            )


def _fusion(model: Model, body: CompletionBody | ChatBody) -> dict[str, Any]:
    """Settings of `Ensemble.variant`. A request never names code."""
    found: dict[str, Any] = {}
    if body.fuser is not None:
        if body.fuser != "auto" and body.fuser not in FUSERS and recipe_of(body.fuser) is None:
            raise refused(f"fuser is {body.fuser!r}; use one of auto, {', '.join(FUSERS)}", "fuser")
        found["fuser"], recipe = parse_fuser(body.fuser, "")
        if recipe:
            found["recipe"] = recipe
    if body.weights is not None:
        found["weights"] = body.weights
    if found and model.alone:
        name = "weights" if body.fuser is None else "fuser"
        raise refused(f"{name} is of ensembles; {model.name} is a member alone", name)
    return found


def _without_bos(model: Model, prompt: str | list[int], bos: bool) -> str | list[int]:
    """A text that nothing is to stand before is given as ids."""
    if bos or not isinstance(prompt, str) or not prompt:
        return prompt
    return model.main.vocabulary.encode(prompt)


def _check_ids(model: Model, prompt: str | list[int]) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise refused("the prompt is empty; give some text to continue", "prompt")
        return
    if (largest := max(prompt)) >= model.main.vocab_size:
        raise refused(
            f"the prompt has the token {largest}; those of {model.main.name} are below "
            f"{model.main.vocab_size}",
            "prompt",
        )


def _plain(model: Model, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return model.main.vocabulary.decode(prompt).decode(errors="replace")


def _prompt_ids(model: Model, prompt: Prompt, template: WithoutTemplate = "error") -> Sequence[int]:
    """The main model's ids of a prompt."""
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        return prompt
    return read_prompts([model.main], prompt, template)[0].main_ids  # type: ignore[arg-type]


def _room(model: Model, messages: Messages, template: WithoutTemplate) -> int:
    """New tokens of a chat that does not say: `CHAT_TOKENS`, or what each member's context still holds."""
    room = CHAT_TOKENS
    prompt = read_prompts(model.ensemble.members, messages, template)[0]
    lengths = [len(prompt.main_ids)]
    for member, text in zip(model.ensemble.members[1:], prompt.texts, strict=True):
        vocabulary = member.vocabulary
        before = len(vocabulary.prefix_ids) if text.prefix else 0
        lengths.append(before + len(vocabulary.encode(text.text)))
    for member, length in zip(model.ensemble.members, lengths, strict=True):
        if member.context_length is not None:
            room = min(room, member.context_length - length)
    return max(room, 1)  # of a prompt that is too long the engine says so
