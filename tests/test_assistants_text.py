"""A text as the assistants read it: what is unread, unfinished characters, whether a context holds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import one_byte_tokens
from tokenizers import pre_tokenizers, processors

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.members.chat import PromptText
from deepen_ext.text.vocabulary import Vocabulary


def assistant(context: int, *, dummy: bool = False) -> Any:
    """What an AssistantsText asks of a Member. One token a byte, after BOS and perhaps a dummy space."""
    tokenizer = one_byte_tokens()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=dummy)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.token_to_id("<eos>"))]
    )
    vocabulary = Vocabulary.from_tokenizer(tokenizer, name="bytes")
    assert len(vocabulary.prefix_ids) == 1
    return SimpleNamespace(vocabulary=vocabulary, fits=lambda length: length <= context)


@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize(("prompt", "more"), [("ab", "cd"), ("é", "€"), ("ab", "")])
def test_a_context_is_full_to_the_token(dummy: bool, prompt: str, more: str) -> None:
    tokens = 1 + dummy + len((prompt + more).encode())
    for context in range(tokens - 4, tokens + 4):
        text = AssistantsText([assistant(context, dummy=dummy)], [PromptText(prompt)])
        assert text.append(more.encode()) == more
        assert text.fits() == (tokens <= context)
        assert text.copy().fits() == (tokens <= context)
        assert text.tokens() == [tokens]


def test_who_reads_no_further_fits_anything() -> None:
    out: set[int] = set()
    text = AssistantsText([assistant(9), assistant(2)], [PromptText("abc")] * 2, out)
    twin = text.copy()
    assert not text.fits()
    out.add(1)
    assert text.fits()
    assert twin.fits()
    text.append(b"abcdef")
    assert not text.fits()


def test_a_copy_goes_its_own_way() -> None:
    text = AssistantsText([assistant(9)], [PromptText("a")])
    text.append(b"b" + "é".encode()[:1])
    before = list(text.ids(0))
    twin = text.copy()
    assert twin.unfinished
    assert twin.append("é".encode()[1:] + b"c") == "éc"
    assert text.unfinished
    assert text.append("è".encode()[1:]) == "è"
    vocabulary = assistant(9).vocabulary
    assert text.ids(0) == before + vocabulary.encode("è")
    assert twin.ids(0) == before + vocabulary.encode("éc")


def test_nobody_speaks_inside_a_character() -> None:
    text = AssistantsText([assistant(9)], [PromptText("a")])
    assert text.share(0, None, [], [0.5, 0.5])
    text.append("é".encode()[:1])
    assert not text.share(0, None, [], [0.5, 0.5])
    text.append("é".encode()[1:])
    assert text.share(0, None, [], [0.5, 0.5])
    assert text.finish() == ""
    text.append("é".encode()[:1])
    assert text.finish() == "\ufffd"


def test_a_prompt_that_a_template_wrote_has_no_prefix() -> None:
    text = AssistantsText([assistant(9)] * 2, [PromptText("a"), PromptText("a", prefix=False)])
    assert text.ids(0)[1:] == text.ids(1)
