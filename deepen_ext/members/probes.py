"""What backends with a tokenizer of their own compare it with ours by."""

from __future__ import annotations

from collections.abc import Sequence

from deepen_ext.text.token_bytes import SPACE_MARK
from deepen_ext.text.vocabulary import PROBES

# Without the mark, which stays what it is in our vocabulary, and which llama.cpp takes for a space.
COMPARED = tuple(text for text in PROBES if SPACE_MARK not in text)


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Where two lists of ids part; the length of the shorter one where it begins the other."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
