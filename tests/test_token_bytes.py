"""Ids, rows and byte tokens: what fits a model, and what is refused when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from deepen_ext.errors import InputError, ModelError
from deepen_ext.measure.doctor.tokenizer_traps import _sizes
from deepen_ext.text.growing_text import GrowingText
from deepen_ext.text.token_bytes import BYTE_TO_CHAR
from deepen_ext.text.vocabulary import Vocabulary

ALPHABET = {char: i for i, char in enumerate(BYTE_TO_CHAR.values())}


def byte_level(added: dict[str, bool] | None = None, vocab: dict[str, int] | None = None) -> Tokenizer:
    """256 byte tokens (or `vocab`) and added tokens, by name and whether they are special."""
    tokenizer = Tokenizer(BPE(vocab or ALPHABET, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, special in (added or {}).items():
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)])
    return tokenizer


def sentencepiece(
    spelling: Callable[[int], str] = "<0x{:02X}>".format, *added: AddedToken, metaspace: str = "never"
) -> Tokenizer:
    """Byte tokens as `spelling` has them, letters, the added tokens."""
    names = ["<unk>", *map(spelling, range(256)), "▁", *"abcdehlot", "▁▁"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(BPE(vocab, [("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=metaspace, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


# ---------------------------------------------------------------- ids and rows


def with_a_gap() -> Tokenizer:
    """As GPT-4o: an added token is in the vocabulary too, beyond ids that no token has."""
    tokenizer = byte_level(vocab={**ALPHABET, "<|end|>": 300})
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def test_ids_are_bounded_by_the_largest() -> None:
    tokenizer = with_a_gap()
    assert tokenizer.get_vocab_size() == 257
    vocabulary = Vocabulary.from_tokenizer(tokenizer, name="gap")
    assert vocabulary.vocab_size == vocabulary.id_bound == 301
    assert vocabulary.encode("a<|end|>")[-1] == 300
    assert vocabulary.decode(vocabulary.encode("a<|end|>")) == b"a"
    assert vocabulary.tokens[256:] == [None] * 45
    with pytest.raises(ModelError, match=r"gap: the tokenizer can give id 300 .* only 300 rows"):
        Vocabulary.from_tokenizer(tokenizer, 300, name="gap")


def test_an_ordinary_token_beyond_a_gap_has_text() -> None:
    vocabulary = Vocabulary.from_tokenizer(byte_level(vocab={**ALPHABET, "ab": 400}), 512, name="gap")
    assert vocabulary.id_bound == 401
    assert vocabulary.tokens[400] == b"ab"


def test_an_ordinary_token_right_beyond_the_rows_is_refused() -> None:
    tokenizer = byte_level(vocab={**ALPHABET, "ab": 256})
    assert Vocabulary.from_tokenizer(tokenizer, 257).tokens[256] == b"ab"
    with pytest.raises(ModelError, match=r"id 256 \('ab'\).* only 256 rows"):
        Vocabulary.from_tokenizer(tokenizer, 256)


def test_a_token_without_text_beyond_the_rows_is_no_id() -> None:
    """Nothing gives it, and nobody walks over the billions of ids before it."""
    tokenizer = byte_level(vocab={**ALPHABET, "": 4_000_000_000})
    vocabulary = Vocabulary.from_tokenizer(tokenizer, 300, name="gap")
    assert vocabulary.id_bound == vocabulary.vocab_size == 300
    assert vocabulary.decode(vocabulary.encode("a b")) == b"a b"
    with pytest.raises(ModelError, match="gap: its tokenizer has the id 4000000000, beyond any vocabulary"):
        Vocabulary.from_tokenizer(tokenizer, name="gap")


@pytest.mark.parametrize("added", [{"<tag>": False}, {"<pad>": True, "<tag>": False}])
def test_a_token_of_text_beyond_the_rows_is_refused(added: dict[str, bool]) -> None:
    tokenizer = byte_level(added)
    assert Vocabulary.from_tokenizer(tokenizer, 256 + len(added)).encode("<tag>") == [255 + len(added)]
    with pytest.raises(ModelError, match=rf"id {255 + len(added)} \('<tag>'\).* only 256 rows"):
        Vocabulary.from_tokenizer(tokenizer, 256)


def test_a_special_token_beyond_the_rows_is_left_out() -> None:
    """As Gemma 3's image token beside its models of text: no text gives its id."""
    tokenizer = byte_level({"<eos>": True, "<image>": True})
    vocabulary = Vocabulary.from_tokenizer(tokenizer, 257, name="text only")
    assert vocabulary.unfit == {257: "<image>"}
    assert vocabulary.id_bound == vocabulary.vocab_size == 257
    growing = GrowingText(vocabulary, "see <ima")
    growing.append("ge><eos>")
    assert growing.ids == vocabulary.encode("see <image><eos>")
    assert vocabulary.decode(growing.ids) == b"see <image>"
    assert growing.ids[-1] == 256
    assert not Vocabulary.from_tokenizer(tokenizer, 258).unfit


def test_what_transformers_calls_special_has_no_text() -> None:
    """An ordinary token, which the caller made the end of text after loading."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(vocab={**ALPHABET, "ab": 256}))
    assert Vocabulary.from_tokenizer(tokenizer).tokens[256] == b"ab"
    tokenizer.eos_token = "ab"
    assert not tokenizer.backend_tokenizer.get_added_tokens_decoder()
    assert Vocabulary.from_tokenizer(tokenizer).tokens[256] is None


def test_special_tokens_that_text_may_not_give() -> None:
    """`split_special_tokens` of transformers: their names are text like any other."""
    tokenizer = byte_level({"<eos>": True})
    assert Vocabulary.from_tokenizer(tokenizer).encode("a<eos>")[-1] == 256
    tokenizer.encode_special_tokens = True
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.encode("a<eos>") == tokenizer.encode("a<eos>").ids
    assert vocabulary.decode(vocabulary.encode("a<eos>")) == b"a<eos>"


def test_the_doctor_tells_of_rows_and_ids() -> None:
    def with_rows(vocabulary: Vocabulary, rows: int) -> SimpleNamespace:
        backend = SimpleNamespace(embedding=lambda: range(rows))
        return SimpleNamespace(vocabulary=vocabulary, vocab_size=rows, backend=backend)

    tokenizer = byte_level({"<eos>": True, "<image>": True})
    for rows, names in ((257, ["missing rows"]), (258, []), (300, ["padding rows"])):
        vocabulary = Vocabulary.from_tokenizer(tokenizer, rows)
        member = with_rows(vocabulary, rows)
        assert [trap.name for trap in _sizes(member)] == names  # type: ignore[arg-type]
    padded = Vocabulary.from_tokenizer(with_a_gap(), 320)
    member = with_rows(padded, 320)
    assert next(_sizes(member)).text.startswith("19 of its 320 logits")  # type: ignore[arg-type]


def test_a_prefix_beyond_the_rows_is_refused() -> None:
    tokenizer = byte_level({"<s>": True})
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    assert Vocabulary.from_tokenizer(tokenizer, 257).prefix_ids == [256]
    with pytest.raises(ModelError, match=r"two: the tokenizer puts the ids \[256\] before .* only 256 rows"):
        Vocabulary.from_tokenizer(tokenizer, 256, name="two")


# ---------------------------------------------------------------- byte tokens


def as_itself(*themselves: int) -> Callable[[int], str]:
    return lambda byte: chr(byte) if byte in themselves else f"<0x{byte:02X}>"


@pytest.mark.parametrize("themselves", [(0x09,), (0x09, 0x0A, 0x0D), tuple(range(1, 0x20)), (0x41, 0x7F)])
def test_byte_tokens_spelt_as_themselves(themselves: tuple[int, ...]) -> None:
    """Gemma 1 and 2 have the tab so."""
    vocabulary = Vocabulary.from_tokenizer(sentencepiece(as_itself(*themselves)))
    text = "".join(map(chr, themselves))
    assert len(vocabulary.encode(text)) == len(themselves)
    assert vocabulary.decode(vocabulary.encode("a" + text + "é")) == ("a" + text + "é").encode()
    assert not vocabulary.lost_bytes


def test_a_byte_of_part_of_a_character_needs_its_token() -> None:
    with pytest.raises(ModelError, match="no token for the bytes 0xC9"):
        Vocabulary.from_tokenizer(sentencepiece(as_itself(0xC9)))


def test_a_missing_byte_is_refused_however_rare() -> None:
    """SentencePiece would give its unknown token; a byte-level BPE drops the byte."""
    with pytest.raises(ModelError, match="no token for the bytes 0x01"):
        Vocabulary.from_tokenizer(sentencepiece(lambda byte: "a" if byte == 1 else f"<0x{byte:02X}>"))
    alphabet = [char for byte, char in BYTE_TO_CHAR.items() if byte != 1]
    vocabulary = Vocabulary.from_tokenizer(byte_level(vocab={char: i for i, char in enumerate(alphabet)}))
    assert vocabulary.lost_bytes == {1}


def test_an_added_token_of_sentencepiece_spells_spaces_as_others_do() -> None:
    vocabulary = Vocabulary.from_tokenizer(sentencepiece("<0x{:02X}>".format, AddedToken("a▁▁▁b")))
    assert b"a   b" in vocabulary.tokens


@pytest.mark.parametrize(
    "more", [{"dropout": 0.1}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}], ids=str
)
def test_other_kinds_of_bpe_are_refused(more: dict[str, Any]) -> None:
    tokenizer = byte_level()
    tokenizer.model = BPE(ALPHABET, [], **more)
    with pytest.raises(ModelError, match="BPE with dropout or with subword prefixes or suffixes"):
        Vocabulary.from_tokenizer(tokenizer, name="other")


def test_an_added_token_of_text_is_its_name() -> None:
    """Not the bytes that its letters stand for in a byte-level vocabulary."""
    vocabulary = Vocabulary.from_tokenizer(byte_level({"<é Ġ>": False}))
    assert vocabulary.encode("a<é Ġ>")[1:] == [256]
    assert vocabulary.tokens[256] == "<é Ġ>".encode()


def test_a_name_that_only_looks_like_a_byte_is_text() -> None:
    vocabulary = Vocabulary.from_tokenizer(sentencepiece("<0x{:02X}>".format, AddedToken("<0xGO>")))
    assert vocabulary.decode(vocabulary.encode("a<0xGO>b")) == b"a<0xGO>b"
    assert b"<0xGO>" in vocabulary.tokens


# ---------------------------------------------------------------- spaces


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("build", [byte_level, sentencepiece])
def test_spaces_beside_a_token_of_text_stay(build: Callable[[], Tokenizer], side: str) -> None:
    """Phi-3's `</s>` is of text and takes the spaces after it along."""
    tokenizer = build()
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, **{side: True})])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    for text in ("</s> a", "a </s>", "a  </s> \n b"):
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()
        growing = GrowingText(vocabulary, "")
        for char in text:
            growing.append(char)
        assert growing.ids == vocabulary.encode(text)
    [token_id] = vocabulary.encode("</s>")
    assert vocabulary.tokens[token_id] == b"</s>"


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_token_of_text_that_must_be_a_word(side: str) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("tag", single_word=True, normalized=False, **{side: True})])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert 256 in vocabulary.encode("a tag b")
    assert 256 not in vocabulary.encode("a tags b")
    assert vocabulary.decode(vocabulary.encode("a tag b")) == b"a tag b"


def test_special_tokens_still_take_spaces() -> None:
    """A chat template may rest on it (Phi-3's `<|user|>`)."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True, normalized=False, rstrip=True)])
    assert Vocabulary.from_tokenizer(tokenizer).encode("<|user|>\na") == tokenizer.encode("<|user|>\na").ids


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_at_the_start_is_kept_under_metaspace(scheme: str) -> None:
    """The documented departure: the original gives " the" and "the" the same ids."""
    tokenizer = sentencepiece(metaspace=scheme)
    assert tokenizer.encode(" the").ids == tokenizer.encode("the").ids
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.encode("the") == tokenizer.encode("the").ids
    assert vocabulary.encode(" the")[0] == tokenizer.token_to_id("▁▁")
    assert vocabulary.decode(vocabulary.encode(" the")) == b" the"


# ---------------------------------------------------------------- padding, truncation, surrogates


@pytest.mark.parametrize("build", [byte_level, sentencepiece])
@pytest.mark.parametrize("direction", ["left", "right"])
def test_padding_and_truncation_are_left_out(build: Callable[[], Tokenizer], direction: str) -> None:
    tokenizer = build()
    tokenizer.add_special_tokens(["<s>", "<pad>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    plain = Vocabulary.from_tokenizer(tokenizer)
    tokenizer.enable_padding(direction=direction, pad_id=bos + 1, pad_token="<pad>", length=64)
    tokenizer.enable_truncation(8, direction=direction)
    before = tokenizer.to_str()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.prefix_ids == plain.prefix_ids == [bos]
    assert vocabulary.fingerprint == plain.fingerprint
    assert len(vocabulary.encode("a" * 100)) >= 100
    assert json.loads(tokenizer.to_str()) == json.loads(before)


@pytest.mark.parametrize("start", ["", "a", "some words, and "])
def test_a_refused_append_changes_nothing(start: str) -> None:
    growing = GrowingText(Vocabulary.from_tokenizer(byte_level()), start)
    ids = list(growing.ids)
    with pytest.raises(InputError, match="lone surrogate at character 2"):
        growing.append("b \ud800")
    assert (growing.text, growing.ids) == (start, ids)
    growing.append("b c")
    assert growing.ids == GrowingText(Vocabulary.from_tokenizer(byte_level()), start + "b c").ids
