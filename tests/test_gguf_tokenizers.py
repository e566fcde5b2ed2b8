"""The tokenizer of a GGUF file: text is split as the file's name for it says, or the file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
from real_tokenizers import SMALL, tokenizer_file
from test_models import TEMPLATE, tiny_gguf  # noqa: F401  (a fixture)
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepen_ext.errors import ModelError
from deepen_ext.members import embedded as demo
from deepen_ext.members.gguf import tokenizer as tokenizer_module
from deepen_ext.members.gguf.pre_tokenizers import SPLIT_RULES
from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer
from deepen_ext.members.hf.gguf_conversion import converted_folder
from deepen_ext.text.vocabulary import Vocabulary

TEXTS = [
    "The QUICK brownFox, isn't it? IT'S 3.14159 (roughly), or 1234567 and 12ab.",
    "def f(x):\n\tif x >= 10:\n        return {'a': [x**2, -1.5e-3]}  # ok\n\n\n",
    "今天天气很好，我们去公园吧。日本語カナ 한국어 中文English混合123",
    "naïve e\u0301 n\u0303 ½² Ⅳ ٣ क्षि สวัสดี 👩‍👩‍👧‍👦 $1,000 <b>a|b</b> `x` ~/y \r\n  z  ",
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALLEST = [*ALPHABET, "ab"], ["a b"]
SPECIAL = ["<unk>", "<s>", "</s>"]

# Regular expressions as llama.cpp's sources name them, written out.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
WRITTEN_OUT = {
    "gpt-2": [GPT2],
    "mpt": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "llama-bpe": [LLAMA3],
    "glm4": [LLAMA3],
    "qwen2": [QWEN2],
    "bloom": [r" ?[^(\s|.,!?…。，、।۔،)]+"],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "seed-coder": [QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")],
}


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[str]]:
    """Tokens and merges that cross words, digits and marks: other splits give other ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


Convert = Callable[..., Tokenizer]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Write a GGUF file of a tokenizer alone and convert it, in a cache of its own."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))

    def made(
        tokens: list[str], merges: list[str], pre: Any, add_bos: bool | None = None, unused: int = 0
    ) -> Tokenizer:
        path = tmp_path / "tokenizer.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        if isinstance(pre, str):
            writer.add_tokenizer_pre(pre)
        elif pre is not None:
            writer.add_uint32("tokenizer.ggml.pre", pre)
        writer.add_token_list([*SPECIAL, *tokens, *(f"[PAD{i}]" for i in range(unused))])
        writer.add_token_types([3] * 3 + [1] * len(tokens) + [5] * unused)
        writer.add_token_merges(merges)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return load_gguf_tokenizer(path, "made").backend_tokenizer

    return made


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_ids_are_those_of_the_rule(name: str, convert: Convert, trained: tuple[list[str], list[str]]) -> None:
    tokens, merges = trained
    found = convert(tokens, merges, name)
    vocab = {token: i for i, token in enumerate([*SPECIAL, *tokens])}
    expected = Tokenizer(BPE(vocab, [(left, right) for left, right in map(str.split, merges)]))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WRITTEN_OUT[name]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    expected.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    for text in TEXTS:
        assert ids_of(found, text) == ids_of(expected, text)
    expected.pre_tokenizer = last
    assert any(ids_of(found, text) != ids_of(expected, text) for text in TEXTS)


NUMBERS = [
    ("gpt-2", ["1234567"]),
    ("falcon", ["123", "456", "7"]),
    ("default", ["123", "456", "7"]),
    ("smollm", list("1234567")),
    ("deepseek-llm", list("1234567")),
    ("kimi-k2", ["123", "456", "7"]),
    ("superbpe", ["1", "234", "567"]),
    ("tiny_aya", ["1", "234", "567"]),
    ("afmoe", ["1", "234", "567"]),
    ("tekken", list("1234567")),
    ("gpt-4o", ["123", "456", "7"]),
    ("minicpm5", ["123", "456", "7"]),
    ("viking", list("1234567")),
    ("bloom", ["1234567"]),
]


@pytest.mark.parametrize(("name", "pieces"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_how_a_number_is_split(name: str, pieces: list[str], convert: Convert) -> None:
    pre_tokenizer = convert(*SMALLEST, name).pre_tokenizer
    assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str("1234567")] == pieces


def test_every_rule_compiles_and_keeps_text(convert: Convert, trained: tuple[list[str], list[str]]) -> None:
    """Each of llama.cpp's names makes a tokenizer that carries text byte for byte."""
    tokens, merges = trained
    tokenizer = convert(tokens, merges, "gpt-2")
    assert len(SPLIT_RULES) > 80
    for rule in set(SPLIT_RULES.values()):
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
        vocabulary = Vocabulary.from_tokenizer(tokenizer, name=repr(rule))
        for text in TEXTS:
            assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


@pytest.mark.parametrize("pre", ["megalodon", None, 7, "gemma4", "whitespace"])
def test_an_unknown_rule_is_refused(pre: str | int | None, convert: Convert) -> None:
    what = "names no pre-tokenizer" if pre is None else f"names the pre-tokenizer {pre!r}"
    with pytest.raises(ModelError, match=rf"tokenizer.gguf: its metadata {what}.*--pre-tokenizer NAME"):
        convert(*SMALLEST, pre)


@pytest.mark.parametrize(("name", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_a_word_that_is_a_token_is_taken_whole(name: str, whole: bool, convert: Convert) -> None:
    tokenizer = convert([*SMALLEST[0], "Ġhello"], SMALLEST[1], name)
    assert (tokenizer.encode(" hello", add_special_tokens=False).tokens == ["Ġhello"]) is whole


@pytest.mark.parametrize(
    ("name", "add_bos", "there"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("tekken", None, True), ("qwen2", True, True)],
)
def test_bos(name: str, add_bos: bool | None, there: bool, convert: Convert) -> None:
    tokenizer = convert(*SMALLEST, name, add_bos)
    assert (tokenizer.encode("a").tokens[0] == "<s>") is there


def test_the_second_time_it_comes_from_the_cache(
    tiny_gguf: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tokenizer; another file with the same settings shares it, other settings do not."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    built = load_gguf_tokenizer(tiny_gguf, "tiny")
    content = tiny_gguf.read_bytes()
    (tmp_path / "other weights.gguf").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    other = content.replace(b"add_bos_token" + b"\7\0\0\0\1", b"add_bos_token" + b"\7\0\0\0\0")
    (tmp_path / "other settings.gguf").write_bytes(other)
    assert other != content
    unlike = load_gguf_tokenizer(tmp_path / "other settings.gguf", "tiny")
    assert (len(built("ab").input_ids), len(unlike("ab").input_ids)) == (2, 1)

    def no_building(*_: object) -> None:
        raise AssertionError("it is built again")

    monkeypatch.setattr("deepen_ext.members.gguf.tokenizer._built", no_building)
    kept = load_gguf_tokenizer(tmp_path / "other weights.gguf", "tiny")
    assert kept.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
    assert kept.special_tokens_map == built.special_tokens_map
    assert kept.all_special_ids == built.all_special_ids
    assert kept.added_tokens_decoder == built.added_tokens_decoder
    assert kept.chat_template == built.chat_template == TEMPLATE
    assert kept.name_or_path == built.name_or_path == "tiny"


@pytest.mark.parametrize(
    ("merges", "written"), [([("a", "b")], ["a b"]), ([("a", " "), ("a", "b")], [["a", " "], ["a", "b"]])]
)
def test_merges_are_kept_as_strings_where_no_token_has_a_space(
    tmp_path: Path, merges: list[tuple[str, str]], written: list[Any]
) -> None:
    """Which are read faster, and are the same merges."""
    vocab = {token: i for i, token in enumerate([" ", "a", "b", "é", "a ", "ab", "<eos>"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, merges)), eos_token="<eos>")
    tokenizer_module.save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]["merges"] == written
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.encode("aba b") == tokenizer.encode("aba b")


def cached(folder: Path) -> list[Path]:
    return [path.parent for path in (folder / "assets").rglob("tokenizer.json")]


@pytest.mark.parametrize("damage", ["no tokenizer.json", "no tokenizer_config.json", "cut", "a list"])
def test_a_damaged_one_in_the_cache_is_made_again(convert: Convert, tmp_path: Path, damage: str) -> None:
    made = convert(*SMALLEST, "gpt-2").to_str()
    (folder,) = cached(tmp_path)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    if damage == "cut":
        (folder / "tokenizer.json").write_bytes(whole["tokenizer.json"][:-100])
    elif damage == "a list":
        (folder / "tokenizer_config.json").write_text("[]")
    else:
        (folder / damage.removeprefix("no ")).unlink()
    with pytest.warns(UserWarning, match="made: its tokenizer in the cache is damaged, and is made again"):
        assert convert(*SMALLEST, "gpt-2").to_str() == made
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_another_transformers_makes_it_anew(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one version made may be refused where another's is not; the same holds for whole models."""
    convert(*SMALLEST, "gpt-2")
    before, model = cached(tmp_path), converted_folder("0" * 64, "made")
    monkeypatch.setattr(tokenizer_module, "version", lambda package: f"{package} 6.0", raising=False)
    convert(*SMALLEST, "gpt-2")
    after = cached(tmp_path)
    assert (len(before), len(after)) == (1, 2)
    assert converted_folder("0" * 64, "made") != model


def test_a_cache_that_cannot_be_written_to(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "assets").write_text("a file in its place")
    with pytest.warns(UserWarning, match="made: its tokenizer is not kept for the next run"):
        tokenizer = convert(*SMALLEST, "gpt-2")
    assert tokenizer.encode("ab").tokens == ["ab"]


def test_unused_tokens_have_no_text(convert: Convert) -> None:
    """llama.cpp's converter names the rows that a model has more than its tokenizer has tokens."""
    vocabulary = Vocabulary.from_tokenizer(convert(*SMALLEST, "gpt-2", unused=2))
    size = len(SPECIAL) + len(SMALLEST[0])
    assert vocabulary.id_bound == size
    padded = Vocabulary.from_tokenizer(convert(*SMALLEST, "gpt-2", unused=2), size + 2)
    assert padded.tokens[size - 1 :] == [b"ab", None, None]
    assert padded.decode(padded.encode("[PAD0] ab")) == b"[PAD0] ab"


@pytest.mark.parametrize("prefix", [True, False])
def test_the_space_before_a_text_is_the_files(prefix: bool, tmp_path: Path) -> None:
    path = tmp_path / "sentencepiece.gguf"
    marks = ["\u2581", *(chr(one) for one in range(33, 127)), "\u2581a"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *marks]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(marks))
    writer.add_token_scores([-float(i) for i in range(len(names))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    vocabulary = Vocabulary.from_tokenizer(load_gguf_tokenizer(path, "made"))
    tokens = [vocabulary.bytes_of(one) for one in vocabulary.encode("cd a")]
    assert tokens == [*([b" "] if prefix else []), b"c", b"d", b" a"]


@pytest.mark.parametrize("role", ["bos", "eos", "unk", "pad"])
def test_an_id_beyond_the_files_tokens_is_named(role: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*SPECIAL, *ALPHABET])
    writer.add_token_merges(SMALLEST[1])
    getattr(writer, f"add_{role}_token_id")(259)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"ggml\.\w+_token_id is 259, but the file has 259 tokens"):
        load_gguf_tokenizer(path, "made")


def test_the_hub_is_not_asked_about_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(*_: object, **__: object) -> None:
        asked.append("model_info")
        raise OSError

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    tokenizer = load_gguf_tokenizer(demo.gguf_file("gemma-3-270m"), "made")
    assert len(tokenizer) > 100_000  # transformers' bound for asking
    assert not asked
    assert tokenizer.name_or_path == "made"


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"none\.gguf: it has no tokenizer \(tokenizer\.ggml\.tokens\); use"):
        load_gguf_tokenizer(path, "none")


REAL = {"deepseek-v4": "deepseek-v3"}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies(name: str, convert: Convert) -> None:
    """A GGUF file of a real vocabulary gives the ids of the model's own tokenizer.json."""
    [source] = [source for source in SMALL if source.name == name]
    path = tokenizer_file(source)
    model = json.loads(path.read_bytes())["model"]
    tokens = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in SPECIAL]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    own = Tokenizer.from_file(str(path))
    made = convert(tokens, merges, REAL[name])
    for text in TEXTS:
        assert (
            made.encode(text, add_special_tokens=False).tokens
            == own.encode(text, add_special_tokens=False).tokens
        )
