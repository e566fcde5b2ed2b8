"""Members and their options as text, for the command line and lm-eval. No torch is imported here."""

from __future__ import annotations

import json
from typing import Any

from deepen_ext.errors import InputError, shown

DEMO_PAIR = ("demo:smollm2-135m-instruct", "demo:gemma-3-270m")
DEFAULT = "-"  # in a list, in the place of a member that keeps the option's default


def option_from_text(name: str, text: str) -> Any:
    """The value of an option of `LoadOptions`, which checks its range.

    Args:
        name: the option's.
        text: a whole number for `threads`; a number for `timeout`; JSON for `max_memory`, `placement` and for
            a mapping in `device_map`; `-` for the default.

    Raises:
        InputError: no number, or no JSON.
    """
    if text == DEFAULT:
        return None
    if name == "timeout":
        try:
            return float(text)
        except ValueError:
            raise InputError(f"timeout is {shown(text)}; give a number of seconds") from None
    if name == "threads":
        try:
            return int(text)
        except ValueError:
            raise InputError(f"threads is {shown(text)}; give a whole number") from None
    if name in ("max_memory", "placement") or (name == "device_map" and text.lstrip().startswith("{")):
        return _json(name, text)
    return text


def _json(name: str, text: str) -> Any:
    """JSON has texts alone as keys: whole numbers among those of `max_memory` are CUDA devices."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is {shown(text)}, which is no JSON: {error}") from None
    if name == "max_memory" and isinstance(value, dict):
        return {int(key) if key.isdecimal() else key: limit for key, limit in value.items()}
    return value
