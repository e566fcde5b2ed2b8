"""From the engine's thread to the event loop: what is told of a request's texts, in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

from deepen_ext.serving.engine import Engine, Ticket
from deepen_ext.serving.requests import Ended, Event, Failed, Listener, Piece, Prompted, Request

# What may wait for a client that reads slowly, in pieces of text (see `_weight`), where texts are few.
MOST_WAITING = 4096
_DRAFTED = 64  # tokens of a text that a step may bring, where drafts are written


class Told(NamedTuple):
    """An event of one of the texts, and when it came, by `perf_counter`."""

    text: int
    event: Event
    at: float


class TooSlow(Exception):
    """The client reads so slowly that more waits for it than may."""


class Texts:
    """The texts of one request, while the engine writes them.

    The engine's thread leaves events here and never waits. What a slow client has not taken is bounded: past
    that its texts are cancelled.
    """

    def __init__(self, texts: int, most_waiting: int) -> None:
        """So many texts, of which so much may wait; call it in the event loop."""
        self.tickets: list[Ticket] = []
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._events: list[Told] = []
        self._weight = 0
        self._most = most_waiting
        self._told = False
        self._over = False
        self._given_up = False
        self._going = set(range(texts))

    def submit(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Give the requests to the engine; it reads prompts, so call it outside of the event loop.

        Raises:
            InputError: see `Engine.submit`. Texts that were taken before are cancelled.
        """
        try:
            for number, request in enumerate(requests):
                self.tickets.append(engine.submit(request, self._listener(number)))
        except BaseException:
            self.give_up()
            raise
        if self._given_up:  # meanwhile
            self.give_up()

    async def next(self) -> list[Told]:
        """What has come since the last call; waits for something.

        Raises:
            TooSlow: see there.
        """
        await self._ready.wait()
        self._ready.clear()
        with self._lock:
            events, self._events = self._events, []
            self._weight, self._told = 0, False
            over = self._over
        if over:
            self.give_up()
            raise TooSlow
        return events

    def give_up(self) -> None:
        """Nobody wants the texts any more: those that are not done are cancelled."""
        self._given_up = True
        with self._lock:
            going = list(self._going)
        for number in going:
            if number < len(self.tickets):
                self.tickets[number].cancel()

    def _listener(self, number: int) -> Listener:
        def listen(event: Event) -> None:
            self._put(Told(number, event, perf_counter()))

        return listen

    def _put(self, told: Told) -> None:
        """In the engine's thread."""
        with self._lock:
            if isinstance(told.event, Ended | Failed):
                self._going.discard(told.text)
            if self._over:
                return
            self._events.append(told)
            self._weight += _weight(told.event)
            self._over = self._weight > self._most
            if self._over:
                self._events.clear()
            wake, self._told = not self._told or self._over, True
        if wake:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop has ended, and with it whoever waits
                return

    def _wake(self) -> None:
        if self._over:
            self.give_up()
        self._ready.set()


def most_waiting(requests: Sequence[Request]) -> int:
    """What may wait of these texts: two steps of all of them, or more."""
    steps = (_of_piece(one.top, one.explain) * (_DRAFTED if one.draft else 1) for one in requests)
    return max(MOST_WAITING, 2 * sum(steps))


def _weight(event: Event) -> int:
    """About how much memory an event takes, in pieces without more."""
    if isinstance(event, Prompted):
        return 0  # asked for, and one alone
    if isinstance(event, Piece):
        return _of_piece(0 if event.scored is None else len(event.scored.top), event.record is not None)
    return 0


def _of_piece(top: int, explain: bool) -> int:
    return 1 + top // 4 + (16 if explain else 0)
