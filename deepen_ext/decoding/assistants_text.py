"""One text as the assistants read it: bytes of the main model's tokens in, each assistant's own ids out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from deepen_ext.decoding.boundary import BoundaryRule
from deepen_ext.members.chat import PromptText
from deepen_ext.members.member import Member
from deepen_ext.text.characters import Utf8Stream
from deepen_ext.text.growing_text import GrowingText


class AssistantsText:
    """A text that grows by the bytes of the main model's tokens, and its ids in every assistant's tokens.

    Only whole characters reach the assistants. An assistant's tokens follow when they are asked for: where it
    is not asked for a while, it re-tokenises what came meanwhile at once.
    """

    def __init__(
        self, assistants: Sequence[Member], prompts: Sequence[PromptText], out: Collection[int] = ()
    ) -> None:
        """Tokenise the prompts, one for each assistant.

        Args:
            assistants: who read the text.
            prompts: what each of them reads first.
            out: the assistants that read no further. It may grow.
        """
        self._assistants = assistants
        self._out = out
        self._texts = [
            GrowingText(member.vocabulary, one.text, prefix=one.prefix)
            for member, one in zip(assistants, prompts, strict=True)
        ]
        self._unread = [""] * len(assistants)
        self._bytes = [len(one.text.encode()) for one in prompts]
        self._characters = Utf8Stream()

    def copy(self) -> AssistantsText:
        """The same text, to go on in another way."""
        twin = AssistantsText([], [])
        twin._assistants, twin._out = self._assistants, self._out
        twin._texts = [text.copy() for text in self._texts]
        twin._unread, twin._bytes = list(self._unread), list(self._bytes)
        twin._characters = self._characters.copy()
        return twin

    def append(self, data: bytes) -> str:
        """Add a token's bytes; returns the characters they complete."""
        piece = self._characters.feed(data)
        if piece:
            size = len(piece.encode())
            for i in range(len(self._texts)):
                self._unread[i] += piece
                self._bytes[i] += size
        return piece

    def finish(self) -> str:
        """The text has ended: what an unfinished character leaves."""
        return self._characters.finish()

    @property
    def unfinished(self) -> bool:
        """Whether a character waits for its other bytes: the assistants cannot read the text as it is."""
        return self._characters.pending

    def ids(self, i: int) -> list[int]:
        """Assistant i's ids of the text so far."""
        return self._text(i).ids

    def tokens(self) -> list[int]:
        """How many tokens the text has for each assistant."""
        return [len(self.ids(i)) for i in range(len(self._texts))]

    def fits(self) -> bool:
        """Whether every assistant's context holds the text so far."""
        return all(
            # A text of fewer bytes has fewer tokens (but for a dummy space): then what is unread can wait.
            i in self._out
            or member.fits(size + len(member.vocabulary.prefix_ids) + 1)
            or member.fits(len(self.ids(i)))
            for i, (member, size) in enumerate(zip(self._assistants, self._bytes, strict=True))
        )

    def share(
        self,
        i: int,
        rule: BoundaryRule | None,
        candidates: Sequence[tuple[int, float]],
        weights: Sequence[float],
    ) -> float:
        """How much of its weight assistant i keeps at the next token, 0 to 1; 0: it takes no part in it.

        It takes none where the text has an unfinished character, and where the rule lets it sit out.

        Args:
            i: the assistant, counted without the main model.
            rule: the ensemble's; None where there is none.
            candidates: see `BoundaryRule.sits_out`.
            weights: one for each member, the main model first.
        """
        if self.unfinished:
            return 0.0
        return 1.0 if rule is None else rule.share(self._text(i), candidates, weights[0], weights[i + 1])

    def _text(self, i: int) -> GrowingText:
        """The text as assistant i reads it, brought up to date."""
        text = self._texts[i]
        if unread := self._unread[i]:
            text.append(unread)
            self._unread[i] = ""
        return text
