"""What a relative map's file must hold: checked before its numbers reserve memory or index anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from deepen_ext.errors import shown
from deepen_ext.space.recipes import DEFAULT_TEMPERATURES
from deepen_ext.space.row_table import SUM_ERROR

_MOST = 1 << 22  # tokens or anchors; the largest vocabularies have some 2 ** 18
_CHUNK = 1 << 20  # entries looked at together: what the checks need beside the map stays small
_ROUNDING = 1e-5
_FACTS: dict[str, tuple[type, ...]] = {
    "vocab_size": (int,),
    "anchors": (int,),
    "entries": (int,),
    "source": (str,),
    "recipe": (str, type(None)),
    "temperature": (float, int, type(None)),
}


class Damaged(ValueError):
    """The content of a map's file is wrong; the message says what."""


def read_facts(text: str) -> dict[str, Any]:
    """The facts in a file's metadata, each of the right type and range.

    Raises:
        Damaged: they are not.
    """
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged("its facts are no JSON") from error
    if not isinstance(facts, dict) or facts.keys() != _FACTS.keys():
        raise Damaged(f"its facts are not {', '.join(_FACTS)}")
    for key, types in _FACTS.items():
        if type(facts[key]) not in types:  # not isinstance: True is an int
            raise Damaged(f"{key} is {shown(facts[key], 40)}")
    for key in ("vocab_size", "anchors"):
        if not 1 <= facts[key] <= _MOST:
            raise Damaged(f"{key} is {shown(facts[key], 40)}")
    if not 1 <= facts["entries"] <= facts["anchors"]:
        raise Damaged(f"entries is {shown(facts['entries'], 40)} with {facts['anchors']} anchors")
    recipe, temperature = facts["recipe"], facts["temperature"]
    if recipe not in (None, *DEFAULT_TEMPERATURES) or (recipe is None) != (temperature is None):
        raise Damaged(f"recipe is {shown(recipe, 40)} with temperature {shown(temperature, 40)}")
    if temperature is not None and not 0 < temperature <= 1000:  # False for NaN
        raise Damaged(f"temperature is {shown(temperature, 40)}")
    return facts


def check_header(facts: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Check that the file's tensors, by name their dtype and shape, are those of a map with these facts.

    Raises:
        Damaged: they are not.
    """
    vocab, anchors, entries = facts["vocab_size"], facts["anchors"], facts["entries"]
    _, shape = tensors.get("tokens", ("", []))
    count = shape[0] if shape else -1
    sparse = {
        "tokens": ("I32", [count]),
        "columns": ("I32", [count, entries]),
        "values": ("F32", [count, entries]),
        "rest": ("F32", [count]),
    }
    expected = {"matrix": ("F32", [vocab, anchors])} if "matrix" in tensors else sparse
    if tensors.keys() != expected.keys():
        raise Damaged(f"its tensors are {', '.join(sorted(tensors)) or 'missing'}")
    if expected is sparse and not 0 <= count <= vocab:
        raise Damaged(f"it has {count} rows of {vocab} tokens")
    for name, (dtype, shape) in expected.items():
        if (found := tensors[name]) != (dtype, shape):
            raise Damaged(f"{name} is {found[0]} {found[1]}; expected {dtype} {shape}")


def check_rows(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that every relative row is a distribution: kernels index with the columns unchecked.

    Args:
        facts: what `read_facts` returned.
        tensors: what `check_header` found right.

    Raises:
        Damaged: tokens that do not rise or are out of range, columns out of range, doubled or after an unused
            entry, values negative or not finite, a relative row that does not sum to 1.
    """
    if "matrix" in tensors:
        for rows in torch.split(tensors["matrix"], max(_CHUNK // facts["anchors"], 1)):
            _check_sums(rows, rows.sum(dim=1, dtype=torch.float64))
        return
    tokens = tensors["tokens"]
    if len(tokens) and (int(tokens[0]) < 0 or int(tokens[-1]) >= facts["vocab_size"]):
        raise Damaged("a token is out of range")
    if bool((tokens[1:] <= tokens[:-1]).any()):
        raise Damaged("its tokens are not in order")
    at_once = max(_CHUNK // facts["entries"], 1)
    parts = (torch.split(tensors[name], at_once) for name in ("columns", "values", "rest"))
    for columns, values, rest in zip(*parts, strict=True):
        if len(columns):
            _check_columns(columns, facts["anchors"])
            if not bool(((rest >= -_ROUNDING) & (rest <= 1 + _ROUNDING)).all()):
                raise Damaged("a rest is not between 0 and 1")
            _check_sums(values, torch.where(columns >= 0, values, 0.0).sum(dim=1) + rest)


def _check_columns(columns: torch.Tensor, anchors: int) -> None:
    if int(columns.min()) < -1 or int(columns.max()) >= anchors:
        raise Damaged("a column is out of range")
    used = columns >= 0
    if bool((used[:, 1:] & ~used[:, :-1]).any()):
        raise Damaged("a column stands after an unused entry")
    ordered = columns.numpy().copy()
    ordered.sort(axis=1)
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise Damaged("a row names a column twice")


def _check_sums(values: torch.Tensor, sums: torch.Tensor) -> None:
    least = float(values.min())  # NaN where any value is
    if math.isnan(least) or least < 0:
        raise Damaged("a value is negative or no number")
    if not bool(((sums - 1).abs() <= SUM_ERROR).all()):
        raise Damaged("a row does not sum to 1")
