"""Asks the assistants about the places of a cycle's drafts; those elsewhere before the main model works.

The main model's word decides what an assistant is asked: which token a draft goes on with, and who sits out.
A member in another process or on another machine would stand idle until then. But the ids that it has to read
next are known before: those of the text as it stands. So it is asked first, and its answer is taken where the
place turns out to need it (`Place.known`); else it is dropped. With drafts the same is done before every
token that the main model writes ahead: when the draft is written, most of its places are verified.

While a draft is written no answer is waited for. What an assistant was not asked by then, it is asked in the
end. Where it is much slower than the main model, it would be waited for twice then, once for the first place
and once for the rest. So what is waited for with drafts is measured both ways, and the better one is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from deepen_ext.decoding.places import Place
from deepen_ext.decoding.questions import Question, questions_about
from deepen_ext.decoding.watched_session import WatchedSession
from deepen_ext.members.backend import Answer
from deepen_ext.members.distribution import Distribution

_TRY_AGAIN = 16  # cycles with drafts after which the other way is measured again
_FADE = 0.7  # of the mean so far, with each later measurement

# By assistant, what it says of some places: batch rows, and of each of them one position.
Said = dict[int, list[tuple[list[int], Distribution]]]


@dataclass(frozen=True)
class _Asked:
    """A question that is under way. Its rows are of `places`."""

    question: Question
    places: Sequence[Place]
    answer: Answer


class Asker:
    """Of one run, a cycle at a time. Assistants are counted without the main model.

    Attributes:
        elsewhere: the assistants that work beside this process.
    """

    def __init__(self, sessions: Sequence[WatchedSession], elsewhere: Collection[int], k: int) -> None:
        """Nothing is asked.

        Args:
            sessions: of all assistants.
            elsewhere: see above.
            k: how many of the most probable tokens they are asked for.
        """
        self.elsewhere = elsewhere
        self._sessions = sessions
        self._k = k
        self._ahead: dict[int, _Asked] = {}
        self._said_ahead: dict[int, list[tuple[Place, Distribution]]] = {}
        self._late: set[int] | None = None  # assistants not asked ahead in this cycle; None: not decided yet
        self._drafted = 0  # cycles with drafts
        self._drafts = False  # whether the last cycle had some
        self._waits_twice: set[int] = set()  # assistants that were, in some cycle
        # With drafts, milliseconds a place in the end: by assistant, by whether it was asked ahead.
        self._waited: dict[tuple[int, bool], float] = {}

    def ask_ahead(self, places: Sequence[Place], lanes: Mapping[int, int], but: int) -> dict[int, float]:
        """Ask the assistants elsewhere, as far as they are free, about what they were not asked yet.

        Args:
            places: of texts that have a lane; those of a text in order.
            lanes: by text.
            but: an assistant that is left alone; -1 for none.

        Returns:
            by assistant, the milliseconds it took.
        """
        spent = {}
        if self._late is None:
            self._late = {i for i in self.elsewhere if self._drafts and not self._pays(i)}
        for i in self.elsewhere:
            asked = self._ahead.get(i)
            if i == but or i in self._late or (asked is not None and not asked.answer.ready()):
                continue
            began = perf_counter()
            self._take(i, places)
            if questions := questions_about(places, i, lanes):
                self._ahead[i] = self._start(i, questions[0], places)
            spent[i] = (perf_counter() - began) * 1e3
        return spent

    def ask(self, places: Sequence[Place], lanes: Mapping[int, int]) -> tuple[Said, dict[int, float]]:
        """What the assistants say of these places. All are asked, then all are waited for.

        Args:
            places: of texts that have a lane; those of a text in order.
            lanes: by text.

        Returns:
            it, and by assistant the milliseconds that asking and waiting took.
        """
        said: Said = {}
        spent = dict.fromkeys(range(len(self._sessions)), 0.0)
        now: list[tuple[int, _Asked, list[Question]]] = []
        # Who was asked ahead is waited for when all others have been asked.
        for i in sorted(spent, key=self._ahead.__contains__):
            began, ahead = perf_counter(), self._ahead.get(i)
            late = ahead is not None and not ahead.answer.ready()
            self._take(i, places)
            if questions := questions_about(places, i, lanes):
                self._waits_twice |= {i} if late else set()
                now.append((i, self._start(i, questions[0], places), questions[1:]))
            if questions or ahead is not None:
                spent[i] += (perf_counter() - began) * 1e3
        while now:
            following = []
            for i, asked, left in now:
                began = perf_counter()
                given = asked.answer.wait().at(asked.question.found)
                # What a session says may not outlive its next question.
                said.setdefault(i, []).append((asked.question.rows, given.clone() if left else given))
                spent[i] += (perf_counter() - began) * 1e3
                if left:
                    following.append((i, left))
            now = []
            for i, left in following:
                began = perf_counter()
                now.append((i, self._start(i, left[0], places), left[1:]))
                spent[i] += (perf_counter() - began) * 1e3
        for row, place in enumerate(places):
            for i, known in place.known.items():
                said.setdefault(i, []).append(([row], known))
        self._learn(places, spent)
        self._forget()
        return said, spent

    def settle(self) -> None:
        """Wait for all that was asked, whatever comes of it, and forget it."""
        for session in self._sessions:
            session.settle()
        self._forget()

    def _start(self, i: int, question: Question, places: Sequence[Place]) -> _Asked:
        answer = self._sessions[i].ask(question.targets, self._k, question.positions)
        return _Asked(question, places, answer)

    def _take(self, i: int, places: Sequence[Place]) -> None:
        """Wait for what the assistant was asked ahead. What it said of these places is known there."""
        asked = self._ahead.pop(i, None)
        if asked is not None:
            given = asked.answer.wait().at(asked.question.found)
            own = self._said_ahead.setdefault(i, [])
            for at, row in enumerate(asked.question.rows):
                own.append((asked.places[row], given.at([at]).clone()))
        for about, said in self._said_ahead.get(i, ()):
            for place in places:
                if place.text == about.text and place.asked.get(i) == about.asked[i]:
                    place.known.setdefault(i, said)

    def _pays(self, i: int) -> bool:
        """Whether to ask an assistant ahead in a cycle with drafts."""
        ahead, after = self._waited.get((i, True)), self._waited.get((i, False))
        if i not in self._waits_twice or ahead is None or after is None:
            return i not in self._waits_twice or ahead is None
        return (ahead <= after) != (self._drafted % _TRY_AGAIN == 0)

    def _learn(self, places: Sequence[Place], spent: Mapping[int, float]) -> None:
        self._drafts = len(places) > len({place.text for place in places})  # some text has several
        if not self._drafts:
            return
        self._drafted += 1
        for i in self.elsewhere:
            way, now = (i, i not in (self._late or ())), spent[i] / len(places)
            self._waited[way] = _FADE * self._waited.get(way, now) + (1 - _FADE) * now

    def _forget(self) -> None:
        self._late = None
        self._ahead.clear()
        self._said_ahead.clear()
