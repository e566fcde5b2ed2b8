"""Prompt lookup: what followed the last time that the text had these words.

Saxena, "Prompt Lookup Decoding" (2023), https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

_NGRAM = 3  # tokens that have to be the same


class PromptLookup:
    """One text's n-grams; each token is looked at once."""

    def __init__(self) -> None:
        self._after: dict[
            tuple[int, ...], int
        ] = {}  # where the text went on after this n-gram, the last time
        self._read = _NGRAM

    def find(self, ids: Sequence[int], most: int) -> list[int]:
        """What followed the text's last tokens before, at most so many; [] where they are new.

        Args:
            ids: the text; that of the last call, with more tokens.
            most: how many are wanted.
        """
        for end in range(self._read, len(ids)):
            self._after[tuple(ids[end - _NGRAM : end])] = end
        self._read = max(self._read, len(ids))
        start = self._after.get(tuple(ids[-_NGRAM:]))
        return [] if start is None else list(ids[start : start + most])
