"""One text of an answer while it comes: stop strings cut off, what may still be cut held back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepen_ext.serving.requests import Ended, Piece

# OpenAI's words. "cancelled" and "member_lost" are no ends of a text: the answer fails.
_REASONS = {
    "eos": "stop",
    "stop_string": "stop",
    "stopping_criteria": "stop",
    "length": "length",
    "context": "length",
}


@dataclass
class Part:
    """What is told of a text at once.

    Attributes:
        text: whole characters; never a part of a stop string.
        pieces: the tokens behind it, and behind what is held back.
        finish_reason: of the text's last part.
        lost: of the text's last part, see `Generation`.
    """

    text: str
    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str | None = None
    lost: Mapping[str, int] = field(default_factory=dict)


class Writing:
    """A text."""

    def __init__(self, stops: Sequence[str], write: bool = True) -> None:
        """Nothing has come yet.

        Args:
            stops: the text ends before any of these.
            write: false where tokens are not wanted at all.
        """
        self.ended: Ended | None = None
        self._stops = stops
        self._write = write
        self._held = ""

    def add(self, pieces: Sequence[Piece]) -> Part:
        """Tokens were written."""
        if not self._write:
            return Part("")
        text = self._held + "".join(one.text for one in pieces)
        keep = _held_back(text, self._stops)
        self._held = text[len(text) - keep :]
        return Part(text[: len(text) - keep], list(pieces))

    def end(self, ended: Ended) -> Part:
        """The text has ended."""
        self.ended = ended
        text = self._held + ended.text
        if not self._write:
            return Part("", finish_reason="length")
        if ended.finish_reason == "stop_string":
            # Where it is not found, it was the name of a special token, which is no part of the text.
            places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
            text = text[: min(places, default=len(text))]
        reason = _REASONS.get(ended.finish_reason, ended.finish_reason)
        return Part(text, finish_reason=reason, lost=ended.lost)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may belong to a stop string."""
    keep = 0
    for stop in stops:
        if (at := text.find(stop)) >= 0:  # it is there: the end comes next
            keep = max(keep, len(text) - at)
            continue
        longest = min(len(stop) - 1, len(text))
        keep = max(keep, next((n for n in range(longest, keep, -1) if text.endswith(stop[:n])), 0))
    return keep
