"""Damaged traces, and damaged files of a model's folder: our own error, or something that can be used. Maps,
presets, results and GGUF files: tests/test_damaged_files.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_damaged_files import SECONDS, mutate, mutated_text, time_limit
from tiny_models import one_byte_tokens, save_model
from tokenizers import Tokenizer

from deepen_ext import Ensemble
from deepen_ext.errors import ModelError
from deepen_ext.members.loading import load_member
from deepen_ext.serving.page import trace_html
from deepen_ext.serving.page.trace_file import read_trace
from deepen_ext.text.vocabulary import Vocabulary

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


@pytest.mark.parametrize(("size", "message"), [(257, "can give id 4294967295"), (None, "beyond any vocab")])
def test_an_id_in_the_billions(size: int | None, message: str) -> None:
    """Refused at once: neither time nor memory goes by the largest id."""
    parts = json.loads(one_byte_tokens().to_str())
    parts["model"]["vocab"]["two"] = 2**32 - 1
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    with time_limit(SECONDS), pytest.raises(ModelError, match=message):
        Vocabulary.from_tokenizer(tokenizer, size, name="tiny")


def test_a_setting_of_the_wrong_kind(tmp_path: Path) -> None:
    file = save_model(tmp_path / "model", one_byte_tokens(), seed=1) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(ModelError, match="its tokenizer cannot encode text"):
        load_member(file.parent)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_models_folder(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", one_byte_tokens(), seed=1)
    content = (folder / name).read_bytes()

    def use(file: Path) -> None:
        shutil.copy(file, folder / name)
        member = load_member(folder)
        assert member.vocabulary.decode(member.vocabulary.encode("plain")) == b"plain"

    mutate(tmp_path / name, lambda seed: mutated_text(content, seed), use, mutations=12)
