"""Warnings at the caller's own line, however deep in the package they come up."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from deepen_ext.errors import DeepenWarning

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def warn(text: str) -> None:
    """A `DeepenWarning` that names the line that called this package.

    Python's `stacklevel` counts frames, of which there are ten here in one call and thirty in the next. In a
    thread of ours the line is the one in `threading` that began it.
    """
    ours = frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename.startswith(_PACKAGE):
            ours = frame
    at = ours.f_back or ours
    registry = at.f_globals.setdefault("__warningregistry__", {})
    name = at.f_globals.get("__name__")
    warnings.warn_explicit(text, DeepenWarning, at.f_code.co_filename, at.f_lineno, name, registry)
