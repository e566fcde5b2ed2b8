"""A long text in pieces, each read after some of what stands before it."""

from __future__ import annotations

from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number

PIECE, CONTEXT = 1500, 500  # characters; together some 600 tokens


def pieces(text: str, *, length: int = PIECE, context: int = CONTEXT) -> list[tuple[str, str]]:
    """Cut a text into (context, scored text), so that every character is scored once.

    Args:
        text: not empty.
        length: most characters of a scored text; more only where it would end inside a run of whitespace.
        context: most characters before it.

    A cut is made in the second half of a piece, before the last space that a word follows: there no tokenizer
    has a token that reaches from one side to the other, so that each member scores the same characters. Where
    there is none it is made before other whitespace, and where there is none of that either, inside a word.

    Raises:
        InputError: an empty text, or lengths out of range.
    """
    if not text:
        raise InputError("the text is empty; give some text to score")
    length, context = whole_number("length", length, 1), whole_number("context", context, 0)
    found = []
    begin = 0
    while begin < len(text):
        end = (
            len(text) if len(text) - begin <= length else _cut(text, begin + length // 2 + 1, begin + length)
        )
        before = max(begin - context, 0)
        if before:
            before = next((at for at in range(before, begin) if text[at].isspace()), before)
        found.append((text[before:begin], text[begin:end]))
        begin = end
    return found


def _cut(text: str, first: int, last: int) -> int:
    """Where to cut the text, from `first` to `last`, or later where it cannot be cut there."""
    begins = [at for at in range(last, first - 1, -1) if text[at].isspace() and not text[at - 1].isspace()]
    for at in begins:
        if text[at] == " " and text[at + 1 : at + 2].isalnum():
            return at
    # Whitespace at the end of a context is scored with the text after it: no piece may end in it.
    anywhere = (at for at in range(last, len(text)) if not text[at - 1].isspace())
    return begins[0] if begins else next(anywhere, len(text))
