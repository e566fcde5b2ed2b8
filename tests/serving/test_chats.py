"""Chats through OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from running import MAIN, Running, serving

from deepen_ext import Ensemble
from deepen_ext.members.member import Member

MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a keeper of lighthouses."},
    {"role": "user", "content": "What did Anna take from the table?"},
]
GREEDY: dict[str, Any] = {"model": "deepen", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}


def test_a_chat_is_the_ensembles(client: openai.OpenAI, pair: Ensemble) -> None:
    """A base model reads a plain transcript, as `deepen-ext serve` says at its start."""
    expected = pair.generate(MESSAGES, max_new_tokens=12, draft=0, without_template="plain")
    answer = client.chat.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    chunks = list(client.chat.completions.create(stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_contents_in_parts_and_developers(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": one} for one in ("What did Anna ", "take from the table?")]
    messages: list[Any] = [
        {"role": "developer", "content": MESSAGES[0]["content"]},
        {"role": "user", "content": parts},
    ]
    answer = client.chat.completions.create(**{**GREEDY, "messages": messages})
    assert (
        answer.choices[0].message.content
        == client.chat.completions.create(**GREEDY).choices[0].message.content
    )


def test_logprobs_n_and_stops(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(logprobs=True, top_logprobs=20, **GREEDY).choices[0]
    text = whole.message.content
    assert text
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert len(content) == 12
    assert b"".join(bytes(one.bytes or ()) for one in content).decode(errors="ignore").startswith(text[:5])
    for one in content:
        assert len(one.top_logprobs) == 20
        assert one.logprob == one.top_logprobs[0].logprob  # greedy
        assert one.token == one.top_logprobs[0].token
    chunks = list(client.chat.completions.create(logprobs=True, top_logprobs=2, stream=True, **GREEDY))
    tokens = [
        token.token
        for one in chunks
        if (own := one.choices[0].logprobs) is not None
        for token in own.content or ()
    ]
    assert tokens == [one.token for one in content]
    sampled = {**GREEDY, "temperature": 1.5, "seed": 5}
    texts = [one.message.content for one in client.chat.completions.create(n=3, **sampled).choices]
    assert len(texts) == 3
    assert len(set(texts)) > 1
    stop = text[4:8]
    cut = client.chat.completions.create(stop=stop, **GREEDY).choices[0]
    assert cut.message.content == text[: text.find(stop)]
    assert cut.finish_reason == "stop"


def test_without_a_length_it_ends_at_the_context(client: openai.OpenAI, pair: Ensemble) -> None:
    """Or after 512 tokens; a bias makes EOS impossible."""
    eos = {str(one): -100 for one in pair.members[0].eos_ids}
    body = {key: value for key, value in GREEDY.items() if key != "max_tokens"}
    answer = client.chat.completions.create(logit_bias=eos, **{**body, "model": MAIN})
    assert answer.usage is not None
    context = pair.members[0].context_length
    room = 512 if context is None else min(512, context - answer.usage.prompt_tokens)
    assert answer.usage.completion_tokens == room
    three = client.chat.completions.create(max_completion_tokens=3, **body)
    assert three.usage is not None
    assert three.usage.completion_tokens == 3


@pytest.fixture(scope="module")
def strict(tiny_smollm2: Member, tiny_gemma: Member) -> Iterator[Running]:
    bare = replace(tiny_gemma, name="bare")
    with serving(
        {"deepen": Ensemble([tiny_smollm2, bare], fuser="deepen")}, without_template="error"
    ) as running:
        yield running


def test_a_member_without_a_template_can_be_refused(strict: Running) -> None:
    if getattr(strict.ensembles["deepen"].members[1].tokenizer, "chat_template", None):
        pytest.skip("this build of the tokenizer has a template")
    error = strict.refused("/v1/chat/completions", GREEDY)
    assert "no chat template" in error["message"]
    status, answer, _ = strict.ask("/v1/chat/completions", {**GREEDY, "without_template": "plain"})
    assert status == 200, answer
