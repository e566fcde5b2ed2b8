"""A run of the engine, and the requests whose texts it writes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any, cast

from deepen_ext.decoding.accept import Accepted
from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.drafts.draft_settings import DraftSettings
from deepen_ext.decoding.open_run import OpenRun
from deepen_ext.decoding.prompt_ids import text_of
from deepen_ext.decoding.prompts import Messages, Prompt, read_prompts
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress
from deepen_ext.decoding.trace import Trace
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import DeepenError, InputError, MemberLost, ModelError
from deepen_ext.fusers import FusedStep
from deepen_ext.members.chat import PromptText
from deepen_ext.serving.candidates import read_prompt, scored
from deepen_ext.serving.requests import Ended, Failed, Listener, Piece, Request, Scored

LOG = logging.getLogger("deepen_ext.serving")
# Seconds after which a member that was lost is asked again. A server that hangs holds up every text until its
# time limit, so the pause is at least ten times what that took.
_WITHOUT_SECONDS, _WITHOUT_TIMES = 30.0, 10.0


@dataclass(eq=False)
class Waiting:
    """A request that was checked, until its text has ended.

    Attributes:
        request: what was asked for.
        ensemble: with the request's own settings of fusion.
        settings: of the decoding.
        drafts: how far to write ahead, and who does.
        prompt: as the members read it.
        listener: is told what becomes of it.
        cancelled: nobody wants the text any more. Set by any thread.
        began: when the request came, in seconds.
        prompted: what its prompt's tokens were asked for was told.
    """

    request: Request
    ensemble: Ensemble
    settings: Settings
    drafts: DraftSettings
    prompt: Prompt
    listener: Listener
    cancelled: bool = False
    began: float = field(default_factory=monotonic)
    prompted: bool = False

    @cached_property  # the engine looks at it in every step
    def key(self) -> object:
        """Equal for requests whose texts may be written by one run."""
        named = self.ensemble.team.main.special_in(self.settings.every_stop_string)
        return id(self.ensemble.team), self.drafts, self.settings.eos_ids, frozenset(named)

    def text(self) -> TextInProgress:
        """The text before its first new token."""
        length = len(self.prompt.main_ids)
        return TextInProgress(list(self.prompt.main_ids), length, self.settings.new_tokens(length))

    def assistant_lengths(self) -> list[int]:
        """How many tokens the prompt has for each assistant."""
        return AssistantsText(self.ensemble.team.members[1:], self.prompt.texts).tokens()

    def fail(self, error: DeepenError) -> None:
        """The text cannot be written, or not to its end."""
        self.listener(Failed(error))

    def end_unbegun(self) -> None:
        """The text is not wanted any more, and nothing of it was written."""
        self.listener(Ended("cancelled", "", len(self.prompt.main_ids), 0, 0))


def prompt_of(request: Request, ensemble: Ensemble) -> Prompt:
    """What the members read of a request.

    Raises:
        InputError: it is empty, a text of it cannot be read, or an id lies outside the vocabulary.
    """
    given, main = request.prompt, ensemble.members[0]
    if isinstance(given, str) or not all(type(one) is int for one in given) or not given:
        prompts = cast("str | Messages", given)
        return read_prompts(ensemble.members, prompts, request.without_template)[0]
    ids = list(cast("Sequence[int]", given))
    if min(ids) < 0 or max(ids) >= main.vocab_size:
        raise InputError(f"the prompt's token ids must lie in 0..{main.vocab_size - 1}")
    text, unfinished = text_of(main, ids)
    return Prompt(ids, [PromptText(text)] * (len(ensemble.members) - 1), unfinished)


class Running:
    """One `OpenRun` and its requests.

    Attributes:
        used: when a text was last there, in seconds.
        broken: it can only be forgotten.
    """

    def __init__(self, first: Waiting, lanes: int, chunk: int) -> None:
        """Open it, for texts like `first`.

        Raises:
            DeepenError: see `OpenRun`.
        """
        self._requests: dict[int, Waiting] = {}
        self._observer = _Observer(self._requests)
        self._ensemble = first.ensemble  # which must stay, as the run's key has its team's address
        self._run = OpenRun(
            first.ensemble.team,
            first.settings,
            lanes,
            chunk=chunk,
            drafts=first.drafts,
            observer=self._observer,
        )
        self.used = monotonic()
        self.broken = False
        self._stale_at = math.inf

    @property
    def busy(self) -> bool:
        """Whether a text is there."""
        return bool(self._requests)

    @property
    def lost(self) -> bool:
        """Whether a member is out. Such a run is kept without texts, too: a new one would ask it too soon."""
        return self._stale_at < math.inf

    @property
    def stale(self) -> bool:
        """Whether a member is out that another run would ask again."""
        return monotonic() > self._stale_at

    @property
    def free(self) -> int:
        """How many more texts there is room for."""
        return self._run.free

    @property
    def writing(self) -> int:
        """Texts being written."""
        return len(self._requests) - self.reading

    @property
    def reading(self) -> int:
        """Texts whose prompt is being read."""
        return self._run.reading

    @property
    def bytes_held(self) -> int:
        """Of all members' caches."""
        return sum(self._run.bytes_held.values())

    def add(self, waiting: Waiting) -> None:
        """One more text.

        Raises:
            DeepenError: see `OpenRun.add`; what is asked for of its prompt cannot be given.
        """
        if waiting.request.prompt_top and not waiting.prompted:
            prompted = read_prompt(waiting.ensemble.team, waiting.prompt, waiting.request.prompt_top)
            waiting.listener(prompted)
            waiting.prompted = True  # a text that finds no room comes again
        self._requests[self._run.add(waiting.prompt, waiting.settings)] = waiting

    def step(self, *, beside: bool = False) -> tuple[int, list[float]]:
        """One step of all texts; how many tokens it gave, and the seconds that each text took that ended.

        Args:
            beside: other runs wait for it.
        """
        self.used = monotonic()
        self._observer.begin()
        try:
            return self._step(beside)
        except Exception as error:
            self._break(error)
            return 0, []

    def _step(self, beside: bool) -> tuple[int, list[float]]:
        for number, waiting in self._requests.items():
            if waiting.cancelled:
                self._run.cancel(number)
        written = self._run.step(beside=beside)
        if self._run.lost and not self.lost:
            now = monotonic()
            self._stale_at = now + max(_WITHOUT_SECONDS, _WITHOUT_TIMES * (now - self.used))
            LOG.warning("texts go on without %s, which was lost", ", ".join(self._run.lost))
        for one in written:
            scored_, record = self._observer.of(one.number)
            self._requests[one.number].listener(Piece(one.token, one.text, scored_, record))
        seconds = []
        for number, text in self._run.ended().items():
            waiting = self._requests.pop(number)
            if (failure := self._run.failures.pop(number, None)) is not None:
                waiting.fail(failure)
                continue
            seconds.append(monotonic() - waiting.began)
            waiting.listener(_ended(text))
        return len(written), seconds

    def cancel_all(self) -> None:
        """End all texts."""
        for waiting in self._requests.values():
            waiting.cancelled = True
        if self._requests and not self.broken:
            self.step()

    def close(self) -> None:
        """Free all caches."""
        if not self.broken:
            self._run.close()

    def _break(self, error: Exception) -> None:
        """The run cannot go on: every text has the error, with what it had written itself."""
        self.broken = True
        for number, waiting in self._requests.items():
            waiting.fail(self._own(error, number))
        self._requests.clear()
        try:
            self._run.close()
        except Exception:  # the engine has to go on for the other runs
            LOG.exception("a run that failed could not be closed well; its memory may not be free")

    def _own(self, error: Exception, number: int) -> DeepenError:
        if isinstance(error, MemberLost):
            return MemberLost(error.member, error.why, [self._run.result(number)])
        if isinstance(error, DeepenError) and not isinstance(error, InputError):
            return error
        # What is wrong with a request is found before it is written, or ends its text alone.
        return ModelError(f"the text cannot go on: {type(error).__name__}: {error}")


class _Observer:
    """Keeps of a step's tokens what their requests asked for."""

    def __init__(self, requests: Mapping[int, Waiting]) -> None:
        self._requests = requests
        self._found: dict[int, list[tuple[Scored | None, Mapping[str, Any] | None]]] = {}
        self._records: list[dict[str, Any]] = []
        self._trace = Trace(self._records.append)

    def begin(self) -> None:
        """A step begins: nothing is kept of the last one."""
        self._found.clear()

    def of(self, number: int) -> tuple[Scored | None, Mapping[str, Any] | None]:
        """Of the text's next token in this step."""
        return self._found[number].pop(0)

    def step(
        self,
        team: Team,
        fused: FusedStep,
        accepted: Sequence[Accepted],
        ms: Mapping[str, Any],
        lost: Sequence[str] = (),
    ) -> None:
        """See `Observer`."""
        tops = [self._requests[one.written.number].request.top for one in accepted]
        found = scored(fused.logits, [one.row for one in accepted], [one.token for one in accepted], tops)
        explained = [one for one in accepted if self._requests[one.written.number].request.explain]
        self._records.clear()
        if explained:
            self._trace.step(team, fused, explained, ms, lost)
        records = dict(zip(map(id, explained), self._records, strict=True))
        for one, score in zip(accepted, found, strict=True):
            self._found.setdefault(one.written.number, []).append((score, records.get(id(one))))

    def close(self) -> None:
        """See `Observer`."""


def _ended(text: TextInProgress) -> Ended:
    return Ended(
        finish_reason=text.finish_reason or "cancelled",
        text=text.rest,
        prompt_tokens=text.prompt_length,
        completion_tokens=text.written,
        changed_tokens=text.changed,
        lost={name: tokens for name, tokens in text.lost.items() if tokens < text.written},
    )
