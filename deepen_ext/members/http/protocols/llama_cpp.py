"""llama.cpp's server: ``/completion``, each text in a slot of its own.

Its log-probabilities are of the model's logits, before all samplers, unless ``post_sampling_probs`` is asked
for. It leaves them out where the token that it writes ends within a character: it is made to write another.
The prompts of one request go through the slot one after the other: each costs its new token alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepen_ext.members.http.client import Client
from deepen_ext.members.http.protocols.base import Protocol, Question, Reading, Served, answered, tokens_of
from deepen_ext.members.http.rows import Row

SURELY = 1e6  # a bias by which a token is written

# Without these an answer has the whole prompt and all settings too.
_FIELDS = ["completion_probabilities", "tokens_evaluated", "timings/cache_n", "index", "model"]


class LlamaCppProtocol(Protocol):
    """See the module."""

    name = "llama.cpp"
    path = "/completion"
    page = 1
    cache_advice = "; of a model with sliding windows start the server with --swa-full"

    @classmethod
    def found_at(cls, client: Client) -> LlamaCppProtocol | None:
        """See `Protocol`."""
        props = answered(lambda: client.get("/props"))
        if not isinstance(props, dict) or "default_generation_settings" not in props:
            return None
        models = answered(lambda: client.get("/v1/models"))
        listed = (models or {}).get("data") or [{}]
        meta = listed[0].get("meta") or {}
        context = min((one for one in (_slot_context(props), meta.get("n_ctx_train")) if one), default=None)
        kind = (props.get("model_ftype") or meta.get("ftype") or "").removeprefix("(guessed) ")
        return cls(
            Served(
                server=f"llama.cpp server {props.get('build_info', '')}".strip(),
                model=str(listed[0].get("id") or props.get("model_alias") or props.get("model_path")),
                vocab_size=meta.get("n_vocab"),
                context_length=None if context is None else context - 1,  # one more token must fit
                slots=int(props.get("total_slots", 0)),
                parameters=meta.get("n_params"),
                dtype="float32" if kind == "all F32" else kind or None,
            )
        )

    def payload(self, asked: Question) -> Mapping[str, Any]:
        """See `Protocol`."""
        return {
            "prompt": asked.prefixes,
            "n_predict": 1,
            "n_probs": asked.k,
            "cache_prompt": True,
            "id_slot": -1 if asked.slot is None else asked.slot,
            "samplers": ["top_k", "temperature"],
            "top_k": 1,
            "temperature": asked.temperature,
            "logit_bias": [] if self.written is None else [[self.written, SURELY]],
            "response_fields": _FIELDS,
        }

    def read(self, answer: Any, asked: Question) -> Reading:
        """See `Protocol`."""
        parts = sorted(answer, key=lambda one: one["index"]) if isinstance(answer, list) else [answer]
        rows = []
        for part in parts:
            (said,) = part["completion_probabilities"]
            top = said["top_logprobs"]
            rows.append(Row([one["id"] for one in top], [one["logprob"] for one in top]))
        last = parts[-1]
        return Reading(rows, last["tokens_evaluated"], last.get("timings/cache_n"), last.get("model"))

    def tokenize(self, client: Client, text: str) -> list[int] | None:
        """See `Protocol`."""
        payload = {"content": text, "add_special": False, "parse_special": False}
        return tokens_of(answered(lambda: client.post("/tokenize", payload)))


def _slot_context(props: Mapping[str, Any]) -> int | None:
    found = props["default_generation_settings"].get("n_ctx")
    return found if isinstance(found, int) else None
