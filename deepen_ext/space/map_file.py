"""Relative maps on disk: safetensors, written in one step, never trusted without their checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_write
from deepen_ext.space.map_checks import Damaged, check_header, check_rows, read_facts

_FORMAT = "deepen-ext relative map 1"


@dataclass(frozen=True)
class MapFacts:
    """What a saved map says of itself.

    `source` is the fingerprint of what its rows were computed from; `recipe` and `temperature` are those of
    pure similarity rows, None for rows that need tokenizers as well.
    """

    vocab_size: int
    anchors: int
    entries: int
    source: str
    recipe: Literal["paper", "calibrated"] | None
    temperature: float | None


def write_map(path: Path, facts: MapFacts, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the map; a reader, or a run after a crash, sees the old file or the new one."""
    metadata = {
        "format": _FORMAT,
        "facts": json.dumps(dataclasses.asdict(facts)),
        "checksum": _checksum(json.dumps(dataclasses.asdict(facts)), tensors),
    }
    with atomic_write(path) as temporary:
        save_file(dict(tensors), temporary, metadata=metadata)


def read_map(path: Path) -> tuple[MapFacts, dict[str, torch.Tensor]]:
    """Read a map back: everything in it is checked, so that rows can be used as they are.

    Raises:
        InputError: there is no such file.
        ModelError: it is damaged, or no relative map.
    """
    if not path.is_file():
        raise InputError(f"there is no relative map at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ModelError(f"{path} is no relative map of this version; delete it")
            text = metadata.get("facts", "")
            facts = read_facts(text)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            check_header(facts, {n: (one.get_dtype(), one.get_shape()) for n, one in slices.items()})
            tensors = {name: file.get_tensor(name) for name in slices}
        if metadata.get("checksum") != _checksum(text, tensors):
            raise Damaged("its checksum differs")
        check_rows(facts, tensors)
    except Damaged as error:
        raise ModelError(f"the relative map {path} is damaged ({error}); delete it") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the relative map {path} is damaged: it cannot be read ({error}); delete it"
        ) from error
    return MapFacts(**facts), tensors


def _checksum(facts: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
