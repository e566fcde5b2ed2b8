"""What a run does when a member is lost while it writes: it stops, or the others go on (`on_failure`).

    stop       the error has what was written so far (`MemberLost.generations`)
    continue   an assistant that is lost is out for the rest of the run, for all texts. The cycle in which it
               was lost is done again without it, so that no token is made of half an answer. The others'
               weights are scaled to sum to 1, as where an assistant sits out a place.

The main model's loss ends the run in either case: the text is made of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.drafts.pace import Pace
from deepen_ext.decoding.generation import Generation
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress
from deepen_ext.decoding.watched_session import WatchedSession
from deepen_ext.errors import MemberLost
from deepen_ext.ground.warning import warn


class Losses:
    """Of one run.

    Attributes:
        names: of the members that are out, in the order in which they were lost.
    """

    def __init__(
        self,
        team: Team,
        texts: Mapping[int, TextInProgress],
        main: WatchedSession,
        assistants: Assistants,
        pace: Pace,
        results: Callable[[], list[Generation]],
    ) -> None:
        """Nobody is lost yet.

        Args:
            team: of the run.
            texts: of the run.
            main: the main model's session.
            assistants: of the run.
            pace: of the run.
            results: what was written so far, text by text.
        """
        self._team = team
        self._texts = texts
        self._main = main
        self._assistants = assistants
        self._pace = pace
        self._results = results
        self.names: list[str] = []

    def handle(self, error: MemberLost) -> None:
        """A cycle ended with this error. Nothing is under way afterwards.

        Returns where the cycle can be done again: the members that are lost are left out of it.

        Raises:
            MemberLost: the run ends here.
        """
        self._assistants.settle()
        lost = self._assistants.lost()
        if self._main.error is None and not lost:
            raise error  # of no member of this run: of one that a caller's processor asked, say
        if self._main.error is not None:
            raise self._ended(self._main.error, "it is the main model, without which no text goes on")
        if self._team.on_failure != "continue":
            advice = "with on_failure='continue' the others go on without an assistant that is lost"
            raise self._ended(error, advice)
        for member, how in lost.items():
            name = self._team.names[member]
            self.names.append(name)
            self._assistants.leave_out(member)
            self._pace.leave_out(member)
            for text in self._texts.values():
                if text.finish_reason is None:
                    text.lost[name] = text.written
            warn(f"{how}; the others go on without it (on_failure='continue')")

    def _ended(self, error: MemberLost, why: str) -> MemberLost:
        """The error for the caller."""
        for text in self._texts.values():
            text.finish_reason = text.finish_reason or "member_lost"
        written = self._results()
        tokens = sum(len(one.token_ids) for one in written)
        of_texts = f" of {len(written)} texts" if len(written) > 1 else ""
        before = f". {tokens} tokens{of_texts} were written before: they are in this error's `generations`"
        return MemberLost(error.member, f"{error.why}; {why}{before if tokens else ''}", written)
