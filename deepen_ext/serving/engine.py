"""The engine: requests come at any time, texts join and leave between the steps of one loop.

    submit(request, listener)      any thread: the request is checked and queued
    the engine's thread            lets texts join, steps every run, tells the listeners

Texts of one ensemble with one way of drafting are written together, in a run; another fuser, or other
weights, make another run. The runs take turns.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

from deepen_ext.decoding.drafts.draft_settings import DraftSettings
from deepen_ext.decoding.limits import NoRoom, check_choice, check_lengths, check_main_model
from deepen_ext.decoding.settings import Settings
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import DeepenError, InputError, ModelError
from deepen_ext.ground.closing import Closing
from deepen_ext.ground.numbers import whole_number
from deepen_ext.serving.heap import return_free_memory
from deepen_ext.serving.refusals import Busy, Closed, UnknownModel
from deepen_ext.serving.requests import Listener, Request
from deepen_ext.serving.running import LOG, Running, Waiting, prompt_of

_VARIANTS = 16  # ensembles with settings of single requests that are kept ready
_MOST_RUNS = 16  # at once: each has caches of its own
_IDLE_SECONDS = 30.0  # a run without texts keeps its caches so long
_TURN_SECONDS = 0.5  # how often a waiting thread looks around
_REMEMBERED = 32  # texts whose times say how long a request will wait


@dataclass(frozen=True)
class Load:
    """What the engine is doing.

    Attributes:
        running: texts being written.
        reading: texts whose prompt is being read.
        waiting: requests in the queue.
        tokens: written since the start.
        prompt_tokens: of the prompts that texts began with since the start.
        bytes_held: of caches, over all devices.
    """

    running: int
    reading: int
    waiting: int
    tokens: int
    prompt_tokens: int
    bytes_held: int


class Ticket:
    """A request that was taken.

    Attributes:
        prompt_tokens: of the main model.
    """

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.prompt_tokens = len(waiting.prompt.main_ids)

    def cancel(self) -> None:
        """The text is not wanted any more: it leaves after the present step. Its `Ended` says "cancelled"."""
        self._waiting.cancelled = True


class Engine(Closing):
    """One thread writes all texts; any thread may submit. A context manager.

    Attributes:
        models: by served name.
        most_waiting: most requests that wait.
    """

    def __init__(
        self,
        models: Mapping[str, Ensemble],
        *,
        lanes: int = 32,
        queue: int = 256,
        prompt_chunk: int = 64,
    ) -> None:
        """Start the thread.

        Args:
            models: by served name; a member alone is ``Ensemble([member], fuser="single")``.
            lanes: most texts at once, of each run.
            queue: most requests that wait.
            prompt_chunk: most tokens of new prompts that are read in a step beside texts being written.

        Raises:
            InputError: no models, or a number out of range.
        """
        if not models:
            raise InputError("there is nothing to serve; name at least one ensemble")
        self.models = dict(models)
        self._lanes = whole_number("lanes", lanes, 1)
        self.most_waiting = whole_number("queue", queue, 1)
        self._chunk = whole_number("prompt_chunk", prompt_chunk, 1)
        self._variants: OrderedDict[object, Ensemble] = OrderedDict()
        self._waiting: deque[Waiting] = deque()
        self._runs: dict[object, Running] = {}
        self._changed = threading.Condition()
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)  # what texts took lately
        self._closing = self._stop_now = False
        self._tokens = self._prompt_tokens = 0
        self._load = (0, 0, 0)  # running, reading, bytes held: as the thread last saw it
        self._thread = threading.Thread(target=self._work, name="deepen-ext engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Check the request and queue it.

        Args:
            request: what is asked for.
            listener: is told what becomes of it, in the engine's thread.

        Raises:
            UnknownModel: see there.
            Busy: the queue is full.
            Closed: see there.
            InputError: a setting, or a prompt that is longer than a context, or than the memory here holds.
        """
        ensemble = self._ensemble(request)
        team = ensemble.team
        settings = Settings.read(team.main, **request.decoding)
        check_main_model(team, settings)
        check_choice(team, settings)
        drafts = DraftSettings.read(team, request.draft, "auto")
        prompt = prompt_of(request, ensemble)
        waiting = Waiting(request, ensemble, settings, drafts, prompt, listener)
        try:
            check_lengths(team, {0: waiting.text()}, {0: waiting.assistant_lengths()}, 1, None)
        except NoRoom:
            if not self._runs:  # else what they hold may be enough: it waits for that
                raise
        with self._changed:
            if self._closing:
                raise Closed("this server is about to end and takes no new requests")
            if len(self._waiting) >= self.most_waiting:
                raise Busy(f"{len(self._waiting)} texts wait already", self._retry_after())
            self._waiting.append(waiting)
            self._changed.notify()
        return Ticket(waiting)

    @property
    def load(self) -> Load:
        """Now."""
        running, reading, held = self._load
        return Load(running, reading, len(self._waiting), self._tokens, self._prompt_tokens, held)

    @property
    def closed(self) -> bool:
        """Whether no new requests are taken: it is closing, or its thread has ended by a fault of ours."""
        return self._closing

    def close(self, seconds: float = 0.0) -> None:
        """No new requests. Texts may go on so many seconds; then they end as "cancelled"."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(max(seconds, 0.0))
        self._stop_now = True
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _ensemble(self, request: Request) -> Ensemble:
        """The model with the request's own settings of fusion."""
        try:
            ensemble = self.models[request.model]
        except KeyError:
            raise UnknownModel(
                f"no model {request.model!r} is served here; choose one of {', '.join(self.models)}"
            ) from None
        if not request.fusion:
            return ensemble
        key = request.model, repr(sorted(request.fusion.items()))
        with self._changed:
            if key in self._variants:
                self._variants.move_to_end(key)
                return self._variants[key]
        variant = ensemble.variant(**request.fusion)
        with self._changed:
            self._variants[key] = variant
            if len(self._variants) > _VARIANTS:
                self._variants.popitem(last=False)
        return variant

    def _retry_after(self) -> int:
        """Seconds until a place in the queue is free, about."""
        usual = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return max(1, round(usual / self._lanes))

    def _work(self) -> None:
        """The engine's thread."""
        try:
            while not self._stop_now:
                self._join()
                busy = [run for run in list(self._runs.values()) if run.busy]
                for run in busy:
                    self._count(run.step(beside=len(busy) > 1))
                self._close_idle(
                    lambda run: run.stale if run.lost else monotonic() - run.used > _IDLE_SECONDS
                )
                self._note()
                if busy:
                    continue
                with self._changed:
                    if self._closing and not self._waiting:
                        return
                    if not self._waiting:
                        self._changed.wait(_TURN_SECONDS)
        finally:
            with self._changed:
                self._closing = True  # also where it ends by a fault of ours: nobody waits for a dead thread
                left, self._waiting = list(self._waiting), deque()
            for waiting in left:
                waiting.end_unbegun()
            for run in self._runs.values():
                run.cancel_all()
            for run in self._runs.values():
                run.close()
            self._load = (0, 0, 0)

    def _join(self) -> None:
        """Let waiting texts join their runs, in order; one that finds no room lets none of its run pass."""
        full: set[object] = set()
        for waiting in list(self._waiting):
            if waiting.cancelled:
                self._take(waiting)
                waiting.end_unbegun()
            elif waiting.key not in full and not self._joined(waiting):
                full.add(waiting.key)

    def _joined(self, waiting: Waiting) -> bool:
        """Whether the text found room; told as failed, it needs none."""
        run = self._runs.get(waiting.key)
        if run is not None and run.stale:
            self._runs[object()] = self._runs.pop(waiting.key)  # its texts are written to their ends
            run = None
        if run is not None and not run.free:
            return False
        if run is None and len(self._runs) >= _MOST_RUNS and not self._close_oldest():
            return False
        try:
            if run is None:
                run = Running(waiting, self._lanes, self._chunk)
                self._runs[waiting.key] = run
            run.add(waiting)
        except Exception as error:
            if isinstance(error, NoRoom):
                if self._close_idle(lambda other: other.bytes_held > 0):  # its own run too: it keeps texts
                    return self._joined(waiting)
                if any(other.busy for other in self._runs.values()):
                    return False  # the memory is others' now
            self._take(waiting)
            waiting.fail(_named(error))
            return True
        self._prompt_tokens += len(waiting.prompt.main_ids)
        self._take(waiting)
        return True

    def _take(self, waiting: Waiting) -> None:
        with self._changed:
            self._waiting.remove(waiting)

    def _count(self, done: tuple[int, list[float]]) -> None:
        tokens, seconds = done
        self._tokens += tokens
        self._seconds.extend(seconds)

    def _note(self) -> None:
        runs = [run for run in self._runs.values() if not run.broken]
        self._runs = {key: run for key, run in self._runs.items() if not run.broken}
        self._load = (
            sum(run.writing for run in runs),
            sum(run.reading for run in runs),
            sum(run.bytes_held for run in runs),
        )

    def _close_oldest(self) -> bool:
        """Free the caches of the run that has had no text for longest; returns whether there was one."""
        idle = [run for run in self._runs.values() if not run.busy]
        oldest = min(idle, key=lambda run: run.used, default=None)
        return oldest is not None and self._close_idle(lambda run: run is oldest)

    def _close_idle(self, chosen: Callable[[Running], bool]) -> bool:
        """Free the caches of the runs without texts that are chosen; returns whether there were any."""
        idle = [key for key, run in self._runs.items() if not run.busy and chosen(run)]
        for key in idle:
            run = self._runs.pop(key)
            try:
                run.close()
            except Exception:  # the engine has to go on for the other runs
                LOG.exception("a run could not be closed well; its memory may not be free")
        if idle:
            return_free_memory()
        return bool(idle)


def _named(error: Exception) -> DeepenError:
    """The error as a listener gets it."""
    if isinstance(error, NoRoom):
        advice = (
            "send a shorter prompt or ask for fewer new tokens; with fewer lanes the server has more room"
        )
        return NoRoom(error.why, advice)
    if isinstance(error, DeepenError):
        return error
    return ModelError(f"the text could not be begun: {type(error).__name__}: {error}")
