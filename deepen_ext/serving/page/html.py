"""One HTML page with its style and its script inside of it, which asks no other host for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from deepen_ext.errors import InputError
from deepen_ext.serving.page.trace_file import check_record

# In the order in which they are read: a later one uses what an earlier one has.
_SCRIPTS = ("kinds", "elements", "inspector", "answer", "stream", "live", "trace")


def page_html() -> str:
    """The page of a server: a prompt box, and texts as they come, with the record of every token.

    It asks for ``v1/models``, ``v1/completions`` and ``v1/chat/completions`` relative to its own address.
    """
    from deepen_ext.fusers.make import FUSERS  # it loads torch, which the page of a trace does without

    fusers = ["auto", *(name for name, one in FUSERS.items() if one.fewest_members > 1)]
    form = _static("form.html").replace("{{fusers}}", "".join(f"<option>{name}" for name in fusers))
    parts = {"form": form, "kind": "live empty"}
    return _page(title="deepen-ext", subtitle="several models write one text", connect="'self'", **parts)


def trace_html(records: Iterable[Mapping[str, Any]], *, title: str = "trace") -> str:
    """The same page, filled from a trace. It needs no server, and loads nothing.

    Args:
        records: as `decoding.trace.Trace` makes them. The texts (``row``) are shown one below the other.
        title: shown above them, such as the file's name.

    Raises:
        InputError: what is no such record; the message says which and why.
    """
    data = ",".join(_json(record, f"record {number}") for number, record in enumerate(records, start=1))
    # Inside of a script element, "</script" and "<!--" would mean something to HTML.
    data = data.replace("<", "\\u003c")
    element = f'<script type="application/json" id="trace">[{data}]</script>'
    return _page(title=f"{title} · deepen-ext", subtitle=title, connect="'none'", kind="traced", data=element)


def _json(record: Mapping[str, Any], where: str) -> str:
    """All in ASCII: half of a surrogate pair cannot be written as UTF-8."""
    checked = check_record(record, where)
    try:
        return json.dumps(checked, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:  # of what the page does not look at
        raise InputError(f"{where} has what JSON cannot: {error}; leave it out") from error


def _page(*, title: str, subtitle: str, connect: str, kind: str, form: str = "", data: str = "") -> str:
    style, script = _style(), _script()
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src {connect}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": _escaped(title),
        "subtitle": _escaped(subtitle),
        "style": style,
        "script": script,
        "kind": kind,
        "form": form,
        "data": data,
    }
    # In one pass: what is put in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _static("page.html"))


@cache
def _static(name: str) -> str:
    return (files("deepen_ext.serving.page") / "static" / name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    return _static("style.css")


@cache
def _script() -> str:
    return '"use strict";\n' + "\n".join(_static(f"{name}.js") for name in _SCRIPTS)


def _hash(text: str) -> str:
    """What a content security policy knows an inline element by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escaped(text: str) -> str:
    """For HTML; file names may hold what is no Unicode."""
    return html.escape(text.encode(errors="replace").decode())
