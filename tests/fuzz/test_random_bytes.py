"""Text out of random tokens of one real tokenizer, into the ids of another: tokens end inside of characters,
and their bytes are often no UTF-8, as a model may write them.

Nine families in `make test`; fifteen with DEEPEN_TOKENIZERS=all, as in `make tokenizers`.
"""

from __future__ import annotations

import random

import pytest
from counting import counted
from test_real_tokenizers import ACCEPTED, Source, vocabulary_of

from deepen_ext.errors import InputError
from deepen_ext.text.characters import Utf8Stream
from deepen_ext.text.growing_text import GrowingText

pytestmark = pytest.mark.slow

TOKENS = 40  # of a text, at most


@pytest.mark.parametrize("source", ACCEPTED, ids=lambda source: source.name)
def test_random_tokens_are_handed_over(source: Source) -> None:
    writer = vocabulary_of(source)
    reader = vocabulary_of(ACCEPTED[(ACCEPTED.index(source) + 1) % len(ACCEPTED)])
    written = [token for token in writer.tokens if token]
    parts = [token for token in written if token[0] >= 0x80 or token[-1] >= 0x80] or written
    broken = 0
    with counted(f"text from {source.name}", 25) as seeds:
        for seed in seeds:
            chance = random.Random(seed)
            growing, stream, data = GrowingText(reader, ""), Utf8Stream(), b""
            for _ in range(chance.randint(1, TOKENS)):
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
