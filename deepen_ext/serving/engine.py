"""The engine: requests come at any time, texts join and leave between the steps of one loop.

INTERFACE ONLY, being built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.serving.requests import Listener, Request


class Busy(InputError):
    """No room for one more request now.

    Attributes:
        retry_after: seconds after which to try again, by what texts have taken lately.
    """

    retry_after: int


class UnknownModel(InputError):
    """No model of this name is served."""


@dataclass(frozen=True)
class Load:
    """What the engine is doing."""

    running: int  # texts being written
    reading: int  # texts whose prompt is being read
    waiting: int  # requests in the queue
    tokens: int  # written since the start
    prompt_tokens: int  # read since the start
    bytes_held: int  # of caches, over all devices


class Ticket:
    """A request that was taken."""

    prompt_tokens: int

    def cancel(self) -> None:
        """The text is not wanted any more: it leaves after the present step. Its `Ended` says "cancelled"."""


class Engine:
    """One thread writes all texts; any thread may submit."""

    def __init__(
        self,
        models: Mapping[str, Ensemble],
        *,
        lanes: int = 32,
        queue: int = 256,
        prompt_chunk: int = 256,
    ) -> None:
        """models: by served name; a member alone is `Ensemble([member], fuser="single")`."""

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Check the request and queue it.

        Raises:
            UnknownModel: see there.
            Busy: the queue is full, or the memory is taken by other texts now.
            InputError: a setting, a prompt longer than a context, or one that no memory here could hold.
        """
        raise NotImplementedError

    @property
    def load(self) -> Load:
        """Now."""
        raise NotImplementedError

    def close(self, seconds: float = 0.0) -> None:
        """No new requests (they get Busy); running ones may go on so long, then they end as "cancelled"."""
