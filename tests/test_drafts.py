"""Drafts: what they cost and gain as measured, who writes them, what is asked for, what is said of them."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import AWKWARD

from deepen_ext import Ensemble, InputError
from deepen_ext.decoding.drafts.draft_settings import LONGEST, LOOKUP, MAIN, DraftSettings
from deepen_ext.decoding.drafts.lookup import PromptLookup
from deepen_ext.decoding.drafts.pace import Pace, Plan, begins_alike
from deepen_ext.decoding.generation import Timings
from deepen_ext.decoding.observed.acceptance import Acceptance
from deepen_ext.decoding.observed.costs import Costs
from deepen_ext.decoding.observed.history import FUSION, History
from deepen_ext.decoding.open_run import OpenRun
from deepen_ext.decoding.places import Ahead
from deepen_ext.decoding.prompts import read_prompts
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.settings import Settings
from deepen_ext.members.member import Member

PROMPT = "The history of tea begins in ancient China, where, it is said, leaves from a wild tree blew into"


@pytest.fixture(scope="module")
def pair(tiny_smollm2: Member, tiny_gemma: Member) -> Ensemble:
    return Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen", learning_rate=1.0)


class Spy:
    """A backend that keeps what its sessions are asked."""

    def __init__(self, member: Member) -> None:
        self.asked: list[tuple[dict[int, list[int]], dict[int, int]]] = []
        self._backend = member.backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def open(self, lanes: int = 1, capacity: int = 0) -> Any:
        return _SpySession(self, self._backend.open(lanes, capacity))

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The ids before every position that was asked for."""
        return [
            tuple(ids[: len(ids) - left])
            for targets, positions in self.asked
            for lane, ids in targets.items()
            for left in range(positions[lane])
        ]


class _SpySession:
    def __init__(self, spy: Spy, session: Any) -> None:
        self._spy = spy
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def ask(self, targets: Mapping[int, Sequence[int]], k: int, positions: Any = 1) -> Any:
        each = positions if isinstance(positions, Mapping) else dict.fromkeys(targets, positions)
        self._spy.asked.append(({lane: list(ids) for lane, ids in targets.items()}, dict(each)))
        return self._session.ask(targets, k, positions)


def watched(ensemble: Ensemble) -> tuple[Ensemble, list[Spy]]:
    """The ensemble again, of members whose backends keep what they are asked."""
    spies = [Spy(one) for one in ensemble.members]
    members = [replace(one, backend=spy) for one, spy in zip(ensemble.members, spies, strict=True)]
    return Ensemble(members, fuser="deepen", learning_rate=1.0), spies


class TestCosts:
    def test_nothing_is_known(self) -> None:
        assert Costs().ms(1, 1) is None
        costs = Costs()
        costs.add(1, 2, 5.0)
        assert costs.ms(1, 2) is None  # of one token nothing is known: no width can be compared with it
        assert costs.ms(4, 1) is None

    def test_what_a_number_of_lanes_lacks_is_taken_from_the_nearest(self) -> None:
        costs = Costs()
        costs.add(15, 1, 10.0)
        costs.add(2, 1, 1.0)
        costs.add(16, 2, 20.0)
        assert [costs.ms(16, width) for width in (1, 2, 3)] == [10.0, 20.0, 30.0]

    def test_a_width_that_nearly_as_many_lanes_know_is_taken_in_proportion(self) -> None:
        """So not every number of lanes tries it, as texts of a batch end one after the other."""
        costs = Costs()
        for width, ms in ((1, 10.0), (2, 25.0), (3, 30.0)):
            costs.add(16, width, ms)
        for lanes in (1, 13):
            costs.add(lanes, 1, 8.0)
        assert [costs.ms(13, width) for width in (1, 2, 3)] == [8.0, 20.0, 24.0]
        costs.add(13, 3, 40.0)
        assert [costs.ms(13, width) for width in (2, 3)] == [20.0, 40.0]
        assert [costs.ms(1, width) for width in (1, 2)] == [8.0, 8.0]  # it may be another matter: it is tried

    def test_in_proportion_to_nothing_is_as_it_is(self) -> None:
        """On CUDA what is no member's takes 0 ms: each member gets its share of all."""
        costs = Costs()
        costs.add(5, 1, 0.0)
        costs.add(5, 2, 0.5)
        costs.add(4, 1, 0.0)
        assert [costs.ms(4, width) for width in (1, 2, 3)] == [0.0, 0.5, 1.0]

    def test_what_is_old_counts_no_more(self) -> None:
        costs = Costs()
        for _ in range(3):
            costs.add(1, 1, 900.0)
        for _ in range(64):
            costs.add(1, 2, 12.0)
        assert costs.ms(1, 1) == 900.0
        costs.add(1, 1, 10.0)
        assert costs.ms(1, 1) == 10.0

    def test_a_width_is_tried_up_to_twice_the_largest_known(self) -> None:
        costs = Costs()
        costs.add(1, 1, 10.0)
        assert [costs.ms(1, width) for width in (1, 2, 3)] == [10.0, 10.0, math.inf]
        costs.add(1, 2, 14.0)
        assert [costs.ms(1, width) for width in (2, 3, 4, 5)] == [14.0, 18.0, 22.0, math.inf]
        costs.add(1, 8, 20.0)
        assert [costs.ms(1, width) for width in (5, 8, 16, 17)] == [17.0, 20.0, 28.0, math.inf]

    def test_a_wider_pass_that_was_faster_is_no_gain_by_width(self) -> None:
        costs = Costs()
        costs.add(1, 1, 10.0)
        costs.add(1, 4, 8.0)
        assert [costs.ms(1, width) for width in (2, 3, 8)] == [10.0, 10.0, 10.0]

    def test_the_median_of_the_last_measurements(self) -> None:
        costs = Costs()
        for ms in (10.0, 500.0, 11.0):
            costs.add(1, 1, ms)
        assert costs.ms(1, 1) == 11.0
        for _ in range(7):
            costs.add(1, 1, 20.0)
        assert costs.ms(1, 1) == 20.0

    def test_other_numbers_of_lanes_take_the_nearest(self) -> None:
        costs = Costs()
        costs.add(1, 1, 10.0)
        costs.add(8, 1, 30.0)
        assert [costs.ms(lanes, 1) for lanes in (1, 2, 7, 8, 32)] == [10.0, 10.0, 30.0, 30.0, 30.0]
        costs.add(2, 3, 1.0)  # without a width of 1, two lanes are as good as not measured
        assert costs.ms(1, 1) == 10.0

    @pytest.mark.parametrize(("measured", "kept"), [(1, False), (2, False), (3, True)])
    def test_a_width_that_was_measured_once_or_twice_is_tried_again_some_time(self, measured, kept) -> None:
        """What it took then may have been a disturbance."""
        costs = Costs()
        costs.add(1, 1, 10.0)
        for _ in range(measured):
            costs.add(1, 2, 900.0)
        for _ in range(64):
            costs.add(1, 1, 10.0)
        assert costs.ms(1, 2) == 900.0
        for _ in range(2):
            costs.add(1, 1, 10.0)
        assert costs.ms(1, 2) == (900.0 if kept else 10.0)


class TestAcceptance:
    def test_before_anything_is_known(self) -> None:
        acceptance = Acceptance()
        assert acceptance.mean == 0.5
        assert 0.5 <= acceptance.chance(0.0) < 0.55
        assert 0.95 < acceptance.chance(0.99) <= 1
        chances = [acceptance.chance(margin / 20) for margin in range(21)]
        assert chances == sorted(chances)

    def test_it_is_counted_by_margin(self) -> None:
        acceptance = Acceptance()
        for i in range(400):
            acceptance.see(0.95, stood=True)
            acceptance.see(0.15, stood=i % 4 == 0)
        assert acceptance.chance(0.92) > 0.99
        assert acceptance.chance(0.12) == pytest.approx(0.25, abs=0.02)
        assert acceptance.chance(0.5) == Acceptance().chance(0.5)
        assert acceptance.mean == pytest.approx(0.625, abs=0.02)

    def test_what_was_seen_long_ago_fades(self) -> None:
        acceptance = Acceptance()
        for _ in range(1000):
            acceptance.see(0.6, stood=True)
        assert acceptance.chance(0.6) > 0.99
        for _ in range(400):
            acceptance.see(0.6, stood=False)
        assert acceptance.chance(0.6) < 0.15
        assert acceptance.mean < 0.15


def history_of(*, write: float, read: float, more: float, agrees: bool) -> History:
    """A main model that writes in `write` ms; an assistant that reads one token in `read` ms and each further
    one in `more` ms. Whether the drafts of everybody stood."""
    history = History()
    for width in (1, 2, 4, 8, 16, 33):
        history.cost(MAIN).add(1, width, write)
        history.cost(1).add(1, width, read + (width - 1) * more)
        history.cost(FUSION).add(1, width, 0.1)
    for drafter in (MAIN, LOOKUP, 1):
        for _ in range(300):
            for margin in (0.0, 0.5, 0.99):
                history.accepted(drafter).see(margin, agrees)
    return history


def pace_of(history: History, drafters: Sequence[int] = (MAIN,), length: int | None = None) -> Pace:
    team: Any = SimpleNamespace(
        histories={False: history, True: History()},
        members=["main", "assistant"],
        device=torch.device("cpu"),
    )
    return Pace(team, DraftSettings(length, tuple(drafters)), sampled=False, at_once=False)


def draft_of(places: int, *, margin: float = 0.99, is_open: bool = True, lanes: int = 1) -> Any:
    one = SimpleNamespace(margin=margin, place=SimpleNamespace(is_open=is_open))
    return {number: [one] * places for number in range(lanes)}


def places_written(pace: Pace, length: int | None = None, **draft: Any) -> int:
    return next(n for n in range(1, 100) if not pace.goes_on(draft_of(n, **draft), [0], length))


def learn(pace: Pace, places: Sequence[tuple[bool, int, int | None]], drafter: int = MAIN) -> None:
    """A cycle of one text: of each place, whether it was open, the token written, and the one on offer."""
    draft: Any = [
        SimpleNamespace(
            margin=0.9, offered=offered, own=None, token=7, place=SimpleNamespace(text=0, is_open=is_open)
        )
        for is_open, _, offered in places
    ]
    accepted: Any = [
        SimpleNamespace(proposal=one, token=token, row=i)
        for i, (one, (_, token, _)) in enumerate(zip(draft, places, strict=True))
    ]
    step: Any = SimpleNamespace(fused=SimpleNamespace(logits=torch.zeros(1, 1), parts=[None]), members_ms={})
    pace._team.main = SimpleNamespace(vocabulary=SimpleNamespace(bytes_of=lambda token: b"x"))
    pace.learn(Ahead({0: draft}, drafter), step, accepted, verified_ms=1.0, cycle_ms=1.0)


def test_texts_that_may_go_on_alike() -> None:
    assert begins_alike(b" straw", b" strawberries")
    assert begins_alike(b" strawberries", b" straw")
    assert not begins_alike(b" straw", b" strong")
    assert not begins_alike(b" straw", b"")  # a special token
    assert not begins_alike(b"", b"")


class TestPace:
    def test_drafts_that_never_pay(self) -> None:
        dear = history_of(write=10, read=10, more=12, agrees=True)
        assert places_written(pace_of(dear)) == 1
        wrong = history_of(write=10, read=30, more=0, agrees=False)
        assert places_written(pace_of(wrong)) == 1
        free = history_of(write=10, read=0.2, more=0, agrees=True)
        assert places_written(pace_of(free), margin=0.6) == 1  # there is nothing to save
        for read, pays in ((0.5, False), (2, True)):  # by less than a tenth, and by more
            little = history_of(write=10, read=read, more=0, agrees=True)
            assert (places_written(pace_of(little)) > 1) == pays
        rarely = history_of(write=10, read=40, more=0, agrees=True)
        assert places_written(pace_of(rarely)) > 1
        rarely.opened = (0.1, 10.0)  # of a hundred tokens, one that an assistant could change
        assert places_written(pace_of(rarely)) == 1

    def test_drafts_that_always_pay(self) -> None:
        pace = pace_of(history_of(write=10, read=40, more=0, agrees=True))
        assert places_written(pace) == LONGEST + 1
        assert 1 < places_written(pace_of(history_of(write=10, read=40, more=4, agrees=True))) <= LONGEST + 1

    def test_the_less_sure_the_shorter(self) -> None:
        history = history_of(write=10, read=30, more=0, agrees=True)
        for i in range(600):
            history.accepted(MAIN).see(0.25, stood=i % 10 < 6)
        pace = pace_of(history)
        assert 1 < places_written(pace, margin=0.25) < places_written(pace, margin=0.99)

    def test_nothing_is_known(self) -> None:
        assert pace_of(History(), (MAIN, LOOKUP, 1)).plan(1, [5]) == Plan(MAIN, 0)
        assert not pace_of(History()).goes_on(draft_of(1), [0], None)

    def test_a_length_that_was_asked_for(self) -> None:
        """Measurements do not count then, nor do places that need no verification."""
        pace = pace_of(history_of(write=10, read=0, more=10, agrees=False), length=3)
        assert pace.plan(1, []) == Plan(MAIN, 3)
        assert places_written(pace, 3) == 4
        assert pace.goes_on(draft_of(50, is_open=False), [0], 3)
        lookup = pace_of(History(), (LOOKUP,), length=5)
        assert lookup.plan(1, [2]) == Plan(LOOKUP, 5)

    def test_another_drafter_is_taken_where_it_is_clearly_cheaper(self) -> None:
        history = history_of(write=40, read=4, more=0, agrees=True)
        assert pace_of(history).plan(1, []) == Plan(MAIN, None)
        by_member = pace_of(history, (MAIN, 1))
        assert by_member.plan(1, []) == Plan(1, 1)
        by_member._longest[1] = 8
        plan = by_member.plan(1, [])
        assert plan.drafter == 1
        assert plan.length is not None
        assert plan.length > 1
        looking = pace_of(history, (MAIN, LOOKUP))
        assert looking.plan(1, [6]) == Plan(LOOKUP, 1)
        looking._longest[LOOKUP] = 8
        assert looking.plan(1, [6]) == Plan(LOOKUP, 6)
        assert looking.plan(1, [0]) == Plan(MAIN, None)
        assert looking.plan(10, [1] * 10) == Plan(LOOKUP, 1)
        assert looking.plan(10, [1] + [0] * 9) == Plan(MAIN, None)  # the others get one token each
        assert pace_of(history, (MAIN, LOOKUP, 1)).plan(1, [8]).drafter == LOOKUP  # its tokens cost nothing
        # What it would have written stood; what it wrote did not.
        for _ in range(40):
            history.saw_offer(1, False)
        assert by_member.plan(1, []) == Plan(MAIN, None)
        history.forget_offers(500)
        assert by_member.plan(1, []).drafter == 1
        # What it said while it wrote it need not read again.
        dear = history_of(write=40, read=30, more=0, agrees=True)
        assert pace_of(dear, (1,)).plan(1, []) == Plan(1, 1)

    def test_what_others_offer_grows_while_it_stands(self) -> None:
        pace = pace_of(history_of(write=10, read=10, more=1, agrees=True), (1,))
        lengths = []
        for stood in ([True], [True] * 2, [True] * 4, [True] * 8, [True] * 3 + [False] * 2, [False]):
            learn(pace, [(True, 7, 7 if one else 8) for one in stood], drafter=1)
            lengths.append(pace._longest[1])
        assert lengths == [2, 4, 8, 8, 3, 1]

    def test_what_nobody_was_asked_about_is_read_with_the_next_draft(self) -> None:
        pace = pace_of(history_of(write=10, read=10, more=1, agrees=True))
        for asked, width in (([False, False], 3), ([False], 4), ([False, True, False], 2), ([True], 1)):
            learn(pace, [(one, 7, None) for one in asked])
            assert pace._width(draft_of(1)) == width

    def test_another_drafter_is_left_where_it_is_not(self) -> None:
        wrong = history_of(write=40, read=4, more=0, agrees=False)
        assert pace_of(wrong, (MAIN, LOOKUP, 1)).plan(1, [8]) == Plan(MAIN, None)
        slow = history_of(write=4, read=40, more=0, agrees=True)
        slow.spent[1] = (160.0, 20.0)
        assert pace_of(slow, (MAIN, 1)).plan(1, []) == Plan(MAIN, None)
        # Its own drafts were never tried, and would be the cheapest.
        untried = history_of(write=10, read=40, more=0, agrees=True)
        assert pace_of(untried, (MAIN, 1)).plan(1, []) == Plan(MAIN, None)
        # Drafts of the main model made a token that cheap already.
        history = history_of(write=40, read=4, more=0, agrees=True)
        history.spent[1] = (100.0, 20.0)
        assert pace_of(history, (MAIN, 1)).plan(1, []) == Plan(MAIN, None)

    def test_now_and_then_a_cycle_has_no_draft(self) -> None:
        """Or what a token costs without drafts would stay what it once was."""
        pace = pace_of(history_of(write=10, read=40, more=0, agrees=True))
        step: Any = SimpleNamespace(
            fused=SimpleNamespace(logits=torch.zeros(1, 1), parts=[None]), members_ms={}
        )
        plans = []
        for _ in range(40):
            plans.append(pace.plan(1, []).length)
            ahead = Ahead({0: []}, MAIN, drafted=0 if plans[-1] == 0 else 2)
            pace.learn(ahead, step, [], verified_ms=1.0, cycle_ms=1.0)
        assert plans.count(0) == 2
        assert plans[16] == plans[33] == 0

    def test_threads_may_share_what_is_known(self) -> None:
        """Each has a run of its own; what their runs find out is the team's."""
        history = History()
        step: Any = SimpleNamespace(
            fused=SimpleNamespace(logits=torch.zeros(1, 1), parts=[None]), members_ms={"assistant": 1.0}
        )

        def run(seed: int) -> int:
            rng, pace = random.Random(seed), pace_of(history, (MAIN, LOOKUP, 1))
            for _ in range(400):
                lanes, places = rng.randint(1, 500), rng.randint(1, 4)
                ahead = Ahead(draft_of(places, lanes=lanes), MAIN)
                pace.plan(lanes, [3] * lanes)
                pace.read(lanes, places, rng.random())
                pace.goes_on(ahead.drafts, [0], None)
                pace.learn(ahead, step, [], verified_ms=rng.random() + 1, cycle_ms=2.0)
            return seed

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(run, range(4))) == [0, 1, 2, 3]
        finally:
            sys.setswitchinterval(before)

    def test_without_the_main_model_there_may_be_no_draft(self) -> None:
        wrong = history_of(write=40, read=4, more=0, agrees=False)
        assert pace_of(wrong, (1,)).plan(1, []) == Plan(MAIN, 0)


class TestPromptLookup:
    def test_what_followed_the_last_time(self) -> None:
        lookup = PromptLookup()
        text = [1, 2, 3, 10, 11, 1, 2, 3]
        assert lookup.find(text, 4) == [10, 11, 1, 2]
        assert lookup.find(text, 1) == [10]
        text += [20, 21, 1, 2, 3]
        assert lookup.find(text, 3) == [20, 21, 1]  # later than the 10

    def test_nothing_came_before(self) -> None:
        lookup = PromptLookup()
        assert lookup.find([], 4) == []
        assert lookup.find([1, 2], 4) == []
        assert lookup.find([1, 2, 3], 4) == []
        assert lookup.find([1, 2, 3, 4, 2, 3], 4) == []  # two of three

    def test_a_text_that_repeats_itself(self) -> None:
        assert PromptLookup().find([7] * 6, 4) == [7]  # no further than the text goes


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"draft": "often"}, "draft is 'often'; give 'auto', 0 for no drafts, or a number"),
            ({"draft": -1}, r"draft \(or give 'auto'\) is -1; choose 0 to 32"),
            ({"draft": 33}, "33; choose 0 to 32"),
            ({"draft": 2.5}, "2.5; give a whole number"),
            ({"draft": True}, "True; give a whole number"),
            ({"drafter": "nobody"}, "drafter is 'nobody'; give 'auto', 'main', 'lookup' or.*tiny-gemma"),
            ({"drafter": ""}, "drafter is ''"),
        ],
    )
    def test_what_does_not_fit(self, pair, settings, message) -> None:
        with pytest.raises(InputError, match=message):
            pair.generate(PROMPT, max_new_tokens=2, **settings)

    def test_who_may_write(self, pair) -> None:
        def drafters(draft: Any, drafter: str) -> DraftSettings:
            return DraftSettings.read(pair.team, draft, drafter)

        assert drafters("auto", "auto") == DraftSettings(None, (MAIN, LOOKUP, 1))
        assert drafters(None, "auto") == drafters("auto", "auto")  # both members are repeatable
        assert drafters(4, "auto") == DraftSettings(4, (MAIN,))
        assert drafters(4, "lookup") == DraftSettings(4, (LOOKUP,))
        assert drafters("auto", "tiny-gemma") == DraftSettings(None, (1,))
        assert drafters(4, "tiny-smollm2") == drafters(4, "main") == DraftSettings(4, (MAIN,))

    def test_alone_a_model_saves_nothing_by_drafts_of_its_own(self, pair) -> None:
        team = pair.variant(fuser="single").team
        assert DraftSettings.read(team, 4, "auto") == DraftSettings(4, (LOOKUP,))
        assert DraftSettings.read(team, 0, "main") == DraftSettings(0, (MAIN,))
        for drafter in ("main", "tiny-smollm2"):
            for draft in (4, "auto"):
                with pytest.raises(InputError, match=f"'{drafter}', and tiny-smollm2 writes alone"):
                    DraftSettings.read(team, draft, drafter)


class TestWhatIsSaid:
    def test_acceptance(self) -> None:
        assert Timings().acceptance == 0
        assert Timings(drafted=8, stood=6).acceptance == 0.75

    @pytest.mark.parametrize("skip", [False, True])
    def test_the_trace(self, pair, skip) -> None:
        """Written by the main model, a token stands where it is the main model's own choice."""
        records: list[dict[str, Any]] = []
        settings = {"max_new_tokens": 60, "certified_skip": skip, "draft": 3}
        ensemble = pair.variant(learning_rate=0.1) if skip else pair
        found = ensemble.generate(PROMPT, **settings, trace=records.append)
        fates = Counter(one["draft"] for one in records)
        assert min(fates[None], fates["stood"], fates["replaced"]) > 0
        assert (fates["settled"] > 0) == skip
        for one in records:
            own = one["token"] == one["main_choice"]
            if one["draft"] is not None:
                assert own == (one["draft"] != "replaced")
            assert (one["draft"] == "settled") == (one["not_asked"] == "settled")
        timings = found.timings
        assert fates["settled"] == timings.settled
        assert fates["stood"] <= timings.stood <= fates["stood"] + fates["settled"]
        if not skip:  # a cycle ends with a token that was replaced, or that no draft went on with
            assert timings.stood == fates["stood"]
            assert timings.steps == fates["replaced"] + fates[None]

    @pytest.mark.parametrize("members", [1, 2])
    def test_the_main_model_guesses_where_somebody_looks(self, pair, members, monkeypatch) -> None:
        """What it would draw costs as much as the choice itself."""
        fuser = {1: "single", 2: "deepen"}[members]
        ensemble = Ensemble(pair.members[:members], fuser=fuser, learning_rate=1.0)
        guessed: list[int] = []
        propose = Chooser.propose

        def counted(chooser: Chooser, scores: torch.Tensor, *more: Any) -> torch.Tensor:
            guessed.append(len(scores))
            return propose(chooser, scores, *more)

        monkeypatch.setattr(Chooser, "propose", counted)
        settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "seed": 3}
        texts, guesses = [], {}
        ways = [(0, "auto"), (4, "lookup")] + [(4, "main")] * (members > 1)  # alone, "main" is refused
        for draft, drafter in ways:
            guessed.clear()
            texts.append(ensemble.generate(PROMPT, draft=draft, drafter=drafter, **settings).text)
            guesses[drafter] = len(guessed)
        assert guesses["auto"] == 0
        assert members == 1 or guesses["main"] > 0
        assert guesses["lookup"] > 0
        assert len(set(texts)) == 1

    def test_without_drafts(self, pair) -> None:
        records: list[dict[str, Any]] = []
        found = pair.generate(PROMPT, max_new_tokens=10, draft=0, trace=records.append)
        assert {one["draft"] for one in records} == {None}
        assert found.timings.drafted == found.timings.stood == 0
        assert found.timings.steps == 10


class TestWhatIsAsked:
    @pytest.mark.parametrize("drafter", ["auto", "main", "lookup", "tiny-gemma"])
    def test_the_first_token_is_written_alone(self, pair, drafter) -> None:
        """It is not to wait for others: one forward of each member, of one position."""
        ensemble, spies = watched(pair)
        for draft in ("auto", 8):
            run = ensemble.start(PROMPT, max_new_tokens=20, draft=draft, drafter=drafter)
            written = next(run.__iter__())
            assert len(written) == 1
            for spy in spies:
                assert [positions for _, positions in spy.asked] == [{0: 1}]
                spy.asked.clear()
            run.close()

    def test_the_first_token_of_a_text_that_waited(self, pair) -> None:
        ensemble, spies = watched(pair)
        run = ensemble.start([PROMPT, "Once", "def f(x):"], max_new_tokens=9, draft=3, batch_size=2)
        begun: set[int] = set()
        for written in run:
            new = {one.number for one in written} - begun
            if new:
                assert len(spies[0].asked) == 1
                assert set(spies[0].asked[0][1].values()) == {1}
                assert len(written) == 2
            begun |= new
            spies[0].asked.clear()
        assert begun == {0, 1, 2}

    def test_four_places_are_one_question(self, pair) -> None:
        ensemble, spies = watched(pair)
        found = ensemble.generate(PROMPT, max_new_tokens=40, draft=3)
        assert len(spies[1].asked) <= found.timings.steps + 3  # more where a token reaches across a place
        assert max(max(positions.values()) for _, positions in spies[1].asked) >= 4
        plain = pair.generate(PROMPT, max_new_tokens=40, draft=0)
        assert found.token_ids == plain.token_ids

    def test_where_an_assistants_token_reaches_across_a_place(self, pair) -> None:
        """The main model goes on in two tokens with what is one of the assistant's."""
        main, gemma = (one.vocabulary for one in pair.members)
        parts = [main.tokens.index(b" straw"), main.tokens.index(b"berries")]
        assert len(gemma.encode(" strawberries")) == 1
        bias = {(parts[0],): 30.0, tuple(parts): 30.0}
        settings = {"max_new_tokens": 9, "sequence_bias": bias}
        ensemble, spies = watched(pair.variant())
        unaware = ensemble.variant(boundary_aware=False)  # else it would sit out there
        plain = unaware.generate(PROMPT, draft=0, **settings)
        assert "strawberries" in plain.text
        for spy in spies:
            spy.asked.clear()
        found = unaware.generate(PROMPT, draft=8, **settings)
        assert (found.text, found.token_ids) == (plain.text, plain.token_ids)
        assert found.timings.stood > 4
        assert len(spies[1].asked) > found.timings.steps
        texts = [gemma.decode(list(ids[-1:])) for ids in spies[1].texts]
        assert {b" straw", b" strawberries"} <= set(texts)

    def test_a_member_that_drafts_is_not_asked_again(self, pair) -> None:
        ensemble, spies = watched(pair)
        run = ensemble.start(PROMPT, max_new_tokens=40, draft=3, drafter="tiny-gemma")
        verified_by_itself = 0
        for _ in run:
            texts = spies[1].texts
            assert len(texts) == len(set(texts)) <= 4  # as it writes, and what follows its last token
            verified_by_itself += len(texts) == 4
            spies[1].asked.clear()
        assert verified_by_itself > 1  # drafts that stood to their end, but for the place after it
        assert run.timings.stood > 5
        assert run.results()[0].token_ids == pair.generate(PROMPT, max_new_tokens=40, draft=0).token_ids

    @pytest.mark.parametrize("fuser", ["union-vocab", "follow"])
    def test_the_draft_of_an_assistant_that_counts_more_is_followed(
        self, tiny_smollm2: Member, tiny_gemma: Member, fuser: str
    ) -> None:
        """Also where the main model would write something else, which is where it used to end.

        At some places the assistant keeps a part of its weight: its last token may be unfinished there.
        """
        ensemble = Ensemble([tiny_smollm2, tiny_gemma], fuser=fuser, weights=[0.1, 0.9])
        records: list[dict[str, Any]] = []
        plain = ensemble.generate(PROMPT, max_new_tokens=40, draft=0, trace=records.append)
        assert {one["members"][0]["weight"] > 0.100001 for one in records} == {True, False}
        found = ensemble.generate(PROMPT, max_new_tokens=40, draft=4, drafter="tiny-gemma")
        assert found.token_ids == plain.token_ids
        assert plain.changed_tokens > 20
        assert found.timings.steps < 16  # 26 where it ends there
        assert found.timings.stood > 20


class TestEnds:
    @staticmethod
    def forced(pair, text: list[int]) -> Any:
        """A processor that has these tokens written."""
        start = len(pair.members[0].vocabulary.encode(PROMPT))

        def force(ids, scores):
            scores[:, text[ids.shape[1] - start]] = 1e4
            return scores

        return force

    @pytest.mark.parametrize("ends", ["stopping_criteria", "eos"])
    def test_with_part_of_a_character_in_place_of_a_drafted_token(self, pair, ends) -> None:
        """What was drafted after it is dropped, and the part shows as U+FFFD."""
        part, word = pair.members[0].vocabulary.encode("🙂")[0], pair.members[0].vocabulary.encode(" tea")[0]
        forced = [word, word, part, word] if ends == "stopping_criteria" else [word, word, part, 2]

        def stop(ids, scores):
            return torch.tensor([ends == "stopping_criteria" and int(ids[0, -1]) == part])

        settings = {
            "max_new_tokens": 4,
            "logits_processor": [self.forced(pair, forced)],
            "stopping_criteria": [stop],
        }
        for draft in (0, 1, 3):
            found = pair.generate(PROMPT, draft=draft, **settings)
            assert (found.finish_reason, found.text) == (ends, " tea tea\ufffd")

    def test_before_a_drafted_part_of_a_character(self, pair) -> None:
        """The part was read ahead and is not of the text; a criterion sees the logits of its own token."""
        encode = pair.members[0].vocabulary.encode
        (milk,), (tea,), part, start = encode(" milk"), encode(" tea"), encode("🙂")[0], len(encode(PROMPT))
        # Not by a processor of the caller, of which drafts know nothing.
        bias = {
            (milk,): 40.0,
            (milk, tea): 80.0,
            (tea, milk): 80.0,
            (milk, tea, milk, part): 160.0,
            (part, part): 160.0,
        }
        seen: dict[int, list[torch.Tensor]] = {0: [], 3: []}
        for draft, scores_of in seen.items():

            def stop(ids, scores, scores_of=scores_of):
                scores_of.append(scores[0].clone())
                return torch.tensor([ids.shape[1] == start + 3])

            found = pair.generate(
                PROMPT, draft=draft, max_new_tokens=9, stopping_criteria=[stop], sequence_bias=bias
            )
            assert (found.finish_reason, found.text) == ("stopping_criteria", " milk tea milk")
        assert found.timings.drafted
        plain, drafted = map(torch.cat, seen.values())
        assert len(plain) == 3
        torch.testing.assert_close(drafted, plain, atol=0.02, rtol=0)

    @pytest.mark.parametrize("draft", [0, 1, 3])
    def test_a_model_end_that_does_not_end_the_text(self, pair, draft) -> None:
        """It has no text; the part of a character before it shows as U+FFFD."""
        part, word = pair.members[0].vocabulary.encode("🙂")[0], pair.members[0].vocabulary.encode(" tea")[0]
        (end,) = pair.members[0].eos_ids
        text = [word, end, part, end, word]
        found = pair.generate(
            PROMPT,
            draft=draft,
            max_new_tokens=5,
            eos_token_id=[word + 1],
            logits_processor=[self.forced(pair, text)],
        )
        assert found.token_ids == text
        assert found.text == " tea\ufffd tea"

    @pytest.mark.parametrize("tokens", [1, 2, 3])
    def test_of_a_text_that_cannot_go_on_beside_another(self, pair, tokens) -> None:
        """What was drafted of the other text, and not chosen, is not left in what its assistant reads."""
        main, assistant = pair.members
        start = len(main.vocabulary.encode(PROMPT))

        def forbid(ids, scores):
            return scores.fill_(-math.inf) if ids.shape[1] == start + tokens else scores

        plain = Settings.read(main, max_new_tokens=12)
        run = OpenRun(pair.team, plain, 2, chunk=64, drafts=DraftSettings(3, (MAIN,)))
        try:
            for settings in (plain, Settings.read(main, max_new_tokens=12, logits_processor=[forbid])):
                run.add(read_prompts(pair.members, [PROMPT], "error")[0], settings)
            written: list[int] = []
            failed = longer = False
            while run.busy:
                written += [one.token for one in run.step() if one.number == 0]
                failed |= bool(run.failures)
                if 0 not in run.ended():
                    text = PROMPT + "".join(run._texts[0].pieces)
                    whole = assistant.vocabulary.prefix_ids + assistant.vocabulary.encode(text)
                    assert run._assistants.texts[0].ids(0) == whole
                    longer |= failed
        finally:
            run.close()
        assert longer  # after the failure
        assert written == pair.generate(PROMPT, max_new_tokens=12).token_ids


class TestStreams:
    @pytest.mark.parametrize("draft", [0, 3, 8])
    def test_pieces(self, pair, draft) -> None:
        """Whole characters, in order, nothing after a stop."""
        ids = pair.members[0].vocabulary.encode(AWKWARD)
        assert "\ufffd" in pair.members[0].vocabulary.decode(ids[:2]).decode(errors="replace")
        # The last three tokens before: parts of characters are often the same ones.
        bias = {tuple(ids[max(0, i - 3) : i + 1]): 40.0 for i in range(len(ids))}
        settings = {"max_new_tokens": len(ids), "draft": draft, "sequence_bias": bias}
        prompt, stop = PROMPT, "です。 🙂🙃"
        whole = pair.generate(prompt, **settings)
        assert "日本の首都は東京です。 🙂🙃🫠 and" in whole.text
        assert (whole.timings.stood > 20) == (draft > 0)
        ended = pair.generate(prompt, **settings, stop_strings=[stop])
        assert ended.finish_reason == "stop_string"
        for more, wanted in (({}, whole), ({"stop_strings": [stop]}, ended)):
            pieces: list[str] = []
            given = pair.generate(prompt, **settings, **more, on_text=pieces.append)
            with pair.stream(prompt, **settings, **more) as stream:
                streamed = list(stream)
                assert stream.result.token_ids == wanted.token_ids
            assert "".join(pieces) == "".join(streamed) == given.text == wanted.text
            assert "\ufffd" not in "".join(pieces[:-1])
        assert whole.text.startswith(ended.text)
        assert ended.text.count(stop) == 1
