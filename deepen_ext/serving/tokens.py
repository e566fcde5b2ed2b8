"""How tokens stand in answers: as texts, as ids, with their bytes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from deepen_ext.members.member import Member
from deepen_ext.serving.requests import Candidate, Piece, Scored


class TokenTexts:
    """Of a main model's tokens."""

    def __init__(self, member: Member, as_ids: bool = False) -> None:
        """as_ids: "token_id:123" in the place of every token."""
        self._member = member
        self._as_ids = as_ids

    def text(self, token: int) -> str:
        """A token; a special one is its name, part of a character "bytes:\\xe2\\x80", as OpenAI has it."""
        if self._as_ids:
            return f"token_id:{token}"
        data = self._member.vocabulary.bytes_of(token)
        if not data:
            return self._member.name_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def plain(self, tokens: Sequence[int]) -> str:
        """The text of a whole prompt, without special tokens; what is left of a character as U+FFFD."""
        return self._member.vocabulary.decode(tokens).decode(errors="replace")

    def chat_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Of a chat's logprobs."""
        data = self._member.vocabulary.bytes_of(token) or None
        return {"token": self.text(token), "logprob": logprob, "bytes": None if data is None else list(data)}

    def chat_logprobs(self, pieces: Sequence[Piece], top: int) -> dict[str, Any]:
        """A chat's logprobs of some tokens, with so many others at each place."""
        content = []
        for one in pieces:
            assert one.scored is not None
            entry = self.chat_entry(one.token, own_logprob(one.token, one.scored))
            entry["top_logprobs"] = [
                self.chat_entry(c.token, finite(c.logprob)) for c in one.scored.top[:top]
            ]
            content.append(entry)
        return {"content": content, "refusal": None}

    def prompt_logprobs(
        self, ids: Sequence[int], scored: Sequence[Scored], top: int
    ) -> list[dict[str, Any] | None]:
        """vLLM's: of every token of a prompt but the first, the best ones at its place, and itself."""
        found: list[dict[str, Any] | None] = [None]
        for token, one in zip(ids[1:], scored, strict=True):
            entries: dict[int, tuple[float, int | None]] = {
                c.token: (finite(c.logprob), rank) for rank, c in enumerate(one.top[:top], 1)
            }
            entries.setdefault(token, (finite(one.logprob), None))
            found.append(
                {
                    str(i): {"logprob": logprob, "rank": rank, "decoded_token": self.text(i)}
                    for i, (logprob, rank) in entries.items()
                }
            )
        return found


class CompletionLogprobs:
    """The logprobs of a completion, token by token; offsets go on from one chunk to the next."""

    def __init__(self, texts: TokenTexts, top: int) -> None:
        self._texts = texts
        self._top = top
        self._offset = 0

    def of_prompt(
        self, ids: Sequence[int], scored: Sequence[Scored], lengths: Sequence[int]
    ) -> dict[str, Any]:
        """Of an echoed prompt, whose first token has none.

        Args:
            ids: the prompt's.
            scored: of all but the first.
            lengths: of each id, how many characters of the prompt it completes.
        """
        known: list[Scored | None] = [None, *scored]
        return self._entries(ids, known, lengths)

    def of_pieces(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Of tokens that were written."""
        return self._entries(
            [one.token for one in pieces],
            [one.scored for one in pieces],
            [len(one.text) for one in pieces],
        )

    def _entries(
        self, ids: Sequence[int], scored: Sequence[Scored | None], lengths: Sequence[int]
    ) -> dict[str, Any]:
        offsets = []
        for length in lengths:
            offsets.append(self._offset)
            self._offset += length
        return {
            "tokens": [self._texts.text(token) for token in ids],
            "token_logprobs": [
                None if one is None else own_logprob(token, one)
                for token, one in zip(ids, scored, strict=True)
            ],
            "top_logprobs": [
                None if one is None else self._best(token, one)
                for token, one in zip(ids, scored, strict=True)
            ],
            "text_offset": offsets,
        }

    def _best(self, token: int, scored: Scored) -> dict[str, float]:
        """The best tokens, and the one that is there; of two that look alike the more probable one."""
        found: dict[str, float] = {}
        for one in (*scored.top[: self._top], Candidate(token, own_logprob(token, scored))):
            found.setdefault(self._texts.text(one.token), finite(one.logprob))
        return found


def own_logprob(token: int, scored: Scored) -> float:
    """The token's own, to the last digit as it stands among the best ones: clients compare the two."""
    return finite(next((one.logprob for one in scored.top if one.token == token), scored.logprob))


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it; that of a token that cannot come is -9999, as in vLLM."""
    return max(logprob, -9999.0)


def characters(member: Member, ids: Sequence[int]) -> list[int]:
    """Of each id of a whole prompt, how many characters of its text it completes."""
    vocabulary = member.vocabulary
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    lengths = [len(decoder.decode(vocabulary.bytes_of(one))) for one in ids]
    # SentencePiece's dummy space before a text is none of its characters.
    more = sum(len(vocabulary.bytes_of(one)) for one in ids) - len(vocabulary.decode(ids))
    first = next((i for i, length in enumerate(lengths) if length), None)
    if more and first is not None:
        lengths[first] -= more
    return lengths
