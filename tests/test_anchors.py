"""Anchors by bytes, and the anchor a token begins with, on real vocabularies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from deepen_ext.errors import InputError
from deepen_ext.space import anchors as anchors_module
from deepen_ext.space.anchors import Anchors, PrefixColumns, first_token, shared_anchors
from deepen_ext.space.relative_map import RelativeMap
from deepen_ext.space.row_sources import PrefixRows, SimilarityRows
from deepen_ext.text.vocabulary import Vocabulary

SMOL_EOS, GEMMA_EOS, QWEN_EOS = (2, 0), (1, 106), (151645, 151643)


@pytest.fixture(scope="module")
def smol(tokenizers: dict[str, PreTrainedTokenizerBase]) -> Vocabulary:
    return Vocabulary.from_tokenizer(tokenizers["smollm2"], name="smol")


@pytest.fixture(scope="module")
def gem(tokenizers: dict[str, PreTrainedTokenizerBase]) -> Vocabulary:
    return Vocabulary.from_tokenizer(tokenizers["gemma"], name="gem")


@pytest.fixture(scope="module")
def qwen(tokenizers: dict[str, PreTrainedTokenizerBase]) -> Vocabulary:
    return Vocabulary.from_tokenizer(tokenizers["qwen"], name="qwen")


@pytest.fixture(scope="module")
def pair(smol: Vocabulary, gem: Vocabulary) -> Anchors:
    return shared_anchors([smol, gem], [SMOL_EOS, GEMMA_EOS], minimum=46_146)  # as many as they share


def tiny(words: list[str], name: str) -> Vocabulary:
    """A byte-level tokenizer with a few whole words as merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = list(alphabet), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in ("</s>", "<pad>")])
    return Vocabulary.from_tokenizer(tokenizer, name=name)


def assert_sound(anchors: Anchors, vocabularies: list[Vocabulary], eos_ids: list[tuple[int, ...]]) -> None:
    """Same bytes in every column, and a column for every token with an anchor's bytes."""
    texts = []
    for member, (vocabulary, eos) in enumerate(zip(vocabularies, eos_ids, strict=True)):
        ids, columns = anchors.token_ids[member], anchors.columns[member]
        assert ids.dtype == torch.int64
        assert columns.dtype == torch.int32
        assert ids.shape == (len(anchors),)
        assert columns.shape == (vocabulary.vocab_size,)
        assert torch.equal(columns[ids], torch.arange(len(anchors), dtype=torch.int32))
        texts.append([None if i in eos else vocabulary.tokens[i] for i in ids.tolist()])
        for i, column in enumerate(columns.tolist()):
            if column >= 0 and i not in eos:
                assert vocabulary.tokens[i] == texts[member][column]
        assert set(columns[list(eos)].tolist()) == {anchors.eos_column}
    assert all(other == texts[0] for other in texts[1:])
    assert [i for i, text in enumerate(texts[0]) if text is None] == [anchors.eos_column]
    assert len(set(texts[0])) == len(texts[0])
    assert torch.equal(anchors.token_ids[0], anchors.token_ids[0].sort().values)


def test_demo_pair(pair: Anchors, smol: Vocabulary, gem: Vocabulary) -> None:
    assert_sound(pair, [smol, gem], [SMOL_EOS, GEMMA_EOS])
    by_bytes = {t for t in smol.tokens if t} & {t for t in gem.tokens if t}
    assert len(pair) == len(by_bytes) + 1 == 46146
    assert pair.eos_column == 0  # id 2; all others below 17 are special
    assert shared_anchors([smol, gem], [SMOL_EOS, GEMMA_EOS]) is pair  # found once


def test_qwen_and_gemma_share_chinese(qwen: Vocabulary, gem: Vocabulary) -> None:
    anchors = shared_anchors([qwen, gem], [QWEN_EOS, GEMMA_EOS])
    assert_sound(anchors, [qwen, gem], [QWEN_EOS, GEMMA_EOS])
    assert len(anchors) == 95969
    for word in ("中国", " дом", "é"):
        column = anchors.columns[0][qwen.encode(word)[0]]
        assert column >= 0
        assert anchors.token_ids[1][column] == gem.encode(word)[0]


def test_three_members(
    smol: Vocabulary, gem: Vocabulary, qwen: Vocabulary, pair: Anchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, eos = [smol, gem, qwen], [SMOL_EOS, GEMMA_EOS, QWEN_EOS]
    anchors = shared_anchors(members, eos)
    assert_sound(anchors, members, eos)
    assert 100 < len(anchors) < len(pair)
    monkeypatch.setattr("deepen_ext.space.anchors._known", {})
    assert anchors.fingerprint == shared_anchors(members, eos).fingerprint != pair.fingerprint


def test_equal_bytes_share_a_column(pair: Anchors, gem: Vocabulary) -> None:
    byte_token = gem.tokens.index(b"A")
    letter = gem.encode("A")[0]
    assert byte_token < letter
    column = int(pair.columns[1][letter])
    assert column == pair.columns[1][byte_token] >= 0
    assert pair.token_ids[1][column] == letter  # the one the tokenizer itself gives


def test_eos_by_role(smol: Vocabulary, gem: Vocabulary, pair: Anchors) -> None:
    assert pair.eos_column is not None
    assert [int(ids[pair.eos_column]) for ids in pair.token_ids] == [2, 1]
    without = shared_anchors([smol, gem], [SMOL_EOS, ()])
    assert without.eos_column is None
    assert len(without) == len(pair) - 1
    assert without.columns[0][2] == -1


def test_an_eos_token_with_text_keeps_its_role() -> None:
    one, two = tiny(["stop"], "one"), tiny(["stop"], "two")
    stop = one.encode("stop")[0]
    anchors = shared_anchors([one, two], [(stop,), (two.encode("</s>")[0],)])
    assert anchors.columns[0][stop] == anchors.eos_column
    assert anchors.columns[1][two.encode("stop")[0]] == -1


def test_bad_input(smol: Vocabulary, gem: Vocabulary) -> None:
    with pytest.raises(InputError, match="smol, gem share only 46146 tokens, and at least 46147"):
        shared_anchors([smol, gem], [SMOL_EOS, GEMMA_EOS], minimum=46_147)
    with pytest.raises(InputError, match="two or more"):
        shared_anchors([smol], [SMOL_EOS])
    with pytest.raises(InputError, match=r"smol: EOS ids \[49152\] are outside"):
        shared_anchors([smol, gem], [(49152,), GEMMA_EOS])


# ---------------------------------------------------------------- prefix columns


def test_an_assistants_token_begins_with_mains_first(
    pair: Anchors, smol: Vocabulary, gem: Vocabulary
) -> None:
    prefix = PrefixColumns(pair, [smol, gem])
    for word, beginning in (
        (" soiled", b" soil"),
        (" seguridad", b" seg"),
        ("comand", b"com"),
        (" SOCK", b" S"),
    ):
        (token,) = gem.encode(word)
        assert pair.columns[1][token] < 0  # not an anchor itself
        assert smol.bytes_of(smol.encode(word)[0]) == beginning
        assert prefix.column(1, token) == pair.columns[0][smol.encode(word)[0]] >= 0


def test_every_token_with_text_has_a_sound_prefix(pair: Anchors, smol: Vocabulary, gem: Vocabulary) -> None:
    vocabularies = [smol, gem]
    prefix = PrefixColumns(pair, vocabularies)
    for member, vocabulary in enumerate(vocabularies):
        without = (pair.columns[member] < 0).nonzero().flatten().tolist()
        none = 0
        for token in without[:: max(1, len(without) // 4000)]:
            column, data = prefix.column(member, token), vocabulary.tokens[token]
            if data is None:
                assert column == -1
            elif column < 0:
                none += 1
                assert not any(data.startswith(t) for t in smol.tokens if t and t in (data[:1], data[:2]))
            else:
                anchor = smol.tokens[pair.token_ids[0][column]]
                assert anchor is not None
                assert data.startswith(anchor)
                assert anchor != data
        assert none <= 2


def test_anchors_and_specials(pair: Anchors, smol: Vocabulary, gem: Vocabulary) -> None:
    prefix = PrefixColumns(pair, [smol, gem])
    for column in (0, 5, 1000, len(pair) - 1):
        assert prefix.column(0, int(pair.token_ids[0][column])) == column
        assert prefix.column(1, int(pair.token_ids[1][column])) == column
    assert prefix.column(1, 1) == prefix.column(1, 106) == pair.eos_column
    assert prefix.column(1, 0) == prefix.column(0, 3) == -1  # <pad>, <repo_name>


def test_a_byte_that_a_tokenizer_drops_is_no_beginning(smol: Vocabulary) -> None:
    lost = bytes([min(smol.lost_bytes)])
    assert smol.encode((lost + b" straw").decode()) == smol.encode(" straw")
    assert first_token(smol, b" straw") == smol.encode(" straw")[0]
    assert first_token(smol, lost + b" straw") is None


def test_two_threads_find_the_same_anchors_once(smol: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []

    def find(*given: Any) -> list[int]:
        time.sleep(0.2)  # the other thread asks meanwhile
        found.append(given)
        return [0] * 100

    monkeypatch.setattr(anchors_module, "_known", {})
    monkeypatch.setattr(anchors_module, "_find", find)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: shared_anchors([smol, smol], [SMOL_EOS, SMOL_EOS]), range(2))
    assert one is other
    assert len(found) == 1


def test_the_oldest_known_anchors_are_forgotten(smol: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors_module, "_known", {})
    monkeypatch.setattr(anchors_module, "_find", lambda *_: [0] * 100)
    made = [shared_anchors([smol, smol], [[end], [end]]) for end in range(9)]
    assert shared_anchors([smol, smol], [[1], [1]]) is made[1]
    assert shared_anchors([smol, smol], [[0], [0]]) is not made[0]
    assert len(anchors_module._known) == 8


def test_rules_of_prefix_columns() -> None:
    main = tiny(["abcd", "xyz"], "main")  # of its own: abc, abcd, xy, xyz
    assistant = tiny(["ab", "cd", "xq", "abz"], "assistant")
    anchors = shared_anchors([main, assistant], [main.encode("</s>"), assistant.encode("</s>")])
    prefix = PrefixColumns(anchors, [main, assistant])

    def column(vocabulary: Vocabulary, text: bytes) -> int:
        member = 0 if vocabulary is main else 1
        return prefix.column(member, vocabulary.tokens.index(text))

    anchor_ab, anchor_x = column(main, b"ab"), column(main, b"x")
    assert min(anchor_ab, anchor_x) >= 0
    assert column(main, b"abcd") == anchor_ab  # the assistant writes ab, cd
    assert column(main, b"xyz") == anchor_x
    assert column(assistant, b"abz") == anchor_ab  # main writes ab, z
    assert column(assistant, b"xq") == anchor_x


@pytest.mark.parametrize("member", [0, 1])
def test_relative_rows_by_bytes(member: int) -> None:
    """Of the bytes recipe, then of the calibrated one, where anchors have their similarity row."""
    vocabularies = [tiny(["abcd", "xyz"], "main"), tiny(["ab", "cd", "xq", "abz"], "assistant")]
    own = vocabularies[member]
    (eos,), (pad,) = own.encode("</s>"), own.encode("<pad>")
    anchors = shared_anchors(vocabularies, [one.encode("</s>") for one in vocabularies])
    prefix = PrefixColumns(anchors, vocabularies)
    columns = torch.tensor([prefix.column(member, token) for token in range(own.vocab_size)])
    by_bytes = torch.zeros(own.vocab_size, len(anchors))
    by_bytes[columns >= 0, columns[columns >= 0]] = 1
    by_bytes[pad] = 1 / len(anchors)  # it says nothing
    assert columns[pad] == -1
    assert columns[eos] == anchors.eos_column
    found = RelativeMap.from_source(PrefixRows(anchors, prefix, member)).to_dense()
    torch.testing.assert_close(found, by_bytes)

    embedding = torch.randn(own.vocab_size, 6)
    similarity = SimilarityRows(embedding, anchors.token_ids[member], temperature=3, entries=5)
    by_similarity = RelativeMap.from_source(similarity).to_dense()
    is_anchor = anchors.columns[member] >= 0
    of_bytes = ~is_anchor & (columns >= 0)
    of_bytes[eos] = True
    assert of_bytes.sum() > 2
    want = torch.where(of_bytes[:, None], by_bytes, by_similarity)
    found = RelativeMap.from_source(PrefixRows(anchors, prefix, member, similarity)).to_dense()
    torch.testing.assert_close(found, want)
    assert (by_similarity - by_bytes).abs().amax(dim=1).min() > 0.01
