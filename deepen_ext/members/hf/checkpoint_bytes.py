"""How many bytes a checkpoint's weights are, by the headers of its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def checkpoint_bytes(target: Path | str, dtype: torch.dtype | str, revision: str | None) -> int | None:
    """Bytes of a checkpoint's weights in a dtype, by the headers of its files.

    None where they are not here, or are damaged: loading then says what is wrong.

    Args:
        target: a folder, or a hub name, of which only what is in the cache counts.
        dtype: of weights that are no integers; "auto": as they are.
        revision: of the hub.
    """
    found = _local(target, "model.safetensors.index.json", revision)
    try:
        return _bytes_of(target, found, dtype, revision)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _bytes_of(
    target: Path | str, index: str | None, dtype: torch.dtype | str, revision: str | None
) -> int | None:
    names = {"model.safetensors"}
    if index is not None:
        names = set(json.loads(Path(index).read_text())["weight_map"].values())
    files = [_local(target, one, revision) for one in names]
    if any(file is None for file in files):
        return None
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118  # no mapping
                part = content.get_slice(key)
                count = torch.Size(part.get_shape()).numel()
                kept = _ITEM_BYTES.get(part.get_dtype(), 1.0)
                floats = part.get_dtype() in ("F64", "F32", "F16", "BF16")
                total += int(count * (dtype.itemsize if floats and isinstance(dtype, torch.dtype) else kept))
    return total


def _local(target: Path | str, file: str, revision: str | None) -> str | None:
    found: str | None = cached_file(
        str(target),
        file,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found
