"""Answers in OpenAI's shapes: a completion's and a chat's, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from deepen_ext.serving.asking import Asked
from deepen_ext.serving.requests import Ended, Piece, Prompted
from deepen_ext.serving.tokens import CompletionLogprobs, TokenTexts, characters
from deepen_ext.serving.writing import Part


class Shape(ABC):
    """How one request is answered.

    Attributes:
        kind: the object's name, whole.
        chunk_kind: in chunks.
        prefix: of its id.
    """

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, asked: Asked, *, explain: bool, as_ids: bool = False) -> None:
        """Of a request.

        Args:
            asked: what the engine is asked for.
            explain: every token's record comes along.
            as_ids: tokens as ids.
        """
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.asked = asked
        self.explain = explain
        self.texts = TokenTexts(asked.model.main, as_ids)

    def chunk(self, number: int, part: Part) -> dict[str, Any]:
        """A part of text `number`."""
        found = self._frame(self.chunk_kind, [self._delta(number, part) | _lost(part)])
        if self.explain and part.pieces:
            found["deepen"] = part.pieces[0].record
        return found

    def whole(self, parts: Sequence[Sequence[Part]], ended: Sequence[Ended]) -> dict[str, Any]:
        """All texts, each of its parts."""
        choices = [self._choice(number, own) | _lost(own[-1]) for number, own in enumerate(parts)]
        if self.explain:
            for choice, own in zip(choices, parts, strict=True):
                choice["deepen"] = [piece.record for part in own for piece in part.pieces]
        return self._frame(self.kind, choices) | {"usage": self.usage(ended)}

    def usage(self, ended: Sequence[Ended]) -> dict[str, Any]:
        """Token counts; a prompt counts once, however many texts follow it."""
        prompt = sum(one.prompt_tokens for one in ended[:: self.asked.n])
        new = sum(one.completion_tokens for one in ended) if self.asked.write else 0
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def usage_chunk(self, ended: Sequence[Ended]) -> dict[str, Any]:
        """The last chunk, where it is asked for."""
        return self._frame(self.chunk_kind, []) | {"usage": self.usage(ended)}

    def begin(self, number: int, prompted: Prompted | None) -> dict[str, Any] | None:
        """The first chunk of a text, where something stands before its tokens."""
        del number, prompted
        return None

    def prompted(self, number: int, prompted: Prompted) -> None:
        """The prompt of a text was read; of an answer that comes whole."""
        del number, prompted

    @abstractmethod
    def _delta(self, number: int, part: Part) -> dict[str, Any]:
        """A chunk's choice."""

    @abstractmethod
    def _choice(self, number: int, parts: Sequence[Part]) -> dict[str, Any]:
        """A whole answer's choice."""

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model.name,
            "choices": choices,
        }


class CompletionShape(Shape):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: Asked, *, explain: bool, as_ids: bool = False) -> None:
        """See `Shape`."""
        super().__init__(asked, explain=explain, as_ids=as_ids)
        self._logprobs = [CompletionLogprobs(self.texts, asked.top or 0) for _ in asked.requests]
        self._prompts: dict[int, Prompted] = {}

    def prompted(self, number: int, prompted: Prompted) -> None:
        """See `Shape`."""
        self._prompts[number] = prompted

    def begin(self, number: int, prompted: Prompted | None) -> dict[str, Any] | None:
        """See `Shape`: the echo."""
        if prompted is not None:
            self._prompts[number] = prompted
        if not self.asked.echo and prompted is None:
            return None
        choice = self._head(number)
        return self._frame(self.chunk_kind, [choice | {"finish_reason": None}])

    def _head(self, number: int) -> dict[str, Any]:
        """The echo of a text's prompt, or nothing; with the prompt's logprobs where they are asked for."""
        asked, prompted = self.asked, self._prompts.get(number)
        text = asked.echo[number // asked.n] if asked.echo else ""
        choice: dict[str, Any] = {"index": number, "text": text, "logprobs": None}
        if asked.echo and asked.top is not None and prompted is not None:
            lengths = characters(asked.model.main, prompted.ids)
            choice["logprobs"] = self._logprobs[number].of_prompt(prompted.ids, prompted.scored, lengths)
        if asked.prompt_top is not None and prompted is not None:
            choice["prompt_logprobs"] = self.texts.prompt_logprobs(
                prompted.ids, prompted.scored, asked.prompt_top
            )
        return choice

    def _delta(self, number: int, part: Part) -> dict[str, Any]:
        return {
            "index": number,
            "text": part.text,
            "logprobs": self._of(number, part.pieces) if part.pieces else None,
            "finish_reason": part.finish_reason,
        }

    def _choice(self, number: int, parts: Sequence[Part]) -> dict[str, Any]:
        choice = self._head(number)
        choice["text"] += "".join(one.text for one in parts)
        own = self._of(number, [piece for one in parts for piece in one.pieces])
        before = choice["logprobs"]
        choice["logprobs"] = (
            own if before is None or own is None else {key: before[key] + own[key] for key in own}
        )
        return choice | {"finish_reason": parts[-1].finish_reason}

    def _of(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        return None if self.asked.top is None else self._logprobs[number].of_pieces(pieces)


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def begin(self, number: int, prompted: Prompted | None) -> dict[str, Any] | None:
        """See `Shape`: who speaks."""
        del prompted
        delta = {"role": "assistant", "content": ""}
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._frame(self.chunk_kind, [choice])

    def _delta(self, number: int, part: Part) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": part.text} if part.text else {},
            "logprobs": self._of(part.pieces) if part.pieces else None,
            "finish_reason": part.finish_reason,
        }

    def _choice(self, number: int, parts: Sequence[Part]) -> dict[str, Any]:
        text = "".join(one.text for one in parts)
        return {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._of([piece for one in parts for piece in one.pieces]),
            "finish_reason": parts[-1].finish_reason,
        }

    def _of(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        return None if self.asked.top is None else self.texts.chat_logprobs(pieces, self.asked.top)


def _lost(part: Part) -> dict[str, Any]:
    """Of a choice: the members that were lost on the way, and from which token on; nothing where none was."""
    return {"lost": dict(part.lost)} if part.lost else {}
