"""Real tokenizer files: accepted or refused for the right reason, byte-exact, ids that grow as afresh."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest
from counting import counted
from real_tokenizers import Source, tokenizer_file, wanted
from tokenizers import Tokenizer

from deepen_ext.errors import InputError, ModelError
from deepen_ext.text.characters import Utf8Stream
from deepen_ext.text.growing_text import GrowingText
from deepen_ext.text.vocabulary import Vocabulary

pytestmark = pytest.mark.slow

SOURCES = wanted()
ACCEPTED = [source for source in SOURCES if not source.refused]
REFUSED = [source for source in SOURCES if source.refused]
WALKS = 300

TEXTS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 3.14159 (roughly).",
    "DON'T panic; they'LL'VE been there since 1984 — “quoted” text… and naïve façades.",
    "def fusion(x: list[int]) -> dict:\n\treturn {k: v**2 for k, v in enumerate(x) if v >= 10}  # ok\n",
    '<div class="a-b_c">\n    <b>bold</b>\r\n</div>\n\n\n#include <stdio.h>\nfor (int i=0;i<10;++i) {}\n',
    "今天天气很好，我们去公园吧。日本語の文章もカタカナもあります！한국어 문장도 있어요. 中文English混合123",
    "👩‍👩‍👧‍👦 family 🇫🇷 👍🏽❤️ ☂️ 𝔘𝔫𝔦 \U0001f9ff",
    "e\u0301 n\u0303a\u0308\u0323 \u1e0b\u0323 क्षत्रिय สวัสดีชาวโลก مَرْحَبًا שָׁלוֹם Привет, мир!",
    "  leading\n\n\n\n  runs   of     spaces\t\t\tand tabs \r\n\r\n \n \u00a0\u2003\u200b x",
    "0 12 345 6789 0123456789 1,000,000.00 1e-9 ²½ Ⅳ ٣ 3141592653589793",
    "AAAAAAAAAAAAAAAAAAAA----------==========__________.......... 0x1f2e3d4c5b6a",
]
PLAIN = [TEXTS[i] for i in (0, 1, 2, 3, 4, 8, 9)]  # NFC, and without a space at the start


@lru_cache(maxsize=2)  # a file's tests follow each other; a large tokenizer takes 100 MB
def tokenizer_of(source: Source) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file(source)))


@lru_cache(maxsize=2)
def vocabulary_of(source: Source) -> Vocabulary:
    return Vocabulary.from_tokenizer(tokenizer_of(source), name=source.name)


@pytest.fixture(scope="module", params=ACCEPTED, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


def test_there_are_enough_families() -> None:
    assert len({source.family for source in SOURCES}) >= 7
    assert len({source.name for source in SOURCES}) == len(SOURCES)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda source: source.name)
def test_refused_for_the_right_reason(refused: Source) -> None:
    with pytest.raises(ModelError) as error:
        vocabulary_of(refused)
    assert f"{refused.name}: {refused.refused}" in str(error.value)


def test_ids_and_bytes(source: Source) -> None:
    """The ids are the tokenizer's own, the bytes those of the text, and every id has its place."""
    tokenizer, vocabulary = tokenizer_of(source), vocabulary_of(source)
    for text in PLAIN:
        assert vocabulary.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
        assert vocabulary.prefix_ids + vocabulary.encode(text) == tokenizer.encode(text).ids
    for text in TEXTS:
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()
    assert vocabulary.id_bound == max(tokenizer.get_vocab().values()) + 1
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        # A special token gives its id; a token of text its bytes.
        ids = vocabulary.encode(token.content)
        assert ids == [token_id] if token.special else vocabulary.decode(ids) == token.content.encode()


def test_random_walks(source: Source) -> None:
    """Texts that grow by any pieces, half words and added tokens in pieces among them."""
    vocabulary, chance = vocabulary_of(source), random.Random(0)
    added = [token.content for token in tokenizer_of(source).get_added_tokens_decoder().values()]
    tokens = [token.decode(errors="ignore") for token in vocabulary.tokens if token]
    for _ in range(WALKS):
        growing, whole = GrowingText(vocabulary, ""), ""
        for piece in pieces(chance, added, tokens):
            before, foreseen = list(growing.ids), growing.keeps_ids(piece)
            kept = growing.append(piece)
            whole += piece
            assert growing.ids == vocabulary.prefix_ids + vocabulary.encode(whole)
            assert growing.ids[:kept] == before[:kept]
            assert foreseen == (kept == len(before))


def test_random_tokens_are_handed_over(source: Source) -> None:
    """Text out of random tokens, into the ids of another tokenizer: tokens end inside of characters, and
    their bytes are often no UTF-8, as a model may write them."""
    writer = vocabulary_of(source)
    reader = vocabulary_of(ACCEPTED[(ACCEPTED.index(source) + 1) % len(ACCEPTED)])
    written = [token for token in writer.tokens if token]
    parts = [token for token in written if "\ufffd" in token.decode(errors="replace")] or written
    broken = 0
    with counted(f"text from {source.name}", 12) as seeds:
        for seed in seeds:
            chance = random.Random(seed)
            growing, stream, data = GrowingText(reader, ""), Utf8Stream(), b""
            for _ in range(chance.randint(1, 40)):
                token = chance.choice(parts if chance.random() < 0.5 else written)
                text = stream.feed(token)
                data += token
                before, foreseen = list(growing.ids), growing.keeps_ids(text)
                kept = growing.append(text)
                assert growing.ids[:kept] == before[:kept]
                assert foreseen == (kept == len(before)), f"{source.name}, seed {seed}: {data!r}"
                if chance.random() < 0.05:
                    growing = growing.copy()
            growing.append(stream.finish())
            whole = data.decode(errors="replace")
            broken += "\ufffd" in whole
            assert growing.text == whole
            assert growing.ids == reader.prefix_ids + reader.encode(whole), f"{source.name}, seed {seed}"
            if not set(whole.encode()) & set(reader.lost_bytes):
                assert reader.decode(reader.encode(whole)) == whole.encode(), f"{source.name}, seed {seed}"
            with pytest.raises(InputError, match="lone surrogate"):
                growing.append("\ud800")
            assert growing.text == whole
    assert broken > 0


def pieces(chance: random.Random, added: list[str], tokens: list[str]) -> list[str]:
    found = []
    for _ in range(chance.randint(2, 8)):
        kind = chance.random()
        if kind < 0.5:
            text = chance.choice(TEXTS)
            start = chance.randrange(len(text))
            text = text[start : start + chance.randint(1, 12)]
        elif kind < 0.65 and added:
            text = chance.choice(added)
        else:
            text = chance.choice(tokens)
        middle = chance.randint(0, len(text))
        found += [text[:middle], text[middle:]] if chance.random() < 0.4 else [text]
    return found


def test_appends_encode_only_the_end(source: Source) -> None:
    assert vocabulary_of(source).cuts.incremental
