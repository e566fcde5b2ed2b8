"""Where a text may be cut so that its two parts, tokenised apart, give the tokens of the whole.

Call `s` a cut of a text T when `encode(T) == encode(T[:s]) + encode(T[s:])`. A growing text needs one cut: if
`s` is a cut of the old text and of the new text, the old ids up to `s` stand and only `T[s:]` is encoded
again. Both rules below look at the two characters around `s` alone, so a cut of the new text within the old
text is a cut of the old text too.

Every tokenizer first matches its added tokens (`<|im_end|>`, but also Gemma's runs of newlines) in the raw
text, leftmost and longest. If none of their occurrences has `s` inside, each side finds its own. An
occurrence with `s` inside contains `T[s-1:s+1]`, so no cut is made where any added token has these two
characters side by side. The text between added tokens is then tokenised by one of two rules.

*Splitters* (byte-level). The pre-tokenizer is a chain of them, each of which splits the pieces of the one
before. A splitter is *transparent* at `s` where what it finds on either side is what it would find there
alone, and *splits* at `s` where a piece surely ends there. Both follow from the tokenizer's own regex
(`split_regex.py`), or from the class that a splitter of single characters looks for. If each splitter is
transparent up to the first one that splits, the pieces left of `s` are those of `T[:s]`, and those right of
it those of `T[s:]`; later splitters see these pieces one by one. Tokens never span two pieces.

What remains slow is a text without a cut: each append encodes it again from its last cut. With a byte-level
tokenizer that is one endless piece, such as a letter repeated 10,000 times, or a run of digits under
`\\p{N}{1,3}`, whose groups of three are counted from the run's beginning.

*No token spans* (SentencePiece, where nothing splits, or only at spaces). BPE merges two neighbours into a
token of the vocabulary. If no token has `T[s-1:s+1]` inside, nothing is ever merged across `s`, and since
merges are done by rank, then position, each side merges as it would alone. This would not hold with
`ignore_merges`.

Where neither rule is known to apply, there is no cut, and the whole text is encoded again (`incremental` is
False, and `deepen-ext doctor` says so).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from deepen_ext.text.encoder import Encoder
from deepen_ext.text.regex_syntax import NotUnderstood
from deepen_ext.text.split_regex import SplitRegex
from deepen_ext.text.tokenizer_parts import SPACES_REPLACED

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # in `ByteLevel` itself
_KEPT = 1 << 16  # pairs of characters whose answers are kept

Rule = Callable[[str, str], bool]


class CutFinder:
    """Finds the cuts of texts. One per vocabulary; 2 MB.

    Attributes:
        at: whether a text may be cut between two characters, `at(left, right)`.
    """

    def __init__(self, encoder: Encoder) -> None:
        contents = [token.content for token in encoder.added.values()]
        self._added_pairs = frozenset(text[i : i + 2] for text in contents for i in range(len(text) - 1))
        # A token with `rstrip` takes the whitespace after it along: no cut right after its last character.
        strips = [token for token in encoder.added.values() if token.lstrip or token.rstrip]
        self._strips = bool(strips)
        self._strip_ends = frozenset(token.content[-1:] for token in strips)
        self._rule = self._choose_rule(encoder)
        self.at = lru_cache(_KEPT)(self._decide)

    @property
    def incremental(self) -> bool:
        """False where no cut is ever found: every append encodes the whole text again."""
        return any(self.at(pair[0], pair[1]) for pair in ("a ", " a", "a,", ",a", ".\n"))

    def last(self, text: str, after: int = 0) -> int:
        """The last cut of `text` beyond `after` characters and before its end, or 0 where there is none."""
        for position in range(len(text) - 1, after, -1):
            if self.at(text[position - 1], text[position]):
                return position
        return 0

    def _decide(self, left: str, right: str) -> bool:
        if self._rule is None or left + right in self._added_pairs:
            return False
        if self._strips and (left.isspace() or left in self._strip_ends):
            return False
        return self._rule(left, right)

    @staticmethod
    def _choose_rule(encoder: Encoder) -> Rule | None:
        if any(token.single_word for token in encoder.added.values()):
            return None  # matched or not depending on its neighbours
        if encoder.kind == "byte_level":
            return None if encoder.normalizer_parts else _between_pieces(encoder.pre_tokenizer_parts)
        replaced = encoder.normalizer_parts == [SPACES_REPLACED]
        # A Split at " " finds nothing where the normalizer has already made every space a ▁.
        splits_nothing = all(
            part["type"] == "Metaspace"
            or (replaced and part["type"] == "Split" and part["pattern"] == {"String": " "})
            for part in encoder.pre_tokenizer_parts
        )
        # With `ignore_merges`, a word that is a token is taken as it is, whatever the merges would give.
        merges = not encoder.view.model.ignore_merges
        if (replaced or not encoder.normalizer_parts) and splits_nothing and merges:
            return _no_token_spans(encoder.token_texts())
        return None


class _RegexSplitter:
    """`Split` by a regex. Where the step is transparent, no match crosses the position.

    So a match ends there if the character before is always part of a match: it is a match by itself, unless
    an earlier match has it. And a match begins there if the character after it is a match by itself.
    """

    def __init__(self, pattern: str, behavior: str) -> None:
        self._regex = SplitRegex(pattern)
        self._apart = behavior in ("Isolated", "Removed")
        self._contiguous = behavior == "Contiguous"
        self.transparent = self._regex.transparent

    def splits(self, left: str, right: str) -> bool:
        regex = self._regex
        if self._apart:
            return regex.alone(left) or regex.alone(right)
        if self._contiguous:  # matches side by side are one piece, and so is what lies between matches
            return (regex.alone(left) and not regex.begins(right)) or (
                not regex.matching(left) and regex.alone(right)
            )
        return False


class _ClassSplitter:
    """`Digits` and `Punctuation`: each character of the class apart, or in runs. No neighbour matters."""

    def __init__(self, isolated: pre_tokenizers.PreTokenizer, behavior: str) -> None:
        self._isolated = isolated
        self._behavior = behavior

    def transparent(self, left: str, right: str) -> bool:
        return True

    def splits(self, left: str, right: str) -> bool:
        before, after = self._has(left), self._has(right)
        if self._behavior == "Isolated":
            return before or after
        return self._behavior == "Contiguous" and before != after

    def _has(self, character: str) -> bool:
        return len(self._isolated.pre_tokenize_str(f"a{character}a")) > 1


def _between_pieces(parts: Iterable[dict[str, Any]]) -> Rule | None:
    """The rule of *splitters*; None where a splitter is not understood."""
    splitters: list[_RegexSplitter | _ClassSplitter] = []
    try:
        for part in parts:
            splitters += _splitters(part)
            if part["type"] == "ByteLevel":
                break  # later splitters see bytes, not characters, but never two pieces at once
    except NotUnderstood:
        return None

    def rule(left: str, right: str) -> bool:
        for splitter in splitters:
            if not splitter.transparent(left, right):
                return False
            if splitter.splits(left, right):
                return True
        return False

    return rule


def _splitters(part: dict[str, Any]) -> list[_RegexSplitter | _ClassSplitter]:
    kind = part["type"]
    if kind == "ByteLevel":
        if part["add_prefix_space"]:
            raise NotUnderstood("a space before each piece")
        return [_RegexSplitter(_GPT2, "Isolated")] if part["use_regex"] else []
    if kind == "Split":
        pattern = part["pattern"]
        regex = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
        return [_RegexSplitter(regex, part["behavior"])]
    if kind == "Digits":
        behavior = "Isolated" if part["individual_digits"] else "Contiguous"
        return [_ClassSplitter(pre_tokenizers.Digits(individual_digits=True), behavior)]
    if kind == "Punctuation":
        return [_ClassSplitter(pre_tokenizers.Punctuation("isolated"), part["behavior"])]
    raise NotUnderstood(f"the pre-tokenizer {kind}")


_TABLE_BITS = 21


def _no_token_spans(tokens: Iterable[str]) -> Rule:
    """The rule of *no token spans*: no token has the two characters side by side. A hashed table of 2 MB.

    Two pairs of the same hash only make a cut go unused (one in ten for Gemma); they never make a wrong cut.
    """
    table = np.zeros(1 << _TABLE_BITS, dtype=np.uint8)
    tokens = iter(tokens)
    while batch := list(islice(tokens, 8192)):  # a few MB at a time; all at once would take 80
        joined = "\0".join(batch).encode("utf-32-le", "surrogatepass")
        # uint64 wraps at a multiple of 2 ** 32.
        codes = np.frombuffer(joined, dtype=np.uint32).astype(np.uint64)
        table[_hashed(codes[:-1], codes[1:])] = 1
    seen = table.tobytes()

    return lambda left, right: not seen[_hashed(ord(left), ord(right))]


def _hashed(left: Any, right: Any) -> Any:
    return ((left * 40503 + right) * 2654435761 % (1 << 32)) >> (32 - _TABLE_BITS)
