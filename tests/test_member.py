"""Sessions against fresh forwards of the same real models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from deepen_ext.errors import InputError, ModelError
from deepen_ext.member import Member, MemberSession

TEXT = (Path(__file__).parent.parent / "deepen_ext" / "member.py").read_text()
POSITIONS = (490, 511, 600)  # below, at and past Gemma's window of 512
DEPTHS = (1, 3, 40)


@pytest.fixture(params=["smollm2", "gemma"])
def member(request: pytest.FixtureRequest) -> Member:
    return request.getfixturevalue(request.param)


def ids_of(member: Member, count: int) -> list[int]:
    ids = member.vocabulary.prefix_ids + member.vocabulary.encode(TEXT)
    assert len(ids) > count
    return ids[:count]


def fresh_logits(member: Member, ids: list[int], lengths: list[int]) -> torch.Tensor:
    """Logits after the first n ids, for each n of lengths, from one forward without a cache."""
    at = torch.tensor([n - 1 for n in lengths])
    with torch.inference_mode():
        output = member.model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=at)
    return output.logits[0]


@contextmanager
def tokens_seen(member: Member) -> Iterator[list[int]]:
    """Lengths of all inputs that go through the model's embedding meanwhile."""
    seen: list[int] = []
    hook = member.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    try:
        yield seen
    finally:
        hook.remove()


def test_rollback_equals_a_fresh_forward(member: Member) -> None:
    """Wrong tokens are fed, rolled back and replaced, on both sides of the window and across it."""
    ids = ids_of(member, POSITIONS[-1] + 2)
    junk = ids_of(member, 200)[::-1]
    expected = dict(zip(POSITIONS, fresh_logits(member, ids, [p + 2 for p in POSITIONS]), strict=True))
    session = MemberSession(member)
    for position in POSITIONS:
        for depth in DEPTHS:
            wrong = session.sync(ids[:position] + junk[:depth]).clone()
            right = session.sync(ids[: position + 2])
            torch.testing.assert_close(right[0], expected[position], atol=1e-3, rtol=0)
            assert (wrong - right).abs().max() > 1  # the rollback had something to undo


def test_rollbacks_in_a_row_reach_any_depth(member: Member) -> None:
    """Each sync is a strict prefix of the one before, down through the window, nothing fed in between."""
    lengths = [640, 639, 600, 511, 90, 1]
    ids = ids_of(member, lengths[0])
    session = MemberSession(member)
    for length, expected in zip(lengths, fresh_logits(member, ids, lengths), strict=True):
        torch.testing.assert_close(session.sync(ids[:length])[0], expected, atol=1e-3, rtol=0)
        assert session.ids == ids[:length]


def test_no_prompt_is_computed_twice(smollm2: Member) -> None:
    ids = ids_of(smollm2, 60)
    session = MemberSession(smollm2)
    with tokens_seen(smollm2) as seen:
        session.sync(ids[:50])
        session.sync(ids[:51])
        first = session.sync(ids[:51])
        assert session.logits is first  # the same ids need no forward
        session.sync([*ids[:48], 7, 8])
        session.sync(ids[:60])
        session.sync(ids[:58])
    assert seen == [50, 1, 2, 12, 1]
    assert session.tokens_fed == sum(seen)


def test_logits_keep_shape_and_dtype(member: Member) -> None:
    logits = MemberSession(member).sync(ids_of(member, 5))
    assert logits.shape == (1, member.vocab_size)
    assert logits.dtype == member.dtype == torch.float32
    assert member.embedding.shape[0] == member.vocab_size


def test_sessions_of_one_member_do_not_meet(smollm2: Member) -> None:
    ids = ids_of(smollm2, 40)
    one, two = MemberSession(smollm2), MemberSession(smollm2)
    one.sync(ids[:30])
    two.sync(ids[::-1])
    expected = fresh_logits(smollm2, ids, [40])
    torch.testing.assert_close(one.sync(ids), expected, atol=1e-3, rtol=0)


def test_an_interrupted_forward_leaves_the_session_usable(gemma: Member) -> None:
    """Half the layers hold the new states when the interrupt comes."""
    ids = ids_of(gemma, 60)
    session = MemberSession(gemma)
    session.sync(ids[:50])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = gemma.model.model.layers[9].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.sync([*ids[:50], 5, 6, 7])
    hook.remove()
    assert session.ids == ids[:50]
    with pytest.raises(InputError, match="no logits"):
        _ = session.logits
    torch.testing.assert_close(session.sync(ids), fresh_logits(gemma, ids, [60]), atol=1e-3, rtol=0)


def test_bad_ids(smollm2: Member) -> None:
    short = replace(smollm2, context_length=10)
    session = MemberSession(short)
    with pytest.raises(InputError, match=rf"{short.name}: 11 tokens exceed its context of 10"):
        session.sync(ids_of(short, 11))
    assert session.sync(ids_of(short, 10)).shape == (1, short.vocab_size)
    with pytest.raises(InputError, match="nothing to feed"):
        session.sync([])
    with pytest.raises(InputError, match=r"0\.\.49151"):
        session.sync([49152])
    with pytest.raises(InputError, match="no logits"):
        _ = MemberSession(smollm2).logits


def test_a_model_that_cannot_roll_back_is_refused(smollm2: Member) -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=64)
    recurrent = replace(smollm2, name="mamba", model=AutoModelForCausalLM.from_config(config))
    with pytest.raises(ModelError, match=r"mamba: .*cannot be rolled back"):
        MemberSession(recurrent)
