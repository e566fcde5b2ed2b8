"""The text of a prompt that comes as the main model's ids: what the assistants read."""

from __future__ import annotations

from collections.abc import Sequence

from deepen_ext.members.member import Member
from deepen_ext.text.characters import Utf8Stream


def text_of(member: Member, ids: Sequence[int]) -> tuple[str, bytes]:
    """The text of a prompt's ids up to its last whole character, and the bytes after that.

    It is without what the tokenizer puts before it, and special tokens are written out.
    """
    vocabulary, start = member.vocabulary, len(member.vocabulary.prefix_ids)
    ids = ids[start:] if list(ids[:start]) == vocabulary.prefix_ids else ids
    special = [i for i, token in enumerate(ids) if vocabulary.tokens[token] is None]
    first = special[0] if special else len(ids)
    data = vocabulary.decode(ids[:first])  # a dummy space stands at the very beginning only
    characters = Utf8Stream()
    return characters.feed(data + written(member, ids[first:])), characters.unfinished


def written(member: Member, ids: Sequence[int]) -> bytes:
    """The bytes of ids that go on from others, special tokens written out."""
    return b"".join(map(member.bytes_written, ids))
