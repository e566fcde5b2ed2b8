"""`deepen-ext trace`: a trace as a page that shows who decided each token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import exit_codes, progress
from deepen_ext.errors import InputError
from deepen_ext.ground.cache_folder import atomic_write
from deepen_ext.ground.paths import user_path
from deepen_ext.serving.page import trace_html
from deepen_ext.serving.page.trace_file import read_trace


def trace(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="What `generate --trace FILE` has written: a JSON line a token."),
    ],
    html: Annotated[Path, typer.Option("--html", help="Write the page here: one file, which loads nothing.")],
    debug: options.Debug = False,
) -> None:
    """Show a trace as a page: every token coloured by who decided it, with what each member said."""
    with exit_codes(debug):
        target = user_path(html)
        if target.resolve() == user_path(file).resolve():
            raise InputError(f"{html} is the trace itself; choose another name for the page")
        if target.is_dir():
            raise InputError(f"{html} is a folder; name a file, such as {html / 'trace.html'}")
        page = trace_html(read_trace(file), title=Path(file).name)
        try:
            with atomic_write(target, private=True) as temporary:
                temporary.write_text(page, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{html}: cannot be written: {error.strerror}; choose another place") from error
        with progress() as say:
            say(f"Note: {html}: {len(page.encode()):,} bytes")
