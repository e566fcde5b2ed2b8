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
_leaving: WeakKeyDictionary[Vocabulary, bool] = WeakKeyDictionary()


class TokenBridge:
    """Looks tokens up in other members' vocabularies, by bytes; EOS by its role.

    Where a vocabulary does not have a token, the token's text is tokenised there, and the first token stands
    for it (UniTE, arXiv 2410.03777, section 4); bytes that are no whole character have the longest token that
    they begin with.

    Not UniTE's: a run of spaces is not looked up by its bytes where one tokenizer leaves the run's last space
    to the next word and the other does not. Before `return`, eight spaces are seven and ` return` for Qwen,
    eight and `return` for Gemma: Qwen's seven stand for Gemma's eight. By bytes they would stand for a seven
    that Gemma never writes there, and indents of Python came out one space short.
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
            self._found[key] = self._by_bytes(self._read_as(source, token, target), target)
        return self._found[key]

    def table(self, source: int, target: int) -> torch.Tensor:
        """`first` of every token of the source, int64 [V_source]; computed once for two vocabularies."""
        ours, theirs = self._vocabularies[source], self._vocabularies[target]
        kept = _tables.setdefault(ours, WeakKeyDictionary())
        if theirs not in kept:
            found = [self._by_bytes(self._read_as(source, i, target), target) for i in range(ours.vocab_size)]
            kept[theirs] = torch.tensor(found, dtype=torch.int64, device="cpu")
        table = kept[theirs].clone()
        table[self._eos[source]] = self._end_of(target)
        return table

    def _end_of(self, member: int) -> int:
        return self._eos[member][0] if self._eos[member] else -1

    def _read_as(self, source: int, token: int, target: int) -> bytes:
        """The token's bytes; of a run of spaces those of the target's run that begins the same text."""
        data = self.bytes_of(source, token)
        if len(data) < 2 or not data.endswith(b" ") or not data.isspace():
            return data
        here, there = (_leaves_a_space(self._vocabularies[member]) for member in (source, target))
        if here == there:
            return data
        return data + b" " if here else data[:-1]

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


def _leaves_a_space(vocabulary: Vocabulary) -> bool:
    """Whether the tokenizer leaves the last space of a run to the word after it, as GPT-2's pattern does."""
    if vocabulary not in _leaving:
        pieces = [vocabulary.bytes_of(token) for token in vocabulary.encode_part("\n        a", 0)[0]]
        _leaving[vocabulary] = pieces[-1:] == [b" a"]
    return _leaving[vocabulary]


def _by_text(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Each byte string's token."""
    if vocabulary not in _ids:
        _ids[vocabulary] = token_ids_of(vocabulary, (), {text for text in vocabulary.tokens if text})
    return _ids[vocabulary]
