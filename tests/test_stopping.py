"""When a text ends: stop strings over tokens of any length, and which reason counts first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import EOS, tiny_main_model

from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.stopping import Stopping
from deepen_ext.decoding.text_in_progress import TextInProgress

PROMPT = [5, 6]
LOGITS = torch.zeros(1, 300)


@pytest.fixture(scope="module")
def main() -> Any:
    return tiny_main_model()


def reasons(main: Any, pieces: Sequence[str], *, last: int = 9, **asked: Any) -> list[str | None]:
    """After each piece of a text until it ends; the last token of all is `last`."""
    stopping = Stopping()
    stopping.add(4, Settings.read(main, **asked))
    text = TextInProgress(list(PROMPT), len(PROMPT), asked.get("max_new_tokens", 20))
    longest = max((len(stop) for stop in asked.get("stop_strings", ())), default=0)
    found = []
    for i, piece in enumerate(pieces):
        text.ids.append(last if i == len(pieces) - 1 else 9)
        stopping.remember(4, text, piece)
        assert len(text.recent) <= longest + len(piece)  # what no stop string can reach is forgotten
        found.append(stopping.reason(4, text, LOGITS))
        if found[-1] is not None:
            break
    return found


@pytest.mark.parametrize(
    ("pieces", "where"),
    [
        (["x", "abcd"], 1),
        (["xyzabcdxyz"], 0),  # inside of a token that is longer
        (["xa", "b", "", "c", "d"], 4),
        (["xyzabc", "d"], 1),
        (["abc", "xd", "ab", "cde"], 3),
        (["abc", "q"], 1),  # the shorter one
        (["abd", "bcd"], None),
    ],
)
def test_stop_strings(main: Any, pieces: list[str], where: int | None) -> None:
    found = reasons(main, pieces, stop_strings=["abcd", "q"])
    assert found == [None if i != where else "stop_string" for i in range(len(pieces))]


def test_none_are_asked_for(main: Any) -> None:
    assert reasons(main, ["abcd", "q"]) == [None, None]


def test_the_last_of_the_new_tokens(main: Any) -> None:
    assert reasons(main, ["a", "b", "c"], max_new_tokens=3) == [None, None, "length"]


def test_which_reason_counts_first(main: Any) -> None:
    """EOS, stop strings, the caller's criteria, the length."""
    asked = {
        "stop_strings": ["a"],
        "stopping_criteria": [lambda ids, scores: torch.tensor([ids.tolist() == [[*PROMPT, 9]]])],
        "max_new_tokens": 1,
    }
    assert reasons(main, ["a"], last=EOS, **asked) == ["eos"]
    assert reasons(main, ["a"], **asked) == ["stop_string"]
    assert reasons(main, ["b"], **asked) == ["stopping_criteria"]
    del asked["stopping_criteria"]
    assert reasons(main, ["b"], **asked) == ["length"]


def test_each_text_has_its_own_rules(main: Any) -> None:
    stopping = Stopping()
    stopping.add(0, Settings.read(main, stop_strings="a", eos_token_id=7))
    stopping.add(1, Settings.read(main, stopping_criteria=[lambda ids, scores: torch.tensor([True])]))
    texts = [TextInProgress([*PROMPT, 9], len(PROMPT), 5) for _ in range(2)]
    for number, text in enumerate(texts):
        stopping.remember(number, text, "a")
    assert [stopping.reason(number, text, LOGITS) for number, text in enumerate(texts)] == [
        "stop_string",
        "stopping_criteria",
    ]
    assert [stopping.ends_text(number, token) for number in (0, 1) for token in (7, EOS)] == [
        True,
        False,
        False,
        True,
    ]
    stopping.forget(0)
    with pytest.raises(KeyError):
        stopping.ends(0)
    stopping.add(0, Settings.read(main))  # the number may be used again
    assert stopping.reason(0, texts[0], LOGITS) is None
