"""Completions through OpenAI's own client: texts are the ensemble's, and answers have its shapes."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import openai
import pytest
import torch
from command_line import ROOT
from losing_backend import backend_of, losing
from running import ASSISTANT, MAIN, PROMPT, Running, serving

from deepen_ext import Ensemble
from deepen_ext.serving.tokens import TokenTexts

GREEDY: dict[str, Any] = {"model": "deepen", "max_tokens": 12, "temperature": 0}


def ids_of(ensemble: Ensemble, text: str) -> list[int]:
    vocabulary = ensemble.members[0].vocabulary
    return vocabulary.prefix_ids + vocabulary.encode(text)


def streamed(client: openai.OpenAI, **body: Any) -> list[Any]:
    return list(client.completions.create(stream=True, **body))


def test_a_text_is_the_ensembles(client: openai.OpenAI, pair: Ensemble) -> None:
    expected = pair.generate(PROMPT, max_new_tokens=12, draft=0)
    answer = client.completions.create(prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "deepen"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids_of(pair, PROMPT))
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@pytest.mark.parametrize("name", [MAIN, ASSISTANT])
def test_each_member_is_a_model_too(client: openai.OpenAI, pair: Ensemble, name: str) -> None:
    member = pair.members[[MAIN, ASSISTANT].index(name)]
    alone = Ensemble([member], fuser="single").generate(PROMPT, max_new_tokens=12, draft=0)
    answer = client.completions.create(prompt=PROMPT, **{**GREEDY, "model": name})
    assert answer.choices[0].text == alone.text


def test_a_stream_has_the_same_text(client: openai.OpenAI, pair: Ensemble) -> None:
    expected = pair.generate(PROMPT, max_new_tokens=12, draft=0)
    *chunks, last = streamed(client, prompt=PROMPT, stream_options={"include_usage": True}, **GREEDY)
    assert "".join(one.choices[0].text for one in chunks) == expected.text
    assert [one.choices[0].finish_reason for one in chunks][-1] == "length"
    assert all(one.choices[0].finish_reason is None for one in chunks[:-1])
    assert all(one.usage is None for one in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert len({one.id for one in [*chunks, last]}) == 1


def test_a_stream_ends_with_done(served: Running) -> None:
    status, answer, headers = served.ask("/v1/completions", {**GREEDY, "prompt": PROMPT, "stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = answer.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for one in events[:-2]:
        json.loads(one.removeprefix("data: "))


def test_each_event_is_one_line_for_every_client(served: Running) -> None:
    """Some end lines where Python's `splitlines` does, in the middle of a text."""
    prompt = "one\u2028two\u2029three\x85four\x0bfive"
    body = {**GREEDY, "prompt": prompt, "echo": True, "stream": True, "max_tokens": 1}
    lines = [one for one in served.ask("/v1/completions", body)[1].decode().splitlines() if one]
    first, *_, last = [one.removeprefix("data: ") for one in lines]
    assert json.loads(first)["choices"][0]["text"] == prompt
    assert last == "[DONE]"


def test_streams_have_whole_characters(client: openai.OpenAI, pair: Ensemble) -> None:
    prompt = "日本の首都は"
    expected = pair.generate(prompt, max_new_tokens=24, draft=0).text
    assert any(ord(one) > 127 for one in expected)
    chunks = streamed(client, prompt=prompt, **{**GREEDY, "max_tokens": 24})
    assert "".join(one.choices[0].text for one in chunks) == expected
    assert not any("\ufffd" in one.choices[0].text for one in chunks[:-1])


def test_prompts_as_ids_and_in_lists(client: openai.OpenAI, pair: Ensemble) -> None:
    prompts = [PROMPT, "When the wind rose in the afternoon, he told"]
    expected = pair.generate(prompts, max_new_tokens=12, draft=0).texts
    by_ids = [ids_of(pair, one) for one in prompts]
    for prompt in (prompts, by_ids):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [one.text for one in answer.choices] == expected
        assert [one.index for one in answer.choices] == [0, 1]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, by_ids))
    assert client.completions.create(prompt=by_ids[0], **GREEDY).choices[0].text == expected[0]


def test_sampling_is_the_ensembles_with_the_seed(client: openai.OpenAI, pair: Ensemble) -> None:
    """Text i of a prompt has the seed + i."""
    settings: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "top_k": 40}
    expected = [
        pair.generate(PROMPT, max_new_tokens=8, do_sample=True, seed=7 + i, **settings).text for i in range(3)
    ]
    extra = {"top_k": settings.pop("top_k")}
    answer = client.completions.create(
        model="deepen", prompt=PROMPT, max_tokens=8, seed=7, n=3, extra_body=extra, **settings
    )
    assert [one.text for one in answer.choices] == expected
    assert len(set(expected)) > 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids_of(pair, PROMPT))  # once
    assert answer.usage.completion_tokens == 24


def test_without_a_temperature_it_samples(client: openai.OpenAI, pair: Ensemble) -> None:
    """As OpenAI has it: the default is 1."""
    answer = client.completions.create(model="deepen", prompt=PROMPT, max_tokens=8, seed=3)
    expected = pair.generate(PROMPT, max_new_tokens=8, do_sample=True, seed=3).text
    assert answer.choices[0].text == expected
    assert client.completions.create(model="deepen", prompt=PROMPT, seed=3).usage.completion_tokens == 16  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_off(client: openai.OpenAI, pair: Ensemble, stream: bool) -> None:
    whole = pair.generate(PROMPT, max_new_tokens=24, draft=0).text
    stop = whole[11:17]
    assert whole.find(stop) == 11
    body = {"prompt": PROMPT, **GREEDY, "max_tokens": 24, "stop": [stop, "never"]}
    if stream:
        chunks = streamed(client, **body)
        text, reason = "".join(one.choices[0].text for one in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**body).choices[0]
        text, reason = choice.text, choice.finish_reason
    assert text == whole[:11]
    assert reason == "stop"


def test_a_stop_that_never_comes_takes_nothing_away(client: openai.OpenAI, pair: Ensemble) -> None:
    """What is held back, because it may begin a stop string, comes in the end."""
    whole = pair.generate(PROMPT, max_new_tokens=12, draft=0).text
    chunks = streamed(client, prompt=PROMPT, stop=[whole[-3:] + "\0"], **GREEDY)
    assert "".join(one.choices[0].text for one in chunks) == whole


def test_echo(client: openai.OpenAI, pair: Ensemble) -> None:
    new = pair.generate(PROMPT, max_new_tokens=12, draft=0).text
    vocabulary = pair.members[0].vocabulary
    for prompt in (PROMPT, vocabulary.encode(PROMPT)):
        answer = client.completions.create(prompt=prompt, echo=True, **GREEDY)
        assert answer.choices[0].text.startswith(PROMPT)
    assert answer.choices[0].text == PROMPT + new
    chunks = streamed(client, prompt=PROMPT, echo=True, **GREEDY)
    assert chunks[0].choices[0].text == PROMPT
    assert "".join(one.choices[0].text for one in chunks) == PROMPT + new
    nothing = client.completions.create(prompt=PROMPT, echo=True, **{**GREEDY, "max_tokens": 0})
    assert nothing.choices[0].text == PROMPT
    assert nothing.usage is not None
    assert nothing.usage.completion_tokens == 0


def test_logprobs_of_a_member_alone(client: openai.OpenAI, pair: Ensemble) -> None:
    """They are the model's own, of the prompt and of the new text."""
    member = pair.members[0]
    ids = ids_of(pair, PROMPT)
    answer = client.completions.create(
        prompt=ids, echo=True, logprobs=7, **{**GREEDY, "model": MAIN, "max_tokens": 3}
    )
    said = answer.choices[0].logprobs
    assert said is not None
    assert said.tokens is not None
    assert said.token_logprobs is not None
    assert said.top_logprobs is not None
    new = Ensemble([member], fuser="single").generate(PROMPT, max_new_tokens=3, draft=0).token_ids
    every = torch.tensor([*ids, *new])
    logprobs = member.model(every[None]).logits[0].log_softmax(-1)
    own = logprobs[:-1].gather(1, every[1:, None])[:, 0].tolist()
    assert said.token_logprobs[0] is None
    assert said.token_logprobs[1:] == pytest.approx(own, abs=1e-3)
    texts = TokenTexts(member)
    assert said.tokens == [texts.text(one) for one in every.tolist()]
    assert "".join(said.tokens[len(member.vocabulary.prefix_ids) :]) == answer.choices[0].text
    assert said.text_offset is not None
    for offset, token in zip(said.text_offset, said.tokens, strict=True):
        assert answer.choices[0].text[offset:].startswith(token)
    for row, top in zip(logprobs, said.top_logprobs[1:], strict=False):
        best = row.topk(7)
        assert [top[texts.text(i)] for i in best.indices.tolist()] == pytest.approx(
            best.values.tolist(), abs=1e-3
        )
        assert len(top) <= 8


def test_logprobs_of_an_ensemble(client: openai.OpenAI, pair: Ensemble) -> None:
    """Of the fused distribution, before processors and warpers."""
    rows: list[torch.Tensor] = []

    def look(ids: torch.Tensor, scores: tuple[torch.Tensor, ...]) -> bool:
        rows.append(scores[0][0].log_softmax(-1))
        return False

    written = pair.generate(PROMPT, max_new_tokens=6, draft=0, stopping_criteria=[look]).token_ids
    answer = client.completions.create(
        prompt=PROMPT, logprobs=5, presence_penalty=0.001, **{**GREEDY, "max_tokens": 6}
    )
    said = answer.choices[0].logprobs
    assert said is not None
    assert said.top_logprobs is not None
    assert said.token_logprobs == pytest.approx(
        [float(row[token]) for row, token in zip(rows, written, strict=True)], abs=1e-3
    )
    for row, top in zip(rows, said.top_logprobs, strict=True):
        assert sorted(top.values(), reverse=True)[:5] == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)
    chunks = streamed(client, prompt=PROMPT, logprobs=5, **{**GREEDY, "max_tokens": 6})
    tokens = [one for chunk in chunks if (own := chunk.choices[0].logprobs) for one in own.tokens]
    assert tokens == said.tokens


def test_no_alternatives_but_the_tokens_own(client: openai.OpenAI) -> None:
    said = client.completions.create(prompt=PROMPT, logprobs=0, **GREEDY).choices[0].logprobs
    assert said is not None
    assert said.top_logprobs is not None
    assert [list(one) for one in said.top_logprobs] == [[one] for one in said.tokens or ()]


def test_tokens_as_ids_and_prompt_logprobs(client: openai.OpenAI, pair: Ensemble) -> None:
    """As vLLM has them."""
    ids = ids_of(pair, PROMPT)
    extra = {"return_tokens_as_token_ids": True, "prompt_logprobs": 3}
    answer = client.completions.create(
        prompt=ids, logprobs=128, extra_body=extra, **{**GREEDY, "model": MAIN, "max_tokens": 1}
    )
    choice: Any = answer.choices[0]
    (top,) = choice.logprobs.top_logprobs
    assert len(top) == 128
    assert all(one.startswith("token_id:") for one in top)
    assert math.exp(max(top.values())) <= 1
    first, *rest = choice.prompt_logprobs
    assert first is None
    assert len(rest) == len(ids) - 1
    for token, entries in zip(ids[1:], rest, strict=True):
        assert str(token) in entries
        assert [one["rank"] for one in entries.values()][:3] == [1, 2, 3]
        assert 3 <= len(entries) <= 4


def test_penalties_and_biases(client: openai.OpenAI, pair: Ensemble) -> None:
    plain = pair.generate(PROMPT, max_new_tokens=24, draft=0)
    assert len(set(plain.token_ids)) < 24

    def ids(**more: Any) -> list[int]:
        body = {"extra_body": {"return_tokens_as_token_ids": True}, "logprobs": 0, **GREEDY, "max_tokens": 24}
        said = client.completions.create(prompt=PROMPT, **{**body, **more}).choices[0].logprobs
        assert said is not None
        return [int(one.removeprefix("token_id:")) for one in said.tokens or ()]

    assert ids() == plain.token_ids
    for name in ("presence_penalty", "frequency_penalty"):
        assert ids(**{name: 2}) == by_hand(pair, name, 2)
    repeated = pair.generate(PROMPT, max_new_tokens=24, draft=0, repetition_penalty=1.5).token_ids
    extra = {"return_tokens_as_token_ids": True, "repetition_penalty": 1.5}
    assert ids(extra_body=extra) == repeated
    assert repeated != plain.token_ids
    banned = plain.token_ids[0]
    assert banned not in ids(logit_bias={str(banned): -100})
    assert ids(logit_bias={str(banned): 100}) == [banned] * 24


def by_hand(pair: Ensemble, name: str, amount: float) -> list[int]:
    """Greedy decoding with the penalty as OpenAI writes it down."""

    class Penalty:
        def __init__(self) -> None:
            self.length: int | None = None

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.length = ids.shape[1] if self.length is None else self.length
            changed = scores.clone()
            for token in set(new := ids[0, self.length :].tolist()):
                changed[0, token] -= amount * (1 if name == "presence_penalty" else new.count(token))
            return changed

    return pair.generate(PROMPT, max_new_tokens=24, draft=0, logits_processor=[Penalty()]).token_ids


def test_ways_of_fusing_for_one_request(client: openai.OpenAI, pair: Ensemble) -> None:
    for own in (
        {"fuser": "deepen:calibrated"},
        {"weights": [0.2, 0.8]},
        {"fuser": "union-topk", "weights": [0.9, 0.1]},
        {"draft": 3},
    ):
        answer = client.completions.create(prompt=PROMPT, extra_body=own, **GREEDY)
        settings = {key: value for key, value in own.items() if key != "draft"}
        if settings.get("fuser") == "deepen:calibrated":
            settings = {"fuser": "deepen", "recipe": "calibrated"}
        expected = pair.variant(**settings).generate(PROMPT, max_new_tokens=12, draft=0)
        assert answer.choices[0].text == expected.text


def test_every_token_explained(client: openai.OpenAI, pair: Ensemble) -> None:
    records: list[dict[str, Any]] = []
    expected = pair.generate(PROMPT, max_new_tokens=12, draft=0, trace=records.append)
    whole: Any = client.completions.create(prompt=PROMPT, extra_body={"explain": True}, **GREEDY)
    chunks: list[Any] = streamed(client, prompt=PROMPT, extra_body={"explain": True}, **GREEDY)
    told = [one.deepen for one in chunks if getattr(one, "deepen", None)]
    assert "".join(one.choices[0].text for one in chunks) == expected.text
    for found in (whole.choices[0].deepen, told):
        assert [one["token"]["id"] for one in found] == expected.token_ids
        for one, other in zip(found, records, strict=True):
            for key in ("position", "token", "main_choice", "not_asked"):
                assert one[key] == other[key]
            assert [own["name"] for own in one["members"]] == [own["name"] for own in other["members"]]
            assert one["fused"][0]["id"] == other["fused"][0]["id"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_says_which_member_was_lost_on_the_way(pair: Ensemble, stream: bool) -> None:
    members = [pair.members[0], losing(pair.members[1])]
    with serving({"deepen": Ensemble(members, fuser="deepen", on_failure="continue")}) as running:
        create = running.client().completions.create
        before: Any = create(prompt=PROMPT, **GREEDY)
        assert not hasattr(before.choices[0], "lost")
        backend_of(members[1]).arm(9)
        answer: Any = create(prompt=PROMPT, stream=stream, **GREEDY)
        choices = [one.choices[0] for one in answer] if stream else answer.choices
        (token,) = choices[-1].lost.values()
        assert 0 < token < GREEDY["max_tokens"]
        assert list(choices[-1].lost) == [ASSISTANT]
        assert not any(hasattr(one, "lost") for one in choices[:-1])


def test_many_at_once_by_the_async_client(served: Running, pair: Ensemble) -> None:
    prompts = [f"{PROMPT} {i}" for i in range(12)]
    expected = pair.generate(prompts, max_new_tokens=10, draft=0).texts

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        text = ""
        async for chunk in await client.completions.create(
            prompt=prompt, stream=True, **{**GREEDY, "max_tokens": 10}
        ):
            text += chunk.choices[0].text
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))

    assert asyncio.run(all_of_them()) == expected


def test_the_guides_example(served: Running, pair: Ensemble, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000" in block
    exec(compile(block.replace("http://127.0.0.1:8000", served.url), "docs/serving.md", "exec"), {})
    expected = pair.generate("The capital of France is", max_new_tokens=24, draft=0).text
    assert capsys.readouterr().out == expected
