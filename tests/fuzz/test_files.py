"""Damaged traces, and damaged files of a model's folder: our own error, or something that can be used. Maps,
presets, results and GGUF files: tests/test_damaged_files.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from counting import SCALE
from test_damaged_files import mutate, mutated_text
from tiny_models import one_byte_tokens, save_model

from deepen_ext import Ensemble
from deepen_ext.members.loading import load_member
from deepen_ext.serving.page import trace_html
from deepen_ext.serving.page.trace_file import read_trace

pytestmark = pytest.mark.slow


def test_traces(one_byte_folders: list[Path], tmp_path: Path) -> None:
    ensemble = Ensemble.from_pretrained(list(map(str, one_byte_folders)), cache=False)
    path = tmp_path / "trace.jsonl"
    ensemble.generate("The capital", max_new_tokens=4, trace=path)
    content = path.read_bytes()
    assert len(read_trace(path)) == 4

    def use(file: Path) -> None:
        records = read_trace(file)
        assert "<html" in trace_html(records)
        json.dumps(records)

    mutate(path, lambda seed: mutated_text(content, seed), use, mutations=100)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_models_folder(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", one_byte_tokens(), seed=1)
    content = (folder / name).read_bytes()
    if name == "tokenizer.json":  # what stands beside the vocabulary as often as the vocabulary itself
        parts: dict[str, Any] = json.loads(content)
        content = json.dumps(parts, indent=None).encode()

    def use(file: Path) -> None:
        shutil.copy(file, folder / name)
        member = load_member(folder)
        assert member.vocabulary.decode(member.vocabulary.encode("plain")) == b"plain"

    mutate(tmp_path / name, lambda seed: mutated_text(content, seed), use, mutations=12 if SCALE <= 1 else 6)
