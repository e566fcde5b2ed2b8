"""Lanes whose texts have ended, kept for texts that begin alike: system prompts, chats that go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepen_ext.members.asking import common_prefix

_MOST = 4
_LITTLE = 16  # tokens of a kept lane that a new text may cost while other lanes are empty


class KeptLanes:
    """The newest lanes whose texts have ended, with the ids that each member has there."""

    def __init__(self) -> None:
        self._ids: dict[int, list[list[int]]] = {}  # by lane, the oldest first; member after member

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    @property
    def lengths(self) -> list[list[int]]:
        """Of each lane that is kept, how many tokens each member has there."""
        return [list(map(len, ids)) for ids in self._ids.values()]

    def keep(self, lane: int, ids: list[list[int]]) -> int | None:
        """The lane's text has ended. Returns the lane that is kept no longer for it, if there is one."""
        self._ids[lane] = ids
        if len(self._ids) <= _MOST:
            return None
        oldest = next(iter(self._ids))
        del self._ids[oldest]
        return oldest

    def best(self, ids: list[int], free: Sequence[int]) -> int:
        """The free lane for a new text: the one that holds most of its beginning, or an empty one.

        An empty one is taken where the kept one would lose much, such as a chat whose beginning the new text
        shares: sessions copy what is common, and the chat may go on.

        Args:
            ids: the text's, in the main model's tokens.
            free: lanes to choose from. The one that is chosen is kept no longer.
        """
        common = {lane: common_prefix(self._ids[lane][0], ids) for lane in free if lane in self._ids}
        empty = [lane for lane in free if lane not in self._ids]
        best = max(common, key=common.__getitem__, default=None)
        if best is None or (empty and len(self._ids[best][0]) - common[best] > _LITTLE):
            return empty[0]
        del self._ids[best]
        return best

    def shared(self, ids: Sequence[list[int]], others: Sequence[Sequence[list[int]]]) -> list[int]:
        """Of each member, how many of a text's ids another lane begins with.

        Args:
            ids: the text's, member after member.
            others: those of texts that are being written.
        """
        held = [*self._ids.values(), *others]
        return [
            max((common_prefix(own, list(other[member])) for other in held), default=0)
            for member, own in enumerate(ids)
        ]
