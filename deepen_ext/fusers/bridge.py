"""From one member's token to another's: the same bytes, or what the other's text would begin with."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from deepen_ext.space.anchors import first_token, token_ids_of
from deepen_ext.text.vocabulary import Vocabulary

# Whole tables by source and target: a quarter of a million tokens take some seconds to tokenise.
_tables: WeakKeyDictionary[Vocabulary, WeakKeyDictionary[Vocabulary, torch.Tensor]] = WeakKeyDictionary()
_ids: WeakKeyDictionary[Vocabulary, dict[bytes, int]] = WeakKeyDictionary()


class TokenBridge:
    """Looks tokens up in other members' vocabularies, by bytes; EOS by its role.

    Where a vocabulary does not have a token, the token's text is tokenised there, and the first token stands
    for it (UniTE, arXiv 2410.03777, section 4); bytes that are no whole character have the longest token that
    they begin with.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary], eos_ids: Sequence[Sequence[int]]) -> None:
        self._vocabularies = list(vocabularies)
        self._eos = [list(ids) for ids in eos_ids]
        self._found: dict[tuple[int, int, int], int] = {}

    def is_eos(self, member: int, token: int) -> bool:
        """Whether the token ends the member's text."""
        return token in self._eos[member]

    def bytes_of(self, member: int, token: int) -> bytes:
        """The token's bytes; b"" for special tokens."""
        return self._vocabularies[member].tokens[token] or b""

    def first(self, source: int, token: int, target: int) -> int:
        """The target's token for a token of the source, or for its beginning; -1 where there is none."""
        if source == target:
            return token
        if self.is_eos(source, token):
            return self._end_of(target)
        key = (source, token, target)
        if key not in self._found:
            self._found[key] = self._by_bytes(self.bytes_of(source, token), target)
        return self._found[key]

    def table(self, source: int, target: int) -> torch.Tensor:
        """`first` of every token of the source, int64 [V_source]; computed once for two vocabularies."""
        ours, theirs = self._vocabularies[source], self._vocabularies[target]
        kept = _tables.setdefault(ours, WeakKeyDictionary())
        if theirs not in kept:
            found = [self._by_bytes(self.bytes_of(source, i), target) for i in range(ours.vocab_size)]
            kept[theirs] = torch.tensor(found, dtype=torch.int64)
        table = kept[theirs].clone()
        table[self._eos[source]] = self._end_of(target)
        return table

    def _end_of(self, member: int) -> int:
        return self._eos[member][0] if self._eos[member] else -1

    def _by_bytes(self, data: bytes, target: int) -> int:
        if not data:
            return -1
        vocabulary = self._vocabularies[target]
        ids = _by_text(vocabulary)
        if (same := ids.get(data)) is not None:
            return same
        if (begins := first_token(vocabulary, data)) is not None:
            return begins
        shorter = (data[:length] for length in range(len(data) - 1, 0, -1))
        return next((ids[text] for text in shorter if text in ids), -1)


def _by_text(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Each byte string's token."""
    if vocabulary not in _ids:
        _ids[vocabulary] = token_ids_of(vocabulary, (), {text for text in vocabulary.tokens if text})
    return _ids[vocabulary]
