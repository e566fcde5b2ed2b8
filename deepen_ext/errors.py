"""The errors deepen-ext raises on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class DeepenError(Exception):
    """Base class of every error deepen-ext raises on purpose."""


class DeepenWarning(UserWarning):
    """Every warning deepen-ext gives. It names the line that called the package."""


class InputError(DeepenError, ValueError):
    """The caller's input is wrong; the message says what to do. Exit code 2 on the command line."""


class ModelError(DeepenError, RuntimeError):
    """A model, tokenizer or file cannot be used. Exit code 1 on the command line."""


class MemberLost(ModelError):
    """A member that runs elsewhere gives no usable answer any more: its server or actor is gone or broken.

    Attributes:
        member: its name.
        why: what went wrong.
        generations: where an ensemble was writing, what it had written: a `Generation` for each text. The
            texts that this error cut off have the finish reason "member_lost".
    """

    def __init__(self, member: str, why: str, generations: Sequence[Any] = ()) -> None:
        super().__init__(member, why, generations)  # all of them: so that it can be pickled
        self.member = member
        self.why = why
        self.generations = list(generations)

    def __str__(self) -> str:
        return f"{self.member}: {self.why}"


class OutOfMemory(ModelError):
    """A member's forward pass ran out of memory.

    Attributes:
        member: its name.
        what: the error's own words.
    """

    def __init__(self, member: str, what: str) -> None:
        super().__init__(member, what)  # both of them: so that it can be pickled
        self.member = member
        self.what = what

    def __str__(self) -> str:
        return (
            f"{self.member}: its forward pass ran out of memory ({self.what}); take fewer texts at once "
            "(batch_size), shorter texts or a smaller model"
        )


@contextmanager
def failures_of(name: str) -> Iterator[None]:
    """What goes wrong in a forward pass of this member is a ModelError with its name.

    Raises:
        ModelError: see above; our own errors pass.
    """
    try:
        yield
    except DeepenError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
        if not _is_out_of_memory(error):
            raise ModelError(f"{name}: its forward pass failed: {what}") from error
        raise OutOfMemory(name, what) from error


def _is_out_of_memory(error: Exception) -> bool:
    """By the name, for torch's own class: torch takes seconds to import. On the CPU it has no class."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def shown(value: Any, most: int = 200) -> str:
    """A value of a file for a message, cut to `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= most else f"{text[: most - 3]}..."
