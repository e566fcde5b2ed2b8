"""Traces as the page takes them: read from a file line by line, each record checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepen_ext.errors import InputError, shown
from deepen_ext.ground.paths import user_path
from deepen_ext.ground.warning import warn

_SHOWN = 43  # characters of a value in an error
_FATES = (None, "stood", "replaced", "settled")


def read_trace(file: str | Path) -> list[dict[str, Any]]:
    """The records of a trace file, one JSON line a token.

    A killed run may leave half of a last line. It is left out, with a warning.

    Raises:
        InputError: the file cannot be read, is empty, or a line is no record of a token; the message has the
            line's number.
    """
    path = user_path(file)
    records = []
    try:
        with path.open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                if not line.endswith(b"\n") and not _is_whole(line):
                    cut = f"{file}: line {number}, the last, is cut off (the run was killed?); it is left out"
                    warn(cut)
                elif line.strip():
                    records.append(_record(line, f"{file}: line {number}"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name a file that --trace has written") from error
    if not records:
        raise InputError(f"{file} has no record; name a file that --trace has written")
    return records


def check_record(record: Any, where: str) -> dict[str, Any]:
    """The record, where the page can show it.

    Args:
        record: what may be one of `decoding.trace.Trace`.
        where: named in the error.

    Raises:
        InputError: something is missing in it, or is of another kind.
    """
    one = _Part(record, where)
    one.count("row")
    one.count("position")
    for name in ("token", "main_choice"):
        one.part(name).token()
    for name in ("not_asked", "text"):
        if one.has(name):
            one.text(name)
    if one.has("draft") and record["draft"] not in _FATES:
        raise InputError(f"{where}: its draft is {shown(record['draft'], _SHOWN)}; {_ONE_OF_OURS}")
    if "not_asked" not in record:
        raise InputError(f"{where}: it has no not_asked; {_ONE_OF_OURS}")
    members = one.parts("members")
    if not members:
        raise InputError(f"{where}: it has no members; {_ONE_OF_OURS}")
    for member in members:
        member.text("name")
        member.number("weight")
        member.candidates("top")
    one.candidates("fused")
    ms = one.part("ms")
    ms.part("members").numbers()
    for name in ("fusion", "sampling", "handoff"):
        if name in ms.value:
            ms.number(name)
    if one.has("lost"):
        lost = one.value["lost"]
        if not isinstance(lost, list) or not all(isinstance(name, str) for name in lost):
            raise InputError(f"{where}: its lost is no list of names; {_ONE_OF_OURS}")
    return dict(one.value)


_ONE_OF_OURS = "this is no line that --trace has written"


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        read = json.loads(line.rstrip(b"\r\n"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}, column {error.colno}: this is no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
        raise InputError(f"{where}: this is no JSON: {reason}") from error
    return check_record(read, where)


class _Part:
    """An object of a record, with where it is."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is no JSON object; {_ONE_OF_OURS}")
        self.value = value
        self._where = where

    def has(self, name: str) -> bool:
        return self.value.get(name) is not None

    def part(self, name: str) -> _Part:
        return _Part(self.value.get(name), f"{self._where}: {name}")

    def parts(self, name: str) -> list[_Part]:
        found = self.value.get(name)
        if not isinstance(found, list):
            raise self._wrong(name, "a list")
        return [_Part(one, f"{self._where}: {name}, number {i}") for i, one in enumerate(found, start=1)]

    def text(self, name: str) -> None:
        if not isinstance(self.value.get(name), str):
            raise self._wrong(name, "a text")

    def count(self, name: str) -> None:
        found = self.value.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 53:
            raise self._wrong(name, "a whole number")

    def number(self, name: str) -> None:
        if not _is_finite(self.value.get(name)):
            raise self._wrong(name, "a finite number")

    def numbers(self) -> None:
        for name, found in self.value.items():
            if not _is_finite(found):
                what = f"{shown(name, _SHOWN)} is {shown(found, _SHOWN)}"
                raise InputError(f"{self._where}: {what}, not a finite number; {_ONE_OF_OURS}")

    def candidates(self, name: str) -> None:
        for one in self.parts(name):
            one.token()
            one.number("probability")

    def token(self) -> None:
        self.count("id")
        self.text("text")
        if "bytes" in self.value:
            self.text("bytes")

    def _wrong(self, name: str, kind: str) -> InputError:
        if name not in self.value:
            return InputError(f"{self._where}: it has no {name}; {_ONE_OF_OURS}")
        found = shown(self.value[name], _SHOWN)
        return InputError(f"{self._where}: {name} is {found}, not {kind}; {_ONE_OF_OURS}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a browser can read, which has no integers beyond the largest float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max
