"""What the lines of a result file must hold, for whoever reads them to rely on."""

from __future__ import annotations

from typing import Any


def is_header(value: Any) -> bool:
    """Whether a first line has what results are read by. It may have more: what the run depended on."""
    return _fits(value, _HEADER) and _count(value["task"].get("left_out", 0))


def is_record(value: Any) -> bool:
    """Whether a line has the fields of an `ItemRecord`, these alone, each of its type and range."""
    return _has_these_alone(value, _RECORD) and bool(value["changed"] <= value["tokens"])


def is_choice_record(value: Any) -> bool:
    """Whether a line has the fields of a `ChoiceRecord`, these alone, each of its type and range."""
    return _has_these_alone(value, _CHOICE_RECORD) and all(
        value[chosen] is None or value[chosen] < len(value["logprobs"])
        for chosen in ("chosen", "chosen_norm")
    )


def _has_these_alone(value: Any, rule: dict[str, Any]) -> bool:
    return (
        _fits(value, rule) and value.keys() == rule.keys() and value["timing"].keys() == rule["timing"].keys()
    )


def _fits(value: Any, rule: Any) -> bool:
    """By a type, by a function, or by rules for the keys of a dict, which may have more."""
    if isinstance(rule, dict):
        return isinstance(value, dict) and all(
            key in value and _fits(value[key], inner) for key, inner in rule.items()
        )
    return isinstance(value, rule) if isinstance(rule, type) else bool(rule(value))


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53  # exact in every reader of JSON


def _at_least_one(value: Any) -> bool:
    return _count(value) and value > 0


def _duration(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12  # False for NaN


def _logprobs(value: Any) -> bool:
    return isinstance(value, list) and all(
        one is None or (type(one) in (int, float) and -1e12 < one < 1e12) for one in value
    )


def _choice(value: Any) -> bool:
    return value is None or _count(value)


def _members(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_fits(one, _MEMBER) for one in value)


_MEMBER = {"name": str, "vocabulary": str, "weights": str}
_HEADER: dict[str, Any] = {
    "task": {"name": str, "split": str, "items": _at_least_one, "items_sha256": str},
    "configuration": {
        "name": str,
        "method": str,
        "members": _members,
        "weights": lambda value: isinstance(value, list | dict),
        "share_forwards": bool,
    },
}
_RECORD: dict[str, Any] = {
    "index": _count,
    "output": str,
    "answer": lambda value: value is None or isinstance(value, str),
    "correct": bool,
    "tokens": _at_least_one,
    "changed": _count,
    "finish_reason": str,
    "timing": {"prompt_ms": _duration, "decode_ms": _duration, "rows": _at_least_one},
}
_CHOICE_RECORD: dict[str, Any] = {
    "index": _count,
    "logprobs": _logprobs,
    "chosen": _choice,
    "chosen_norm": _choice,
    "correct": bool,
    "correct_norm": bool,
    "timing": {"seconds": _duration},
}
