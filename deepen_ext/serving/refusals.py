"""Why a request is not taken."""

from __future__ import annotations

from deepen_ext.errors import InputError


class Busy(InputError):
    """No room for one more request now.

    Attributes:
        why: what is full.
        retry_after: seconds after which to try again, by what texts have taken lately.
    """

    def __init__(self, why: str, retry_after: int) -> None:
        super().__init__(why, retry_after)  # both of them: so that it can be pickled
        self.why = why
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.why}; try again in {self.retry_after} s"


class Closed(InputError):
    """The engine takes no requests any more."""


class UnknownModel(InputError):
    """No model of this name is served."""
