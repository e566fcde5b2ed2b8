"""What the commands write where: progress, output, errors and exit codes.

Exit codes: 0 done, 1 a model or the run failed, 2 wrong input, 130 interrupted, 141 closed pipe.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import typer

from deepen_ext.errors import DeepenError, DeepenWarning, InputError

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A moving bar on a terminal's standard error; elsewhere a line now and then."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = plain(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()
        last = monotonic()

        def line(message: str) -> None:
            nonlocal last
            note = message.startswith("Note:")
            stage = message if note else message.split(",")[0]  # without the counts
            long = note or stage.startswith(("Downloading", "Converting", "Waiting"))
            if long and stage not in seen:
                seen.add(stage)
                print(_visible(stage), file=sys.stderr, flush=True)
            elif not long and monotonic() - last >= LINE_SECONDS:
                print(_visible(message), file=sys.stderr, flush=True)
            else:
                return
            last = monotonic()

        yield line
        return
    description = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), description, BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(message: str) -> None:
            message = _visible(message)
            if message.startswith("Note:"):  # it stays when the bar has gone
                console.print(message, style="dim", soft_wrap=True)
            else:
                bars.update(task, description=message)

        yield show


def tables(width: int = 140) -> Console:
    """Standard output for tables; `width` is that of a file or a pipe, which has none of its own."""
    return plain(width=None if sys.stdout.isatty() else width)


def plain(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that writes names and texts as they are: to rich, [x] is markup and :x: may be a picture."""
    from rich.console import Console

    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def read_stdin(missing: str) -> str:
    """The text that is piped to standard input.

    Raises:
        InputError: nothing is piped, which `missing` says with what to do; it is not UTF-8 text.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(missing)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: {error}") from error


def check_output() -> None:
    """Raise InputError where the caller has closed standard output (`>&-`)."""
    if sys.stdout is None or sys.stdout.closed:
        raise InputError("standard output is closed; send it to a file, or to /dev/null")


def write(text: str) -> None:
    """To standard output, at once.

    Raises:
        InputError: standard output is closed.
    """
    check_output()
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turn what goes wrong into one message on standard error and an exit code."""

    def fail(message: str | None, code: int, error: BaseException) -> typer.Exit:
        if debug:
            traceback.print_exception(error)
        if message is not None and sys.stderr is not None:
            print(_visible(message), file=sys.stderr)
        return typer.Exit(code)

    if not debug:
        warnings.showwarning = _own_warnings
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character must not end the text
        sys.stdout.reconfigure(errors="replace")
    try:
        check_output()
        yield
    except KeyboardInterrupt as error:
        raise fail("\ninterrupted", 130, error) from None
    except BrokenPipeError as error:
        # The reader has gone, as in `| head`. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise fail(None, 141, error) from None
    except DeepenError as error:
        raise fail(f"error: {error}", 2 if isinstance(error, InputError) else 1, error) from None
    except typer.Exit:
        raise
    except Exception as error:
        message = f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = "error: no space is left where the output goes; make room, or send it elsewhere"
        raise fail(message, 1, error) from None


def _own_warnings(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our warnings as one line; those of the libraries beneath are for developers (--debug)."""
    if issubclass(category, DeepenWarning):
        print(_visible(f"warning: {message}"), file=sys.stderr)


def _visible(message: str) -> str:
    """A message with its control characters written out: a file's or a server's words may be in it."""
    return _CONTROLS.sub(lambda one: f"\\x{ord(one[0]):02x}", message)
