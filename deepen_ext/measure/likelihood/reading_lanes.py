"""The session in which a member reads texts that belong together, such as the choices of an item."""

from __future__ import annotations

from deepen_ext.errors import ModelError
from deepen_ext.members.backend import Session
from deepen_ext.members.member import Member


class ReadingLanes:
    """One session of a member: a lane for each text, and one for other endings of the texts' beginnings.

    Several readings hold it; the last one to leave closes it.

    Attributes:
        session: the session.
        texts: how many texts have a lane of their own, 0 to `texts` - 1.
        beside: the lane for other endings. Where a model cannot run two lanes, it is the text's own.
    """

    def __init__(self, member: Member, texts: int, tokens: int) -> None:
        """Open it, for texts of about so many tokens."""
        self.texts, self.beside = texts, texts
        try:
            self.session: Session = member.backend.open(texts + 1, tokens)
        except ModelError:  # a model that cannot run two lanes in one forward: one lane serves all
            self.session = member.backend.open(1, tokens)
            self.texts, self.beside = 1, 0
        self._readings = 0

    def join(self) -> None:
        """One more reading holds it."""
        self._readings += 1

    def leave(self) -> None:
        """A reading needs it no more."""
        self._readings -= 1
        if self._readings == 0:
            self.session.close()
