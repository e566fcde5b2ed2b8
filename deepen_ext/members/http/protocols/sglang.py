"""SGLang's own endpoint, ``/generate``.

The top tokens of several positions come in one request, from the prompt's log-probabilities. What the server
keeps of the text before these positions is used, and no more of it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from deepen_ext.members.http.rows import Row


class SGLangProtocol(Protocol):
    """See the module."""

    name = "sglang"
    path = "/generate"

    @classmethod
    def found_at(cls, client: Client) -> SGLangProtocol | None:
        """See `Protocol`. The second names of the endpoints are those of older versions."""
        model = _first(client, "/model_info", "/get_model_info")
        if not isinstance(model, dict) or "model_path" not in model:
            return None
        server = _first(client, "/server_info", "/get_server_info") or {}
        longest = server.get("max_req_input_len") or server.get("context_length")
        families = model.get("architectures") or [None]
        protocol = cls(
            Served(
                server=f"SGLang {server.get('version', '')}".strip(),
                model=str(model.get("served_model_name") or model["model_path"]),
                context_length=longest - 1 if isinstance(longest, int) else None,
                dtype=server.get("dtype") if server.get("dtype") != "auto" else None,
                architecture=model.get("model_type") or families[0],
            )
        )
        protocol.read_block = 256
        return protocol

    def payload(self, asked: Question) -> Mapping[str, Any]:
        """See `Protocol`."""
        several = asked.positions > 1
        return {
            "input_ids": list(asked.ids),
            "sampling_params": {
                "max_new_tokens": 1,
                "temperature": asked.temperature,
                **NEUTRAL_SAMPLING,
                "ignore_eos": True,
            },
            "return_logprob": True,
            "top_logprobs_num": asked.k,
            "logprob_start_len": len(asked.ids) - asked.positions if several else -1,
        }

    def read(self, answer: Any, asked: Question) -> Reading:
        """See `Protocol`. The prompt's first entry is of a token that nothing was said before."""
        said = answer["meta_info"]
        of_prompt = said["input_top_logprobs"][1:] if asked.positions > 1 else []
        rows = [_row(one) for one in (*of_prompt, said["output_top_logprobs"][0])]
        return Reading(rows, said.get("prompt_tokens"), said.get("cached_tokens"))

    def tokenize(self, client: Client, text: str) -> list[int] | None:
        """See `Protocol`."""
        payload = {"model": self.served.model, "prompt": text, "add_special_tokens": False}
        return tokens_of(answered(lambda: client.post("/tokenize", payload)))


def _first(client: Client, *paths: str) -> Any:
    """What the first of some endpoints gives that the server has."""
    for path in paths:
        if (found := answered(lambda path=path: client.get(path))) is not None:  # type: ignore[misc]
            return found
    return None


def _row(said: Any) -> Row:
    return Row([one[1] for one in said], [one[0] for one in said])
