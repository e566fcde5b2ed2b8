"""Replicas: actors that hold the same things each, and share calls out among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepen_ext.cluster.actors import Actor, Lost, answered, await_place, end, get, start_actor
from deepen_ext.cluster.placement import Placement
from deepen_ext.errors import ModelError
from deepen_ext.ground.closing import Closing
from deepen_ext.ground.collector import without_collector
from deepen_ext.ground.numbers import whole_number
from deepen_ext.ground.progress import Progress

# Calls of a replica that may be started before the first unfinished call is done. Replies come in the order
# of the calls, so these are the most that a driver's end can lose.
_AHEAD = 4


class ReplicasLost(ModelError):
    """All replicas are gone.

    Attributes:
        done: what they did, where who raises it has something to say about that.
    """

    done: Sequence[Any] = ()


class ReplicaActor(Actor):
    """Holds what a function makes, and calls functions of it."""

    def __init__(self) -> None:
        """Nothing is made yet, so that finding a place and loading can be told apart."""
        self._held: Any = None

    @answered
    def make(self, make: Callable[[], Any]) -> None:
        """Make what is held."""
        with without_collector():
            self._held = make()

    @answered
    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What a function gives of it."""
        return function(self._held, *args)


@dataclass
class _Replica:
    number: int
    actor: Any
    version: Any  # on its way


@dataclass
class _Call:
    number: int
    args: tuple[Any, ...]


class Pool(Closing):
    """Some replicas. One that is lost is not replaced: its calls go to the others."""

    def __init__(
        self,
        make: Callable[[], Any],
        replicas: int,
        placement: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Start all replicas, and let each make what it holds.

        Args:
            make: makes it; Ray pickles the function, and modules that it names must be there.
            replicas: how many.
            placement: of each; None for one CPU anywhere.
            progress: told of the start, and of every replica that is lost.

        Raises:
            InputError: a number or placement out of range, or a cluster without room for all of them.
            ModelError: Ray is not installed; a replica is lost while it starts; what `make` raises.
        """
        self._count = whole_number("replicas", replicas, 1)
        self._say = progress or (lambda _: None)
        where = Placement.read({} if placement is None else placement)
        self._replicas: list[_Replica] = []
        self._last_loss = "the pool was closed"
        try:
            for number in range(1, replicas + 1):
                started = start_actor(ReplicaActor, where, f"replica {number} of {replicas}", progress)
                self._replicas.append(_Replica(number, *started))
            for one in self._replicas:
                await_place(one.actor, one.version, where, f"replica {one.number} of {replicas}")
            self._say(f"Loading {replicas} replicas ({where} each)")
            made = [one.actor.make.remote(make) for one in self._replicas]
            for one, reference in zip(self._replicas, made, strict=True):
                try:
                    get(reference, None)
                except Lost as error:
                    raise ModelError(f"replica {one.number} of {replicas}: {error}, as it loaded") from error
        except BaseException:
            self.close()
            raise

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives in any one replica; arguments and errors are those of `share_out`."""
        ((_, found),) = self.share_out(function, [args])
        return found

    def share_out(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """What the function gives for each call, in the order of the calls; each replica has one at a time.

        Args:
            function: called in a replica with what the replica holds, and with a call's arguments.
            calls: arguments, looked at as replicas become free.

        Yields:
            a call's number, from 0, and what it gave. Only when all replicas are lost, numbers are left out,
            because what was done is given before the error is raised.

        Raises:
            InputError, ModelError: what the function raises.
            ReplicasLost: all replicas were lost.
        """
        rest, taken = iter(calls), 0
        again: deque[_Call] = deque()  # of replicas that were lost
        done: dict[int, Any] = {}
        following = 0  # the number of the reply that is given next
        idle = deque(self._replicas)
        running: dict[Any, tuple[_Replica, _Call]] = {}
        while True:
            while idle:
                if again:
                    call = again.popleft()
                elif taken < following + _AHEAD * self._count and (args := next(rest, None)) is not None:
                    call = _Call(taken, args)
                    taken += 1
                else:
                    break
                replica = idle.popleft()
                running[replica.actor.call.remote(function, call.args)] = replica, call
            if not running:
                break
            for reference in _ready(list(running)):
                replica, call = running.pop(reference)
                try:
                    done[call.number] = get(reference, None)
                    idle.append(replica)
                except Lost as error:
                    again.append(call)
                    self._drop(replica, str(error))
            while following in done:
                yield following, done.pop(following)
                following += 1
        if not self._replicas:
            yield from sorted(done.items())
            raise ReplicasLost(
                f"all {self._count} replicas were lost, the last because {self._last_loss}; what was done is "
                "kept. Start them again, fewer at a time or with more memory if that was short"
            )

    def _drop(self, replica: _Replica, why: str) -> None:
        self._replicas.remove(replica)
        self._last_loss = why
        end(replica.actor)  # it may be out of reach and still hold its place
        self._say(f"Replica {replica.number} of {self._count} was lost: {why}. Left: {len(self._replicas)}")

    def close(self) -> None:
        """End all replicas."""
        while self._replicas:
            end(self._replicas.pop().actor)


def _ready(references: list[Any]) -> list[Any]:
    """Calls that have ended, at least one; waited for."""
    import ray

    ready: list[Any] = ray.wait(references, num_returns=1)[0]
    return ready
