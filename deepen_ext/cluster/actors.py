"""Actors: started where a placement says, asked with a time limit, and their errors brought home.

An actor's method that is `answered` gives what it computes, or an error of ours as texts. So nothing of this
package has to be unpickled, and the error raised here has the class and the message it has in process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from deepen_ext.cluster.connect import connect, free_now, schedule
from deepen_ext.cluster.placement import Placement
from deepen_ext.errors import DeepenError, InputError, ModelError, OutOfMemory
from deepen_ext.ground.progress import Progress

PLACING_SECONDS = 120.0  # from the request to an actor's first answer: a process starts and imports torch
_ERRORS = {kind.__name__: kind for kind in (InputError, OutOfMemory, ModelError)}
_ERROR = "deepen_ext error"

Method = TypeVar("Method", bound=Callable[..., Any])


def answered(method: Method) -> Method:
    """A method of an actor whose errors of ours are given back as texts (see `opened`)."""

    @functools.wraps(method)
    def run(*args: Any, **more: Any) -> Any:
        try:
            return method(*args, **more)
        except OutOfMemory as error:
            return _ERROR, OutOfMemory.__name__, error.member, error.what
        except DeepenError as error:
            kind = InputError if isinstance(error, InputError) else ModelError
            return _ERROR, kind.__name__, str(error)

    return run  # type: ignore[return-value]


def opened(reply: Any) -> Any:
    """What an `answered` method gave.

    Raises:
        InputError, ModelError: the method raised it.
    """
    if isinstance(reply, tuple) and reply[:1] == (_ERROR,):
        raise _ERRORS[reply[1]](*reply[2:])
    return reply


class Actor:
    """What every kind of actor of this package has. Subclasses are made by `start_actor`."""

    def version(self) -> str:
        """Of deepen-ext on the actor's machine."""
        from deepen_ext import __version__

        return __version__


class Lost(Exception):
    """An actor gives no answer any more; the text says why, and is for the end of a message."""


class TimeUp(Lost):
    """It gave none in time; it may be at work still."""


def start_actor(
    kind: type[Actor], placement: Placement, what: str, progress: Progress | None = None
) -> tuple[Any, Any]:
    """A new actor, and its version on the way: `await_place` waits for it. Calls made after this come later.

    Args:
        kind: its class, without arguments.
        placement: where it goes. Ray is started or joined for it.
        what: the actor, for messages.
        progress: see `connect`.

    Raises:
        InputError: the cluster can never hold it (see `schedule`).
        ModelError: Ray is not installed.
    """
    ray = connect(placement.address, progress)
    actor = ray.remote(kind).options(**schedule(ray, placement, what)).remote()
    return actor, actor.version.remote()


def await_place(actor: Any, version: Any, placement: Placement, what: str) -> None:
    """Wait until the actor runs, and check that it runs this version of the package.

    Raises:
        InputError: there was no room for it in time; the message says what is left.
        ModelError: it could not be started, or has another version.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    from deepen_ext import __version__

    try:
        there = ray.get(version, timeout=PLACING_SECONDS)
    except GetTimeoutError as error:
        end(actor)
        raise InputError(
            f"{what}: its actor has not started within {PLACING_SECONDS:.0f} seconds: it asks for "
            f"{placement}, and the cluster has {free_now(ray)} left. Ask for less, or end what holds the rest"
        ) from error
    except ray.exceptions.RayError as error:
        raise ModelError(f"{what}: its actor cannot be started: {reason(error)}") from error
    if there != __version__:
        end(actor)
        raise ModelError(
            f"{what}: its machine has deepen-ext {there}, and this one {__version__}; install the same there"
        )


def get(reference: Any, seconds: float | None) -> Any:
    """What a call of an `answered` method gives, waited for.

    Raises:
        Lost: the actor is gone, or its method broke.
        TimeUp: there was no answer in time.
        InputError, ModelError: the method raised it.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return opened(ray.get(reference, timeout=seconds))
    except GetTimeoutError as error:
        raise TimeUp(f"its actor gave no answer within {seconds:g} seconds") from error
    except RayError as error:
        raise Lost(reason(error)) from error


def end(actor: Any) -> None:
    """End the actor at once, if it is still there. Without Ray there is none."""
    import ray

    if ray.is_initialized():
        ray.kill(actor)


def reason(error: Exception) -> str:
    """Why an actor is gone, in one line."""
    import ray.exceptions as known

    if isinstance(error, known.RayTaskError):
        cause = error.cause
        first = (str(cause).strip().splitlines() or [""])[0]
        return f"its actor failed: {type(cause).__name__}: {first}"
    if isinstance(error, known.OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended its actor"
    if isinstance(error, known.NodeDiedError):
        return "its machine is gone, and its actor with it"
    if isinstance(error, known.ActorUnavailableError):
        return "its actor cannot be reached"
    if isinstance(error, known.RayActorError):
        return "its actor has died (its process was ended, or its machine is gone)"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"Ray gives no answer of its actor: {type(error).__name__}: {first}"
