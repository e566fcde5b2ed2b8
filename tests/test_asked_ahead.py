"""Members elsewhere are asked before the main model works: in which order, how often, and when it fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from far_backend import FarBackend, far
from tiny_models import PROSE, one_byte_tokens, save_model, tiny_reader

from deepen_ext import Ensemble
from deepen_ext.errors import InputError, MemberLost, ModelError
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.members.top_k_only import TopKOnly

PROMPT = PROSE[:40]
NEW = 12
LOUD: dict[str, Any] = {"fuser": "deepen", "learning_rate": 1.0, "cache": False}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """A main model and two assistants, of one token a byte."""
    base = load_member(save_model(tmp_path_factory.mktemp("model") / "base", one_byte_tokens(), seed=0))
    return [
        far(tiny_reader(base, name, PROSE[300 * i : 300 * i + 1200], seed=i + 1))
        for i, name in enumerate(["main", "far", "near"])
    ]


@pytest.fixture(scope="module")
def pair(members: list[Member]) -> Ensemble:
    return Ensemble(members[:2], **LOUD)


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    FarBackend.reset()
    yield
    assert all(one.closed and not one.under_way for one in FarBackend.sessions)
    FarBackend.reset()


def events(ensemble: Ensemble, prompts: Any = PROMPT, **settings: Any) -> tuple[Any, list[str]]:
    """What is written with the second member elsewhere, and all calls."""
    FarBackend.reset()
    FarBackend.names = {"far"}
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "draft": 0} | settings
    return ensemble.generate(prompts, **given), list(FarBackend.events)


STEP = ["ask far", "ask main", "wait main", "wait far"]


class TestOrder:
    def test_before_the_main_model(self, pair: Ensemble) -> None:
        """The prompt too: both read it at the same time."""
        assert events(pair)[1] == STEP * NEW

    def test_members_here_are_asked_when_they_are_needed(self, members: list[Member]) -> None:
        """They begin before the one elsewhere is waited for."""
        order = ["ask far", "ask main", "wait main", "ask near", "wait far", "wait near"]
        found = events(Ensemble(members, **LOUD, boundary_aware=False))[1]
        assert sorted(found) == sorted(order * NEW)
        steps = [found[i : i + len(order)] for i in range(0, len(found), len(order))]
        for step in steps:
            assert step[:4] == order[:4]

    def test_nobody_is_elsewhere(self, pair: Ensemble) -> None:
        pair.generate(PROMPT, max_new_tokens=2, draft=0)
        assert FarBackend.events == ["ask main", "wait main", "ask far", "wait far"] * 2

    def test_of_which_only_the_most_probable_tokens_are_seen(self, members: list[Member]) -> None:
        """As of a server: what wraps a backend passes on where it is."""
        hidden = replace(members[1], backend=TopKOnly(members[1].backend, 40))
        assert events(Ensemble([members[0], hidden], **LOUD))[1] == STEP * NEW

    def test_each_token_of_a_draft(self, pair: Ensemble) -> None:
        """Its answers come while the main model writes: nothing is left to be asked in the end."""
        found, calls = events(pair, draft=3)
        assert found.timings.drafted >= 3
        assert calls[:4] == STEP  # the first token of a text is written alone
        asked = [one for one in calls if one.startswith("ask")]
        assert asked == ["ask far", "ask main"] * (len(asked) // 2)
        assert {tuple(own) for _, own in FarBackend.positions} == {(1,)}

    def test_a_draft_whose_answers_are_late(self, pair: Ensemble) -> None:
        """Nobody waits for them in the middle: the rest is one question in the end."""
        FarBackend.reset()
        FarBackend.names = {"far"}
        FarBackend.ready = lambda: False
        found = pair.generate(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, draft=3)
        cycle = ["ask far", *["ask main", "wait main"] * 4, "wait far", "ask far", "wait far"]
        assert FarBackend.events[4 : 4 + len(cycle)] == cycle
        assert [own for name, own in FarBackend.positions if name == "far"][1:3] == [[1], [3]]
        assert found.token_ids == events(pair)[0].token_ids

    def test_a_member_far_slower_than_the_main_model(self, pair: Ensemble) -> None:
        """It would be waited for twice a draft; that is measured, and it is asked once, in the end."""
        FarBackend.names, FarBackend.seconds = {"far"}, 0.05
        FarBackend.ready = lambda: False
        pair.generate(PROMPT, max_new_tokens=30, min_new_tokens=30, draft=3)
        cycles = "".join({"ask far": "f", "ask main": "m"}.get(one, "") for one in FarBackend.events)
        assert cycles.startswith("fm" + "fmmmmf")  # ahead, and the rest
        assert cycles.count("mmmmf") > 4
        assert "mmmmfmmmmfmmmmf" in cycles

    def test_what_another_drafter_offers(self, members: list[Member]) -> None:
        """The one that writes is not asked beside; another one is asked before the main model reads."""
        trio = Ensemble(members, **LOUD)
        want = events(trio)[0].token_ids
        for drafter in ("near", "far", "lookup"):
            found, calls = events(trio, draft=3, drafter=drafter)
            assert found.token_ids == want
            first = calls[calls.index("wait far") + 1 :]
            assert ("ask far" in first[: first.index("ask main")]) or drafter == "lookup"


class TestWhatIsSpared:
    def test_a_skip_is_not_done_away_with(self, pair: Ensemble) -> None:
        """Of places that need no assistant nobody is asked; but the prompt is read in any case."""
        for settings in ({"certified_skip": True}, {"confidence_gate": 0.8}):
            ensemble = pair.variant(learning_rate=0.31) if "certified_skip" in settings else pair
            found, calls = events(ensemble, **settings)
            skipped = found.timings.settled + found.timings.gated
            assert 0 < skipped < NEW
            assert calls[:2] == ["ask far", "ask main"]  # the prompt
            assert NEW - skipped <= calls.count("ask far") <= NEW - skipped + 1
            assert all(calls[i - 1] == "wait main" for i, one in enumerate(calls) if i and one == "ask far")
            FarBackend.names = set()
            again = ensemble.generate(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, draft=0, **settings)
            assert found.token_ids == again.token_ids

    def test_with_drafts_what_is_known_to_be_needed_is_asked_at_once(self, pair: Ensemble) -> None:
        """While the main model writes on; and nothing is asked twice."""
        found, calls = events(pair, draft=3, confidence_gate=0.8)
        assert found.token_ids == events(pair, confidence_gate=0.8)[0].token_ids
        asked = [i for i, one in enumerate(calls) if one == "ask far"]
        beside = [i for i in asked if calls[i - 1 : i + 2] == ["wait main", "ask far", "ask main"]]
        assert len(beside) >= 3
        assert len(asked) < calls.count("ask main")

    def test_a_member_is_drawn(self, members: list[Member]) -> None:
        """Nobody is asked before it is drawn."""
        drawn = Ensemble(members[:2], fuser="draw", cache=False)
        calls = events(drawn, do_sample=True, seed=3)[1]
        assert calls[:2] == ["ask far", "ask main"]
        assert 0 < calls.count("ask far") < NEW
        at = [i for i, one in enumerate(calls) if one == "ask far"][1:]
        assert all(calls[i - 1] == "wait main" for i in at)


class TestFailures:
    @pytest.mark.parametrize("error", [ModelError, InputError, MemberLost, KeyboardInterrupt])
    @pytest.mark.parametrize("draft", [0, 3])
    def test_of_the_main_model_while_an_answer_is_under_way(
        self, pair: Ensemble, error: type[BaseException], draft: int
    ) -> None:
        """The answer is waited for, and dropped; an interrupt waits for nothing."""
        calls = 0

        def broken(name: str) -> None:
            nonlocal calls
            calls += name == "main"
            if calls == 6:
                raise MemberLost("main", "gone") if error is MemberLost else error("out of luck")

        FarBackend.names = {"far"}
        FarBackend.broken = broken
        with pytest.raises(error):
            pair.generate(PROMPT, max_new_tokens=NEW, draft=draft)
        if error is KeyboardInterrupt:
            for one in FarBackend.sessions:
                one.under_way = False
        FarBackend.broken = lambda name: None
        FarBackend.names = set()
        want = pair.generate(PROMPT, max_new_tokens=NEW, draft=0).token_ids
        assert events(pair, min_new_tokens=0)[0].token_ids == want

    def test_closed_in_the_middle(self, pair: Ensemble) -> None:
        FarBackend.names = {"far"}
        for draft in (0, 3):
            run = pair.start([PROMPT, PROMPT[:20]], max_new_tokens=NEW, draft=draft)
            for _ in range(3):
                next(iter(run))
            run.close()
            assert all(one.closed and not one.under_way for one in FarBackend.sessions)

    @pytest.mark.parametrize("way", ["start", "stream"])
    def test_closed_by_another_thread_in_a_step(self, pair: Ensemble, way: str) -> None:
        """Its reader takes what the step gave, and reads no further."""
        FarBackend.names = {"far"}
        inside, closed = threading.Event(), threading.Event()

        def waiting(name: str) -> None:
            if name == "far" and not inside.is_set():
                inside.set()
                assert closed.wait(20)

        reading = getattr(pair, way)(PROMPT, max_new_tokens=NEW, draft=0)
        FarBackend.broken = waiting
        reader = threading.Thread(target=next, args=(iter(reading),))
        try:
            reader.start()
            assert inside.wait(20)
            reading.close()
            closed.set()
            reader.join(20)
        finally:
            FarBackend.broken = lambda name: None
        assert FarBackend.sessions
        assert all(one.closed for one in FarBackend.sessions)
        assert list(reading) == []
