"""Tensors of GGUF files: read by pieces, they are what gguf itself makes of the whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import _type_traits, dequantize

from deepen_ext.errors import ModelError
from deepen_ext.members.gguf import tensors
from deepen_ext.members.gguf.tensors import dense_tensor

KINDS = [Kind.F32, Kind.F16, *_type_traits]
SHAPES = [(1,), (3,), (33, 5), (2, 3, 1)]  # as torch has them; the last side in blocks


def _write(path: Path, kind: Kind) -> dict[str, np.ndarray]:
    """A file with a tensor of each shape, of random bytes; what gguf itself makes of them."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    expected = {}
    for number, (*others, blocks) in enumerate(SHAPES):
        data = random.integers(0, 256, (*others, blocks * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        writer.add_tensor(f"t{number}", data, raw_dtype=kind)
        expected[f"t{number}"] = np.array(dequantize(data, kind), np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("at_once", [1, 600, 1 << 17])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_by_pieces(
    kind: Kind, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_AT_ONCE", at_once)  # values: a row, some rows, all
    with np.errstate(all="ignore"):  # random bytes are any number
        expected = _write(tmp_path / "random.gguf", kind)
        found = {name: dense_tensor(tmp_path / "random.gguf", name).numpy() for name in expected}
    for name, values in expected.items():
        assert found[name].shape == values.shape
        assert found[name].tobytes() == values.tobytes()


def test_a_type_that_gguf_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.zeros((2, 3), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"t has weights of a type that gguf cannot read: .*I8"):
        dense_tensor(path, "t")
