"""Forwards shared between runs: the same texts, and nothing is computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sessions import open_session as member_session
from sessions import sync

from deepen_ext import Ensemble, InputError
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.member import Member

PROMPTS = ["The capital of France is", "Question: What is 12 + 30?\nAnswer:", "def fib(n):\n"]


@pytest.fixture(scope="module")
def ensembles(tiny_smollm2: Member, tiny_gemma: Member) -> list[Ensemble]:
    return ensembles_of(tiny_smollm2, tiny_gemma)


def ensembles_of(one: Member, other: Member) -> list[Ensemble]:
    pair = Ensemble([one, other], fuser="deepen")
    turned = Ensemble([other, one], fuser="deepen")
    singles = [Ensemble([member], fuser="single") for member in (one, other)]
    return [*singles, pair, pair.variant(fuser="average"), turned]


def fed(shared: SharedForwards) -> list[int]:
    return [session.tokens_fed for session in shared._sessions.values()]


def test_the_texts_are_those_of_separate_runs(ensembles) -> None:
    want = [one.generate(PROMPTS, max_new_tokens=12) for one in ensembles]
    assert len({tuple(one.texts) for one in want}) >= 4  # they do not all write the same
    with SharedForwards() as shared:
        found = [one.generate(PROMPTS, max_new_tokens=12, shared=shared) for one in ensembles]
    for a, b in zip(want, found, strict=True):
        assert a.texts == b.texts
        assert [one.changed_tokens for one in a] == [one.changed_tokens for one in b]


def test_a_prompt_is_read_once_and_what_is_known_costs_nothing(ensembles) -> None:
    with SharedForwards() as shared:
        for one in ensembles[:2]:
            one.generate(PROMPTS, max_new_tokens=1, shared=shared)
        once = fed(shared)
        assert len(once) == 2
        assert all(count > 10 for count in once)
        for one in ensembles[2:]:
            one.generate(PROMPTS, max_new_tokens=1, shared=shared)
        assert fed(shared) == once
        ensembles[2].generate(PROMPTS, max_new_tokens=12, draft=0, shared=shared)
        more = fed(shared)
        assert more != once
        ensembles[2].generate(PROMPTS, max_new_tokens=12, draft=0, shared=shared)
        assert fed(shared) == more


def test_a_prompt_is_scored_once(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    """Where weights come from prompts: short ones, one that is cut, and two that begin alike."""
    long = " ".join(f"{n} and {n + 30} are {2 * n + 30}." for n in range(60))
    prompts = [*PROMPTS, long, long + " So", "to be"]
    pair, turned = (
        Ensemble(members, weights="prompt", sharpness=0.02)
        for members in ([tiny_smollm2, tiny_gemma], [tiny_gemma, tiny_smollm2])
    )
    ensembles = [pair, turned, pair.variant(fuser="average")]
    traces: list[dict[str, Any]] = []
    want = [one.generate(prompts, max_new_tokens=8, trace=traces.append) for one in ensembles]
    assert len({one["members"][0]["weight"] for one in traces}) > 4
    with SharedForwards() as shared:
        ensembles[0].generate(prompts, max_new_tokens=1, shared=shared)
        once = fed(shared)
        for one in ensembles[1:]:
            one.generate(prompts, max_new_tokens=1, shared=shared)
        assert fed(shared) == once
        assert all(len(kept) <= 2 * len(prompts) for kept in shared._kept.values())  # not every position
        found = [one.generate(prompts, max_new_tokens=8, shared=shared) for one in ensembles]
    assert min(once) > 700
    for a, b in zip(want, found, strict=True):
        assert a.texts == b.texts
        assert [one.changed_tokens for one in a] == [one.changed_tokens for one in b]


def test_positions_are_found_by_the_ids_before_them(tiny_smollm2: Member) -> None:
    """A draft and the same text token by token share; a lane of which one position is missing is asked."""
    text = tiny_smollm2.vocabulary.encode(PROMPTS[1] * 3)
    other = tiny_smollm2.vocabulary.encode(PROMPTS[2] * 4)[:14]

    def tokens_fed() -> int:
        (session,) = shared._sessions.values()
        return session.tokens_fed

    def compare(said: Distribution, texts: list[list[int]]) -> None:
        assert len(said) == len(texts)
        for got, ids in zip(said.scores(), texts, strict=True):
            with member_session(tiny_smollm2) as alone:
                torch.testing.assert_close(got, sync(alone, {0: ids})[0], atol=1e-3, rtol=0)

    with SharedForwards() as shared:
        session = shared.session(tiny_smollm2, 2, 60)
        for length in range(10, 15):  # without drafts
            session.ask({0: text[:length], 1: other[: length - 2]}, 5).wait()
        before = tokens_fed()
        targets = {1: other[:12], 0: text[:14]}
        counts = {0: 5, 1: 2}
        texts = [*(other[:length] for length in (11, 12)), *(text[:length] for length in range(10, 15))]
        again = shared.session(tiny_smollm2, 2, 60)
        compare(again.ask(targets, 5, counts).wait(), texts)
        assert tokens_fed() == before
        # Lane 0's first position is not kept: its six are fed, and lane 1 is not.
        compare(again.ask(targets, 5, {0: 6, 1: 2}).wait(), [*texts[:2], text[:9], *texts[2:]])
        assert tokens_fed() == before + 6
        # What a draft said, a run without drafts finds.
        again.ask({1: other[:14], 0: text[:17]}, 5, {0: 3, 1: 1}).wait()
        before = tokens_fed()
        for length in (15, 16, 17):
            compare(session.ask({0: text[:length]}, 5).wait(), [text[:length]])
        assert tokens_fed() == before
        kept = shared._free_bytes
        again.ask(targets, 5, counts).wait()
        assert shared._free_bytes == kept  # nothing is kept twice
        with pytest.raises(InputError, match=r"lanes \[0\] and texts for lanes \[1, 0\]"):
            again.ask(targets, 5, {0: 1})
        with pytest.raises(InputError, match="nothing to feed"):
            again.ask({0: []}, 5)
        assert len(again.ask({}, 5, {}).wait()) == 0


def test_prompts_that_wait_share_too(ensembles) -> None:
    """Of more prompts than places a later run finds what is still there, and each text is as it is alone."""
    want = ensembles[2].generate(PROMPTS, max_new_tokens=6).texts
    with SharedForwards() as shared:
        for _ in range(2):
            found = ensembles[2].generate(PROMPTS, max_new_tokens=6, batch_size=2, shared=shared)
            assert found.texts == want


def test_without_room_for_logits_only_caches_are_shared(ensembles) -> None:
    want = ensembles[2].generate(PROMPTS, max_new_tokens=6).texts
    with SharedForwards(max_bytes=0) as shared:
        for _ in range(2):
            assert ensembles[2].generate(PROMPTS, max_new_tokens=6, shared=shared).texts == want


def test_what_is_there_already_is_not_asked_of_the_memory_again(
    smollm2: Member, gemma: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real models: a tiny one's logits take more than what it holds of a text."""
    ensembles = ensembles_of(smollm2, gemma)
    with SharedForwards() as shared:
        for one in ensembles[:2]:
            one.generate(PROMPTS, max_new_tokens=4, shared=shared)
        held = [sum(shared.bytes_held(one.members[0], len(PROMPTS)).values()) for one in ensembles[:2]]
        assert min(held) > 10_000_000
        assert shared.bytes_held(ensembles[0].members[0], 1) == {}
        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", lambda device: sum(held) // 2)
        assert len(ensembles[2].generate(PROMPTS, max_new_tokens=4, shared=shared)) == len(PROMPTS)
        with pytest.raises(InputError, match="a smaller batch_size"):
            ensembles[2].generate(PROMPTS, max_new_tokens=4)


def test_finished_rows_are_not_run(tiny_smollm2: Member) -> None:
    """A step has the rows that still write, side by side; the next run begins with all again."""
    alone = Ensemble([tiny_smollm2], fuser="single")
    seen: list[tuple[int, int]] = []
    hook = tiny_smollm2.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    prompts = [*PROMPTS, "Roses are red, violets", "The three primary colours are"]
    try:
        with SharedForwards(max_bytes=0) as shared:
            for stop in (" a", "e"):
                seen.clear()
                rows = alone.generate(prompts, max_new_tokens=12, draft=0, stop_strings=[stop], shared=shared)
                lengths = [len(one.token_ids) for one in rows]
                steps = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
                assert len(set(steps)) >= 3  # they end at different ones
                assert [count for count, width in seen if width == 1][-len(steps) :] == steps
                assert rows.texts == alone.generate(prompts, max_new_tokens=12, stop_strings=[stop]).texts
    finally:
        hook.remove()


def test_closed_ones_are_refused(ensembles) -> None:
    with SharedForwards() as shared:
        pass
    with pytest.raises(InputError, match="were closed"):
        ensembles[0].generate(PROMPTS, max_new_tokens=1, shared=shared)
