"""Servers of OpenAI's style, vLLM above all: ``/v1/completions`` with ids as prompts.

A server must take ids and give ids. vLLM names its tokens ``token_id:123`` where asked to; llama.cpp's server
has the id beside each token. A server that gives tokens as texts alone cannot be used: texts are not ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from deepen_ext.errors import ModelError
from deepen_ext.members.http.client import Client
from deepen_ext.members.http.protocols.base import (
    NEUTRAL_SAMPLING,
    Protocol,
    Question,
    Reading,
    Served,
    answered,
    tokens_of,
)
from deepen_ext.members.http.protocols.llama_cpp import SURELY
from deepen_ext.members.http.rows import BadRow, Row

MODELS = "/v1/models"
_MARK = "token_id:"


class OpenAIProtocol(Protocol):
    """See the module."""

    name = "openai"
    path = "/v1/completions"

    @classmethod
    def found_at(cls, client: Client) -> OpenAIProtocol | None:
        """See `Protocol`; adapters on a model are left out.

        Raises:
            ModelError: the server has several models.
        """
        found = answered(lambda: client.get(MODELS))
        if not isinstance(found, dict) or not found.get("data"):
            return None
        models = [one for one in found["data"] if not one.get("parent")]
        if len(models) != 1:
            names = ", ".join(str(one.get("id")) for one in models)
            raise ModelError(
                f"{client.address}: the server has {len(models)} models ({names}); {_single(client, models)}"
            )
        (model,) = models
        version = answered(lambda: client.get("/version"))
        owner = str(model.get("owned_by", "a server"))
        longest = model.get("max_model_len")
        meta = model.get("meta") or {}
        served = Served(
            server=f"{owner} {(version or {}).get('version', '')}".strip(),
            model=str(model["id"]),
            vocab_size=meta.get("n_vocab"),
            context_length=longest - 1 if isinstance(longest, int) else None,  # one more token must fit
        )
        protocol = cls(served)
        if owner in ("vllm", "deepen-ext"):  # they have prompt_logprobs
            protocol.read_block = 1 << 20
        return protocol

    def payload(self, asked: Question) -> Mapping[str, Any]:
        """See `Protocol`."""
        prompts = asked.prefixes
        llama_cpp = self.served.server.startswith("llamacpp") and self.written is not None
        return {
            **({"logit_bias": {str(self.written): SURELY}} if llama_cpp else {}),
            "model": self.served.model,
            "prompt": prompts[0] if len(prompts) == 1 else prompts,
            "max_tokens": 1,
            "logprobs": asked.k,
            "temperature": asked.temperature,
            **NEUTRAL_SAMPLING,
            "add_special_tokens": False,
            "return_tokens_as_token_ids": True,
        }

    def read_payload(self, asked: Question) -> Mapping[str, Any]:
        """By vLLM's ``prompt_logprobs``, which reads the text anew; other servers as ever."""
        if asked.positions <= self.most_positions:
            return self.payload(asked)
        whole = Question(asked.ids, 1, asked.k)
        return {**self.payload(whole), "prompt_logprobs": asked.k}

    def read(self, answer: Any, asked: Question) -> Reading:
        """See `Protocol`."""
        choices = sorted(answer["choices"], key=lambda one: one["index"])
        rows: list[Row] = []
        if asked.positions > 1 and (of_prompt := choices[-1].get("prompt_logprobs")):
            rows += map(_of_prompt, of_prompt[len(asked.ids) - asked.positions + 1 :])
        rows += [_of_choice(one["logprobs"]) for one in choices]
        usage = answer.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        counted = usage.get("prompt_tokens") if len(choices) == 1 else None  # else of all prompts together
        return Reading(rows, counted, details.get("cached_tokens"), answer.get("model"))

    def tokenize(self, client: Client, text: str) -> list[int] | None:
        """See `Protocol`: vLLM's endpoint, and llama.cpp's of the same name."""
        payload = {
            "model": self.served.model,
            "prompt": text,
            "content": text,
            "add_special_tokens": False,
            "add_special": False,
            "parse_special": False,
        }
        return tokens_of(answered(lambda: client.post("/tokenize", payload)))

    def count(self, client: Client, text: str) -> int | None:
        """See `Protocol`: the text as a prompt."""
        payload = {**self.payload(Question([], 1, 1)), "prompt": text}
        answer = answered(lambda: client.post(self.path, payload))
        return ((answer or {}).get("usage") or {}).get("prompt_tokens")


def _of_choice(said: Any) -> Row:
    """The only token's log-probabilities, as vLLM or as llama.cpp writes them."""
    if "content" in said:
        top = said["content"][0]["top_logprobs"]
        return Row([one["id"] for one in top], [one["logprob"] for one in top])
    (top,) = said["top_logprobs"]
    return Row(_ids(list(top)), list(top.values()))


def _of_prompt(said: Mapping[str, Any]) -> Row:
    return Row([int(one) for one in said], [one["logprob"] for one in said.values()])


def _ids(tokens: Sequence[str]) -> list[int]:
    if not all(one.startswith(_MARK) for one in tokens):
        raise BadRow("gave tokens as texts, not as ids (return_tokens_as_token_ids)")
    return [int(one.removeprefix(_MARK)) for one in tokens]


def _single(client: Client, models: Sequence[Mapping[str, Any]]) -> str:
    """What to do about several models: of a server of ours each member has an address of its own."""
    ids = [str(one["id"]) for one in models if _is_member(one)]
    if not ids:
        return "start one with a single model for this member"
    addresses = (f"{client.address}/members/{quote(one, safe='')}" for one in ids)
    return f"name one of its members: {' or '.join(addresses)}"


def _is_member(model: Mapping[str, Any]) -> bool:
    """Whether it is a member alone, of a server of ours; of two members of one name one is called NAME#2."""
    name = re.sub(r"#\d+$", "", str(model["id"]))
    return (model.get("deepen") or {}).get("members") in ([model["id"]], [name])
