"""Tables that a script writes into a page, between its begin and end markers."""

from __future__ import annotations

import sys
from pathlib import Path


def write_marked(page: Path, name: str, table: str, *, check: bool) -> None:
    """Puts `table` between the page's `name:begin` and `name:end` comments.

    With `check` the page stays as it is, and the process exits with 1 where that is out of date.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        sys.exit(f"{page} needs one {begin} line and one {end} line after it")
    head, rest = text.split(begin)
    wanted = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    if wanted == text:
        return
    if check:
        sys.exit(f"{page} is out of date; run python {sys.argv[0]}")
    page.write_text(wanted, encoding="utf-8")
