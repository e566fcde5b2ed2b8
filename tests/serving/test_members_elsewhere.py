"""A member that our own server runs is a member of an ensemble in another process, as any server's is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from running import ASSISTANT, MAIN, PROMPT, Running, serving

from deepen_ext import Ensemble
from deepen_ext.errors import ModelError
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member


@pytest.fixture(scope="module")
def elsewhere(served: Running, tiny_gemma_dir: Path) -> Iterator[Member]:
    """The assistant, by HTTP."""
    member = load_member(f"{served.url}/members/{ASSISTANT}", tokenizer=str(tiny_gemma_dir))
    yield member
    member.backend.close()  # type: ignore[attr-defined]


def test_the_address_of_a_member(elsewhere: Member, served: Running, tiny_gemma: Member) -> None:
    """All that is looked for of a server before it is a member, is there."""
    assert elsewhere.name == ASSISTANT
    assert elsewhere.vocab_size == tiny_gemma.vocab_size
    assert elsewhere.context_length == (tiny_gemma.context_length or 0) - 1  # one more token must fit
    assert elsewhere.backend.capabilities.max_topk == 128
    findings = {one.name: one for one in elsewhere.backend.findings}  # type: ignore[attr-defined]
    assert f"{served.url}/members/{ASSISTANT}" in findings["server"].text
    for name in ("tokenizer", "BOS", "positions", "log-probabilities", "certainty"):
        assert findings[name].good, findings[name]


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("fuser", ["deepen", "average"])
def test_texts_are_those_in_process(
    elsewhere: Member, tiny_smollm2: Member, tiny_gemma: Member, fuser: str, draft: int
) -> None:
    here = Ensemble([tiny_smollm2, tiny_gemma], fuser=fuser)
    by_http = Ensemble([tiny_smollm2, elsewhere], fuser=fuser)
    expected = here.generate(PROMPT, max_new_tokens=20, draft=0)
    found = by_http.generate(PROMPT, max_new_tokens=20, draft=draft)
    assert found.text == expected.text
    assert found.changed_tokens == expected.changed_tokens
    if draft:
        assert found.timings.drafted


def test_whole_texts_are_read_by_prompt_logprobs(
    elsewhere: Member, tiny_smollm2: Member, tiny_gemma: Member
) -> None:
    text = " a narrow spit of land, where the river met the sea. " * 3
    scores = [
        TextReading([tiny_smollm2, one], PROMPT, text)
        .fused(Ensemble([tiny_smollm2, one], fuser="average", candidates=64))
        .total
        for one in (tiny_gemma, elsewhere)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-2)


def test_a_member_that_is_served_with_a_key(
    pair: Ensemble, tiny_gemma_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMBER_KEY", "a-key")
    with serving({"deepen": pair}, key="a-key") as running:
        address = f"{running.url}/members/{ASSISTANT}/v1"
        member = load_member(address, tokenizer=str(tiny_gemma_dir), api_key="env:MEMBER_KEY")
        by_http = Ensemble([pair.members[0], member], fuser="deepen")
        assert by_http.generate(PROMPT, max_new_tokens=4).text == pair.generate(PROMPT, max_new_tokens=4).text
        member.backend.close()  # type: ignore[attr-defined]


def test_an_address_of_no_single_member(served: Running, tiny_gemma_dir: Path) -> None:
    """Of the server as a whole, and of a member that it has not: what to name is in the error."""
    with pytest.raises(
        ModelError, match=f"3 models .*; name one of its members: {served.url}/members/"
    ) as error:
        load_member(served.url, tokenizer=str(tiny_gemma_dir))
    assert str(error.value).endswith(f"/members/{MAIN} or {served.url}/members/{ASSISTANT}")
    with pytest.raises(ModelError, match=rf"there is no member 'nobody'; there are {MAIN}, {ASSISTANT}"):
        load_member(f"{served.url}/members/nobody", tokenizer=str(tiny_gemma_dir))


def test_the_address_of_a_member_whose_name_is_no_path(pair: Ensemble, tiny_gemma_dir: Path) -> None:
    """The error names it so that it can be taken as it stands."""
    twins = [replace(pair.members[1], name="my model") for _ in range(2)]
    with serving({"deepen": Ensemble(twins, fuser="average")}) as running:
        with pytest.raises(ModelError) as error:
            load_member(running.url, tokenizer=str(tiny_gemma_dir))
        first, second = str(error.value).rsplit(": ", 1)[1].split(" or ")
        assert (first, second) == tuple(f"{running.url}/members/my%20model{n}" for n in ("", "%232"))
        member = load_member(second, tokenizer=str(tiny_gemma_dir))
        assert member.name == "my model#2"
        member.backend.close()  # type: ignore[attr-defined]


def test_the_address_of_a_server_of_one_model(pair: Ensemble, tiny_gemma_dir: Path) -> None:
    """Its ensemble of one is a model too, and has no address of a member's."""
    with serving({"deepen": Ensemble(pair.members[1:], fuser="single")}) as running:
        with pytest.raises(ModelError, match="2 models") as error:
            load_member(running.url, tokenizer=str(tiny_gemma_dir))
        assert str(error.value).endswith(f"name one of its members: {running.url}/members/{ASSISTANT}")
        member = load_member(f"{running.url}/members/{ASSISTANT}", tokenizer=str(tiny_gemma_dir))
        by_http = Ensemble([pair.members[0], member], fuser="deepen")
        assert by_http.generate(PROMPT, max_new_tokens=4).text == pair.generate(PROMPT, max_new_tokens=4).text
        member.backend.close()  # type: ignore[attr-defined]
