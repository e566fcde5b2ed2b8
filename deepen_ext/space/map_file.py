"""Relative maps on disk: safetensors, written in one step, never trusted without their checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_write
from deepen_ext.space.map_checks import Damaged, check_header, check_rows, read_facts
from deepen_ext.space.recipes import SimilarityRecipe
from deepen_ext.space.row_sources import RowSource

_FORMAT = "deepen-ext relative map 1"


@dataclass(frozen=True)
class MapFacts:
    """What a saved map says of itself.

    `source` is the fingerprint of what its relative rows were computed from. `recipe` and `temperature` are
    set where they are similarity rows, and None where they need tokenizers as well.
    """

    vocab_size: int
    anchors: int
    entries: int
    source: str
    recipe: SimilarityRecipe | None
    temperature: float | None


def write_map(path: Path, facts: MapFacts, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the map; a reader, or a run after a crash, sees the old file or the new one."""
    text = json.dumps(dataclasses.asdict(facts))
    metadata = {"format": _FORMAT, "facts": text, "checksum": _checksum(text, tensors)}
    with atomic_write(path) as temporary:
        save_file(dict(tensors), temporary, metadata=metadata)


def read_map(path: Path) -> tuple[MapFacts, dict[str, torch.Tensor]]:
    """Read a map back: everything in it is checked, so that its relative rows can be used as they are.

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


def check_source(facts: MapFacts, source: RowSource, fingerprint: str, path: str | Path) -> None:
    """Check that a file is of this source: by its fingerprint, and by the sizes that index its rows."""
    if facts.source != fingerprint:
        raise InputError(
            f"{path} was saved for another model, other anchors or other settings; delete it or use what "
            "it was made with"
        )
    sizes = (facts.vocab_size, facts.anchors, facts.entries)
    if sizes != (expected := (source.vocab_size, source.anchors, source.entries)):
        raise ModelError(
            f"the relative map {path} is damaged (vocab_size, anchors, entries are {sizes}, those of its "
            f"source {expected}); delete it"
        )


def _checksum(facts: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
