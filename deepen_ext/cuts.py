"""Where a text may be cut so that its two parts, tokenised apart, give the tokens of the whole.

Call `s` a cut of a text T when `encode(T) == encode(T[:s]) + encode(T[s:])`. A growing text needs only one:
if `s` is a cut of the old text and of the new one, the old ids up to `s` stand and only `T[s:]` is encoded
again. Both rules below look at the two characters around `s` alone, so a cut of the new text within the old
one is a cut of the old one too.

Every tokenizer first matches its added tokens (`<|im_end|>`, but also Gemma's runs of newlines) in the raw
text, leftmost and longest. If none of their occurrences has `s` inside, each side finds its own. An
occurrence with `s` inside contains `T[s-1:s+1]`, so no cut is made where any added token has these two
characters side by side. The text between added tokens is then tokenised by one of two rules.

*Splitting regex* (byte-level). Every alternative accepted here (`_ALTERNATIVES`) looks at nothing left of its
match. None matches a character that is not whitespace and then a space, nor a letter or digit and then a
newline or one of `_MARKS`. So between two such characters one match ends and the next begins, and the words
on the right depend on the right side alone. The words on the left are the same when the text ends at `s`:
whatever run a match or its look-ahead follows there stops before `s`. Tokens never span two words. Splitters
that look at the class of single characters (`Digits`) only cut more.

*No token spans* (SentencePiece, where nothing splits, or only at spaces). BPE merges two neighbours into a
token of the vocabulary. If no token has `T[s-1:s+1]` inside, nothing is ever merged across `s`, and since
merges are done by rank, then position, each side merges as it would alone. This would not hold with
`ignore_merges`.

Where neither rule is known to apply, there is no cut, and the whole text is encoded again.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np

from deepen_ext.token_bytes import SPACE_MARK, Encoder

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ALTERNATIVES = frozenset(
    [
        *_GPT2.split("|"),  # GPT-2, SmolLM2
        _CONTRACTION,  # cl100k: Llama 3, Qwen
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?",  # o200k
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    ]
)
_DIGIT_SPLITS = (r"\p{N}", r"\p{N}{1,3}", r"\d", r"[0-9]")

# Whitespace and invisible characters that were classed differently in some version of Unicode.
_UNSURE = frozenset("\u180e\u200b\u200c\u200d\u2060\ufeff")
# Not the apostrophe, which may go on with a word ('s).
_MARKS = frozenset("\n\r\t" + string.punctuation + "，。、；：！？（）「」") - {"'"}  # noqa: RUF001
# Letters in every version of Unicode: Latin, Cyrillic, Kana, Chinese, Hangul.
_LETTERS = (
    ("\u00c0", "\u00d6"),
    ("\u00d8", "\u00f6"),
    ("\u00f8", "\u024f"),
    ("\u0410", "\u044f"),
    ("\u3041", "\u3094"),
    ("\u30a1", "\u30fa"),
    ("\u4e00", "\u9fa5"),
    ("\uac00", "\ud7a3"),
)

Rule = Callable[[str, str], bool]


class CutFinder:
    """Finds the last place at or before a position where a text may be cut. One per vocabulary; 2 MB."""

    def __init__(self, encoder: Encoder) -> None:
        contents = [token.content for token in encoder.added.values()]
        self._added_pairs = frozenset(text[i : i + 2] for text in contents for i in range(len(text) - 1))
        # A token with `rstrip` takes the whitespace after it along: no cut right after its last character.
        strips = [token for token in encoder.added.values() if token.lstrip or token.rstrip]
        self._strips = bool(strips)
        self._strip_ends = frozenset(token.content[-1:] for token in strips)
        self._rule = self._choose_rule(encoder)

    @property
    def incremental(self) -> bool:
        """False where no rule is known for the tokenizer: every append encodes the whole text again."""
        return self._rule is not None

    def last(self, text: str, limit: int) -> int:
        """The largest cut of `text` in 1..limit (limit < len(text)), or 0 where there is none."""
        rule = self._rule
        if rule is None:
            return 0
        for position in range(limit, 0, -1):
            left, right = text[position - 1], text[position]
            if not rule(left, right) or left + right in self._added_pairs:
                continue
            if self._strips and (left.isspace() or left in self._strip_ends):
                continue
            return position
        return 0

    @staticmethod
    def _choose_rule(encoder: Encoder) -> Rule | None:
        if any(token.single_word for token in encoder.added.values()):
            return None  # matched or not depending on its neighbours
        if encoder.kind == "byte_level":
            return _at_word_start if not encoder.normalizer_parts and _splits_words(encoder) else None
        plain_normalizer = all(
            part == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
            for part in encoder.normalizer_parts
        )
        plain_splits = all(
            part["type"] == "Metaspace" or (part["type"] == "Split" and part["pattern"] == {"String": " "})
            for part in encoder.pre_tokenizer_parts
        )
        # A Split at " " finds nothing where the normalizer has already made every space a ▁.
        splits_nothing = encoder.normalizer_parts or all(
            part["type"] == "Metaspace" for part in encoder.pre_tokenizer_parts
        )
        if plain_normalizer and plain_splits and splits_nothing and not encoder.ignores_merges:
            return _no_token_spans(encoder.token_texts())
        return None


def _at_word_start(left: str, right: str) -> bool:
    if right == " ":
        return not left.isspace() and left not in _UNSURE
    if right in _MARKS:
        return (left.isascii() and left.isalnum()) or any(first <= left <= last for first, last in _LETTERS)
    return False


def _splits_words(encoder: Encoder) -> bool:
    """Whether the pre-tokenizer is made of splitters that are known to cut at the start of a word."""
    splits = False
    for part in encoder.pre_tokenizer_parts:
        if part["type"] == "ByteLevel":
            splits |= bool(part["use_regex"])
            if part["add_prefix_space"]:
                return False
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            pattern = part["pattern"].get("Regex", "")
            alternatives = _alternatives(pattern)
            if r"\s+" in alternatives and _ALTERNATIVES.issuperset(alternatives):
                splits = True
            elif pattern not in _DIGIT_SPLITS:
                return False
        elif part["type"] != "Digits":
            return False
    return splits


def _alternatives(pattern: str) -> list[str]:
    """Split a regular expression at its top-level `|`."""
    parts, depth = [""], 0
    for char in pattern:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(char, 0)
        if char == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


_TABLE_BITS = 21


def _no_token_spans(texts: Iterable[str]) -> Rule:
    """The rule that no text has the two characters side by side, as a hashed table of 2 MB.

    Two pairs of the same hash only make a cut go unused (one place in ten for Gemma); they never make a wrong
    one.
    """
    table = np.zeros(1 << _TABLE_BITS, dtype=np.uint8)
    texts = iter(texts)
    while batch := list(islice(texts, 8192)):  # a few MB at a time, where all at once would take 80
        joined = "\0".join(batch).encode("utf-32-le", "surrogatepass")
        codes = np.frombuffer(joined, dtype=np.uint32).astype(
            np.uint64
        )  # uint64 wraps at a multiple of 2 ** 32
        table[((codes[:-1] * 40503 + codes[1:]) * 2654435761 % (1 << 32)) >> (32 - _TABLE_BITS)] = 1
    seen = table.tobytes()

    def rule(left: str, right: str) -> bool:
        return not seen[((ord(left) * 40503 + ord(right)) * 2654435761 % (1 << 32)) >> (32 - _TABLE_BITS)]

    return rule
