"""The boundary rule on real tokenizers: which candidates change an assistant's last token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.boundary import (
    CANDIDATES,
    THRESHOLD,
    BoundaryRule,
    candidates_of,
    share_left,
)
from deepen_ext.decoding.shares import handed_over
from deepen_ext.members.chat import PromptText
from deepen_ext.ops.topk_softmax import TopK
from deepen_ext.text.characters import Utf8Stream
from deepen_ext.text.growing_text import GrowingText
from deepen_ext.text.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabularies(tokenizers: dict[str, PreTrainedTokenizerBase]) -> dict[str, Vocabulary]:
    return {name: Vocabulary.from_tokenizer(tokenizer) for name, tokenizer in tokenizers.items()}


def token(vocabulary: Vocabulary, text: bytes) -> int:
    """The id of the token with these bytes."""
    return vocabulary.tokens.index(text)


def sits_out(main: Vocabulary, assistant: Vocabulary, text: str, *candidates: tuple[bytes, float]) -> bool:
    known = [(token(main, piece), probability) for piece, probability in candidates]
    return BoundaryRule(main).sits_out(GrowingText(assistant, text), known)


# Text, what may come next, and the assistants whose last token that would change. Every piece is a token of
# all three main models'.
CASES = [
    ("I like straw", b"berries", {"smollm2", "gemma", "qwen"}),
    ("I like straw", b" and", set()),
    ("I like straw", b".", set()),
    ("H", b"ello", {"smollm2", "gemma", "qwen"}),  # the first token of the text
    ("x = 1", b"2", set()),  # each digit is a token
    ("x = 1", b".", set()),
    ("The answer is: ", b"The", {"smollm2", "gemma", "qwen"}),  # the space goes to the word
    ("The answer is:", b" The", set()),
    ("    if x:\n    ", b"return", {"smollm2", "qwen"}),  # as before: Gemma's runs of spaces stand apart
    ("    if x:\n    ", b" ", {"smollm2", "gemma", "qwen"}),
    ("One.\n", b"\n", {"smollm2", "gemma", "qwen"}),
    ("One.", b"\n", {"qwen"}),
    ("I don'", b"t", {"smollm2", "qwen"}),
    ("Wait!", b"!!", {"smollm2", "gemma", "qwen"}),
    ("<|im_end|", b">", {"smollm2", "gemma", "qwen"}),  # a special token's name; to Gemma, `|>`
    ("<end_of_turn", b">", {"gemma"}),
]


@pytest.mark.parametrize(("text", "piece", "changed"), CASES)
def test_a_likely_change_of_the_last_token(
    vocabularies: dict[str, Vocabulary], text: str, piece: bytes, changed: set[str]
) -> None:
    for main in vocabularies.values():
        assert {
            name
            for name, assistant in vocabularies.items()
            if sits_out(main, assistant, text, (piece, 0.9), (b" ", 0.01))
        } == changed


def test_characters_of_several_bytes(vocabularies: dict[str, Vocabulary]) -> None:
    """Gemma and Qwen have a token for the two characters; a character that is not whole says nothing."""
    qwen, smollm2, gemma = vocabularies["qwen"], vocabularies["smollm2"], vocabularies["gemma"]
    day = "天".encode()
    assert sits_out(qwen, gemma, "今", (day, 0.9))
    assert not sits_out(qwen, smollm2, "今", (day, 0.9))  # byte tokens, which nothing merges
    assert not sits_out(qwen, gemma, "今天", (day, 0.9))
    assert not sits_out(smollm2, gemma, "今", (day[:2], 0.9))
    assert not GrowingText(qwen, "a ").keeps_ids("\ufffd")  # which would be in its place
    assert not sits_out(smollm2, qwen, "a ", (day[:2], 0.9))


def test_special_tokens_change_nothing(vocabularies: dict[str, Vocabulary]) -> None:
    for main in vocabularies.values():
        special = next(i for i, text in enumerate(main.tokens) if text is None)
        for assistant in vocabularies.values():
            assert not BoundaryRule(main).sits_out(GrowingText(assistant, "I like straw"), [(special, 1.0)])


def test_probabilities_add_up(vocabularies: dict[str, Vocabulary]) -> None:
    main, assistant = vocabularies["smollm2"], vocabularies["gemma"]
    share = THRESHOLD / 2
    others = (b" and", 0.3), (b".", 0.2)
    changing = (b"berries", share + 0.01), (b"berry", share + 0.01)
    assert sits_out(main, assistant, "I like straw", *others, *changing)
    assert not sits_out(main, assistant, "I like straw", *others, changing[0])
    assert not sits_out(
        main, assistant, "I like straw", *others, *((piece, share - 0.01) for piece, _ in changing)
    )
    assert BoundaryRule(main, threshold=0.9).sits_out(
        GrowingText(assistant, "I like straw"), [(token(main, b"berries"), 0.95)]
    )


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([(b" and", 0.75), (b"berries", 0.25)], True),  # just the threshold
        ([(b"berries", 0.125), (b" and", 0.75), (b"berry", 0.125)], True),  # what is left, with what is seen
        ([(b"berries", 0.125), (b" and", 0.8125), (b"berry", 0.0625)], False),
    ],
)
def test_the_threshold_itself(
    vocabularies: dict[str, Vocabulary], shares: list[tuple[bytes, float]], expected: bool
) -> None:
    main = vocabularies["smollm2"]
    rule = BoundaryRule(main, threshold=0.25)
    known = [(token(main, piece), probability) for piece, probability in shares]
    assert rule.sits_out(GrowingText(vocabularies["gemma"], "I like straw"), known) == expected


class TestLeading:
    """What an assistant that counts more than the main model keeps of its weight."""

    def share(
        self, vocabularies: dict[str, Vocabulary], weight: float, *shares: tuple[bytes, float]
    ) -> float:
        main = vocabularies["smollm2"]
        known = [(token(main, piece), probability) for piece, probability in shares]
        text = GrowingText(vocabularies["gemma"], "I like straw")
        return BoundaryRule(main).share(text, known, 1 - weight, weight)

    def test_the_probability_that_its_last_token_stands(self, vocabularies: dict[str, Vocabulary]) -> None:
        shares = (b" and", 0.3), (b"berries", 0.5), (b".", 0.1), (b"berry", 0.02)
        assert self.share(vocabularies, 0.6, *shares) == pytest.approx(0.48)
        assert self.share(vocabularies, 0.6, (b" and", 0.9), (b"berries", 0.1)) == pytest.approx(0.9)

    def test_nothing_changes(self, vocabularies: dict[str, Vocabulary]) -> None:
        assert self.share(vocabularies, 0.6, (b" and", 0.9), (b".", 0.1)) == 1

    def test_it_sits_out_with_less_than_the_least_weight(self, vocabularies: dict[str, Vocabulary]) -> None:
        assert self.share(vocabularies, 0.64, (b"berries", 0.984375)) == 0.015625  # 0.64 / 64 is just 0.01
        assert self.share(vocabularies, 0.63, (b"berries", 0.984375)) == 0

    def test_a_small_weight_is_kept_whole(self, vocabularies: dict[str, Vocabulary]) -> None:
        """Of weights that were given, where nothing is taken from it."""
        assert share_left(0.008, 1.0) == 1
        assert share_left(0.008, 0.99) == 0
        rule = BoundaryRule(vocabularies["smollm2"])
        assert rule.share(GrowingText(vocabularies["gemma"], "I like straw"), (), 0.002, 0.008) == 1

    def test_in_a_text(self, vocabularies: dict[str, Vocabulary]) -> None:
        """Only where it counts more; another one keeps all, or nothing."""
        main = vocabularies["smollm2"]
        some, many = ([(token(main, b"berries"), share), (token(main, b" and"), 0.1)] for share in (0.1, 0.5))
        member = SimpleNamespace(vocabulary=vocabularies["gemma"])
        text = AssistantsText([member], [PromptText("I like straw")])
        rule = BoundaryRule(main)
        for weights, expected in (
            ([0.5, 0.5], (1, 0)),
            ([0.6, 0.4], (1, 0)),
            ([0.4, 0.6], (pytest.approx(0.9), pytest.approx(0.5))),
        ):
            assert (text.share(0, rule, some, weights), text.share(0, rule, many, weights)) == expected
        assert text.share(0, None, many, [0.4, 0.6]) == 1


@pytest.mark.parametrize(
    ("weights", "shares", "expected"),
    [
        ([0.25, 0.75], {1: 0.5}, [0.625, 0.375]),
        ([0.25, 0.75], {1: 0.0}, [1.0, 0.0]),
        ([0.25, 0.75], {1: 1.0}, [0.25, 0.75]),
        ([0.5, 0.5], {1: 0.0}, [0.5, 0.5]),  # it does not count more: it sits out, and nothing is handed over
        ([0.25, 0.25, 0.5], {1: 0.0, 2: 0.5}, [0.5, 0.25, 0.25]),
        ([0.125, 0.375, 0.5], {1: 0.0, 2: 0.5}, [0.75, 0.0, 0.25]),
    ],
)
def test_what_is_handed_over(weights: list[float], shares: dict[int, float], expected: list[float]) -> None:
    assert handed_over(weights, shares) == expected


def test_candidates_of_some_rows() -> None:
    ids, probs = torch.arange(60, dtype=torch.int32).view(3, 20), torch.full((3, 20), 0.03125)
    top = TopK(ids, probs, torch.zeros(3), torch.zeros(3, dtype=torch.int32))
    assert candidates_of(top, [2, 0]) == {
        2: [(40 + i, 0.03125) for i in range(CANDIDATES)],
        0: [(i, 0.03125) for i in range(CANDIDATES)],
    }


def test_no_candidate_is_looked_at_in_vain(
    vocabularies: dict[str, Vocabulary], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, assistant = vocabularies["smollm2"], vocabularies["gemma"]
    asked: list[str] = []
    original = GrowingText.keeps_ids
    monkeypatch.setattr(
        GrowingText, "keeps_ids", lambda self, text: asked.append(text) or original(self, text)
    )
    certain = 1 - THRESHOLD / 2
    assert not sits_out(main, assistant, "I like straw", (b" and", certain), (b"berries", 1 - certain))
    assert asked == [" and"]
    assert sits_out(main, assistant, "I like straw", (b"berries", certain), (b" and", 1 - certain))
    assert asked == [" and", "berries"]


def test_the_answer_does_not_depend_on_how_the_text_came_about(vocabularies: dict[str, Vocabulary]) -> None:
    """Over a text fed token by token, with every next token as the only candidate: the same as afresh, and
    the ids change just where the rule says so."""
    text = Path(__file__).read_text()[:1500] + "今天天气很好。 naïve 1,234.5\n\n"
    for name, main in vocabularies.items():
        for assistant in (one for other, one in vocabularies.items() if other != name):
            rule, characters = BoundaryRule(main), Utf8Stream()
            ids = main.encode(text)
            growing = GrowingText(assistant, characters.feed(main.bytes_of(ids[0])))
            changes = 0
            for candidate in ids[1:]:
                piece = characters.feed(main.bytes_of(candidate))
                if not characters.pending and piece.encode() == main.bytes_of(candidate):
                    afresh = GrowingText(assistant, growing.text)
                    expected = rule.sits_out(growing, [(candidate, 1.0)])
                    assert rule.sits_out(afresh, [(candidate, 1.0)]) == expected
                    assert rule.sits_out(growing, [(candidate, 1.0)]) == expected
                    before = list(growing.ids)
                    assert expected == (growing.append(piece) < len(before))
                    changes += expected
                else:
                    growing.append(piece)
            assert 5 < changes < len(ids) / 2


def test_an_unlikely_change_among_the_candidates_does_not_count(vocabularies: dict[str, Vocabulary]) -> None:
    """A flat distribution: the mass of what the rule is not shown counts as unchanged."""
    main, assistant = vocabularies["qwen"], vocabularies["gemma"]
    flat = [(token(main, piece), 0.01) for piece in (b"berries", b"berry", b" and", b".", b" in", b" on")]
    assert len(flat) <= CANDIDATES
    assert not BoundaryRule(main).sits_out(GrowingText(assistant, "I like straw"), flat)
