"""Our tokenizer of a GGUF file gives the ids that llama.cpp's own gives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unicodedata import category

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import SMALL, tokenizer_file
from test_models import write_gguf

from deepen_ext import demo
from deepen_ext.errors import ModelError
from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer
from deepen_ext.members.llama_cpp.library import Library, load_library
from deepen_ext.members.llama_cpp.tokens import check_tokenizer, tokenize
from deepen_ext.text.vocabulary import PROBES, Vocabulary

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LINES = 1000
# The tokenizers of the embedded models, and others in GGUF files of their own: llama.cpp's name of the split.
EMBEDDED = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
OTHERS = {
    "deepseek-v4": "deepseek-v3",
    "qwen3.6": "qwen35",
    "llama3": "llama-bpe",
    "cl100k": "dbrx",
}
# llama.cpp's patterns of these lack the combining marks (\\p{M}) of the models' own.
WITHOUT_MARKS = {"tekken_240911": "tekken", "llama4": "llama4"}
WORDS = ["the", "Hello", "isn't", "WE'LL", "I'M", "'s", "don\u2019t", "na\u00efve", "1234567", "3.14", "x_1"]
SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\f",
    "\0",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    "\ufeff",
]
PIECES = [
    *WORDS,
    *SPACES,
    *"!?.,;:()[]{}/\\|<>=+-*_~`@#$%^&\"'",
    *(
        "e\u0301",
        "\u0915\u094d\u0937",
        "\u4eca\u5929",
        "\ud55c\uad6d",
        "\u0633\u0644",
        "\u0e2a\u0e27",
        "\U0001f9ff",
    ),
    *(
        "\u00bd",
        "\u2167",
        "\u0663",
        "\U0001d518",
        "\ufb01",
        "\u200d",
        "\ufe0f",
        "\ue000",
        "\U000e0001",
        "\u0378",
    ),
]


class Tokenizer:
    """llama.cpp's tokenizer of a file whose weights, if it has any, stay where they are."""

    def __init__(self, library: Library, path: Path) -> None:
        call = library.call
        params = call.llama_model_default_params()
        params.vocab_only = True
        self.library, self.name = library, path.stem
        self.handle = call.llama_model_load_from_file(str(path).encode(), params)
        assert self.handle, library.complaint()
        self.vocab = call.llama_model_get_vocab(self.handle)
        self.vocab_size = call.llama_vocab_n_tokens(self.vocab)


class Pair:
    """Both tokenizers of one file."""

    def __init__(self, path: Path) -> None:
        self.theirs: Any = Tokenizer(load_library(), path)
        self.ours = Vocabulary.from_tokenizer(load_gguf_tokenizer(path, path.stem), self.theirs.vocab_size)

    def check(self, text: str) -> None:
        ours, theirs = self.ours.encode(text), tokenize(self.theirs, text)
        assert [*map(self.ours.bytes_of, ours)] == [*map(self.ours.bytes_of, theirs)], repr(text)
        assert ours == theirs, repr(text)


def write_tokenizer(path: Path, source: Path, pre: str) -> Path:
    """A GGUF file without weights, with a byte-level tokenizer.json, as llama.cpp's converter writes it."""
    whole = json.loads(source.read_bytes())
    model, added = whole["model"], {one["id"]: one for one in whole["added_tokens"]}
    names = {i: name for name, i in model["vocab"].items()} | {i: one["content"] for i, one in added.items()}
    size = max(names) + 1
    kinds = dict.fromkeys(range(size), gguf.TokenType.UNUSED) | dict.fromkeys(names, gguf.TokenType.NORMAL)
    for i, one in added.items():
        kinds[i] = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds[i] for i in range(size)])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    writer.add_bos_token_id(next(iter(added), 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def benchmark_lines() -> list[str]:
    """Values of the six benchmarks' items, spread over all of their files."""
    found = []
    for file in sorted(DATA.rglob("*.jsonl")):
        items = [json.loads(line) for line in file.open()]
        texts = [text for item in items for text in item.values() if isinstance(text, str) and len(text) > 20]
        found.append(texts[:: max(1, len(texts) // (LINES // 8))])
    lines = [text for texts in found for text in texts]
    assert len(found) >= 11
    return random.Random(0).sample(lines, LINES)


@pytest.fixture(scope="module", params=[*EMBEDDED, *OTHERS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if request.param in EMBEDDED:
        return Pair(demo.gguf_file(request.param))
    return other_pair(request.param, OTHERS[request.param], tmp_path_factory.mktemp(request.param))


def other_pair(name: str, pre: str, folder: Path) -> Pair:
    [source] = [one for one in SMALL if one.name == name]
    return Pair(write_tokenizer(folder / f"{name}.gguf", tokenizer_file(source), pre))


pytestmark = pytest.mark.slow  # models and tokenizers are fetched


def test_the_same_before_a_text(pair: Pair) -> None:
    check_tokenizer(pair.theirs, pair.ours)
    for text in PROBES:
        if "\u2581" not in text:
            pair.check(text)


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data is not at ../shared/data")
def test_benchmarks(pair: Pair) -> None:
    for text in benchmark_lines():
        pair.check(text)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(PIECES) | st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=12
    ).map("".join)
)
def test_any_text(pair: Pair, text: str) -> None:
    pair.check(text.replace("\u2581", ""))


@pytest.mark.parametrize("text", ["\u2581", "<bos>"])
def test_what_differs_by_design(text: str) -> None:
    """The sign of SentencePiece for a space, and a special token's name."""
    gemma = Pair(demo.gguf_file("gemma-3-270m"))
    assert gemma.ours.encode(text) != tokenize(gemma.theirs, text)


def test_another_bos_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf")
    theirs: Any = Tokenizer(load_library(), whole)
    ours = Pair(whole).ours
    check_tokenizer(theirs, ours)
    assert ours.prefix_ids == [1]
    ours.prefix_ids = []
    with pytest.raises(
        ModelError, match=r"whole: 'Hello world' is \[.*\] by our tokenizer and \[1, .*\] by llama"
    ):
        check_tokenizer(theirs, ours)


@pytest.mark.parametrize("name", WITHOUT_MARKS)
def test_where_llama_cpp_leaves_out_combining_marks(name: str, tmp_path: Path) -> None:
    """The first difference is in the message; texts without such marks get the same ids."""
    pair = other_pair(name, WITHOUT_MARKS[name], tmp_path)
    with pytest.raises(
        ModelError, match=rf"{name}: 'e\u0301 n.*' is \[.*\] from token \d+ on by our tokenizer and"
    ):
        check_tokenizer(pair.theirs, pair.ours)
    plain = [
        text for text in PROBES if not any(category(one)[0] == "M" for one in text) and "\u2581" not in text
    ]
    assert len(plain) > 10
    for text in plain:
        pair.check(text)
