"""Likelihoods under teacher forcing, against plain forwards of the same models, fused one token at a time."""

from __future__ import annotations

import pytest
import torch

from deepen_ext import session as session_module
from deepen_ext.errors import InputError
from deepen_ext.member import Member
from deepen_ext.session import BatchSession

PROSE = "The naïve café in Zürich sells straw\u00adberries 🍓🍓 and Antarctica's ice; it costs 1,250 €.\n"
CODE = "def area(r):\n    # π·r²\n    return 3.14159 * r**2\n"


@pytest.fixture(params=["smollm2", "gemma"])
def member(request: pytest.FixtureRequest) -> Member:
    return request.getfixturevalue(request.param)


def plain_logits(member: Member, ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), V] of one forward of transformers, without a cache."""
    with torch.inference_mode():
        return member.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


class TestRead:
    """`BatchSession.read`."""

    def test_blocks_are_those_of_one_forward(self, member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = member.vocabulary.prefix_ids + member.vocabulary.encode(PROSE + CODE)
        expected = plain_logits(member, ids)
        monkeypatch.setattr(session_module, "READ_BLOCK", 16)
        with BatchSession(member, 2) as session:
            session.sync({0: ids[:4], 1: ids[:9]})
            blocks = list(session.read(1, ids, 5))
            assert len(blocks) > 2
            assert {len(block) for block in blocks[:-1]} == {16}
            torch.testing.assert_close(torch.cat(blocks), expected[5:], atol=1e-3, rtol=0)
            assert session.ids(1) == ids
            assert session.tokens_fed == 4 + 9 + len(ids) - 5  # nothing of the row's first five again
            fed = session.tokens_fed
            last = session.sync({1: ids})
            torch.testing.assert_close(last[0], expected[-1], atol=1e-3, rtol=0)
            assert session.tokens_fed == fed  # the last logits are known
            other = session.sync({0: ids[:5]})  # the other row is as it was
            torch.testing.assert_close(other[0], expected[4], atol=1e-3, rtol=0)
            assert session.tokens_fed == fed + 1

    def test_dropped_half_way(self, smollm2: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = smollm2.vocabulary.encode(PROSE)
        monkeypatch.setattr(session_module, "READ_BLOCK", 8)
        with BatchSession(smollm2) as session:
            reading = session.read(0, ids)
            next(reading)
            next(reading)
            assert session.ids(0) == ids[:16]
            assert not torch.is_inference_mode_enabled()  # of the caller's own
            got = session.sync({0: ids[:18]})
            torch.testing.assert_close(got[0], plain_logits(smollm2, ids[:18])[-1], atol=1e-3, rtol=0)
            with pytest.raises(InputError, match="other ids while it was read"):
                next(reading)

    def test_wrong_input(self, smollm2: Member) -> None:
        with BatchSession(smollm2) as session:
            for start in (-1, 3):
                with pytest.raises(InputError, match="choose 0 to 2"):
                    session.read(0, [1, 2, 3], start)
            with pytest.raises(InputError, match="nothing to feed"):
                session.read(0, [])
            with pytest.raises(InputError, match="row 1 is not one of"):
                session.read(1, [1])
