"""A member's token ids for a text that only grows."""

from __future__ import annotations

from bisect import bisect_right
from copy import copy

from deepen_ext.text.characters import check_characters
from deepen_ext.text.vocabulary import Vocabulary


class GrowingText:
    """A member's token ids for a text that only grows.

    After any sequence of appends, `ids == prefix_ids + encode(whole text)`. An append encodes again only what
    stands after the last cut before the old end (see `cuts.py`), most often the last word. Neither `append`
    nor `keeps_ids` looks at anything before that cut, so both cost the same however long the text is.
    """

    def __init__(self, vocabulary: Vocabulary, text: str, *, prefix: bool = True) -> None:
        """Encode the text; `prefix=False` leaves `prefix_ids` out (a chat template writes its own)."""
        self._vocabulary = vocabulary
        # `_ends`: where each id ends, in characters; without the prefix.
        ids, self._ends = vocabulary.encode_spans(text)
        self._start = len(vocabulary.prefix_ids) if prefix else 0
        self.ids: list[int] = vocabulary.prefix_ids[: self._start] + ids
        # The text is `_settled`, then `_tail`, which begins at the last cut before the text's last character.
        self._cut = vocabulary.cuts.last(text)
        self._settled = [text[: self._cut]]
        self._tail = text[self._cut :]

    @property
    def text(self) -> str:
        """The whole text so far."""
        return "".join(self._settled) + self._tail

    def copy(self) -> GrowingText:
        """The same text, to go on in another way."""
        twin = copy(self)
        twin.ids, twin._ends, twin._settled = list(self.ids), list(self._ends), list(self._settled)
        return twin

    def keeps_ids(self, text: str) -> bool:
        """Whether `append(text)` would leave all present ids as they are. Changes nothing.

        Most often the text begins a new word: its first character and the last one here tell. Otherwise the
        last word is encoded again.
        """
        if not text or not self._tail or self._vocabulary.cuts.at(self._tail[-1], text[0]):
            return True
        present = self.ids[self._kept() + self._start :]
        return self._encoded(self._tail + text)[0][: len(present)] == present

    def append(self, text: str) -> int:
        """Add text to the end; returns how many ids, from the start, are the same as before.

        `ids` is changed in place, after those.

        Raises:
            InputError: a lone surrogate in the text; nothing was added.
        """
        if not text:
            return len(self.ids)
        check_characters(text)
        cuts = self._vocabulary.cuts
        old = len(self._tail)
        if old and cuts.at(self._tail[-1], text[0]):
            self._settle(old)
            old = 0
        tail = self._tail + text
        kept = self._kept()
        ids, ends = self._encoded(tail)
        self._ends[kept:] = ends
        self._tail = tail
        start = kept + self._start
        before = self.ids[start:]
        differ = (i for i, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other)
        same = next(differ, min(len(before), len(ids)))
        self.ids[start + same :] = ids[same:]
        if cut := cuts.last(tail, after=old):
            self._settle(cut)
        return start + same

    def _kept(self) -> int:
        """How many ids stand before the tail, without the prefix."""
        return bisect_right(self._ends, self._cut) if self._cut else 0

    def _encoded(self, tail: str) -> tuple[list[int], list[int]]:
        """Ids and ends of a text that begins where the tail begins."""
        if self._cut:
            return self._vocabulary.encode_part(tail, self._cut)
        return self._vocabulary.encode_spans(tail)

    def _settle(self, count: int) -> None:
        """There is a cut after the first `count` characters of the tail: their ids stand."""
        self._settled.append(self._tail[:count])
        self._tail = self._tail[count:]
        self._cut += count
