"""An engine that goes on for days: what one text or one lost member does to those that come later."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from losing_backend import backend_of
from running import until
from tiny_models import PROSE
from told import LOUD, Told, closed_runs, counted, submit

from deepen_ext import Ensemble
from deepen_ext.decoding.kept_lanes import KeptLanes
from deepen_ext.decoding.limits import NoRoom
from deepen_ext.decoding.open_run import OpenRun
from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.member import Member
from deepen_ext.serving import engine as engines
from deepen_ext.serving import running as runs
from deepen_ext.serving.engine import Busy, Engine
from deepen_ext.serving.requests import Ended, Failed, Prompted

CHUNK = 7


@pytest.fixture(scope="module")
def models(members: list[Member]) -> dict[str, Ensemble]:
    return {
        "deepen": Ensemble(members, fuser="deepen", on_failure="continue", **LOUD),
        "main": Ensemble(members[:1], fuser="single"),
    }


@pytest.fixture
def engine(models: dict[str, Ensemble]) -> Iterator[Engine]:
    with Engine(models, lanes=3, queue=100, prompt_chunk=CHUNK) as made:
        yield made


def ended(told: Told) -> Ended:
    last = told.wait().last
    assert isinstance(last, Ended), last
    return last


class TestALostAssistant:
    def test_is_told_of_texts_that_come_later_and_is_asked_again(
        self, engine: Engine, members: list[Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = backend_of(members[1])
        monkeypatch.setattr(runs, "_WITHOUT_TIMES", 0.0)
        alone = ended(submit(engine, decoding={"max_new_tokens": 8}))
        assert not alone.lost
        long = submit(engine, decoding={"max_new_tokens": 300}).begun()
        backend.arm(0)
        later = ended(submit(engine, decoding={"max_new_tokens": 8}))
        assert later.lost == {"assistant": 0}
        assert later.changed_tokens == 0
        backend.arm(None)
        passed = runs.monotonic
        monkeypatch.setattr(runs, "monotonic", lambda: passed() + 29)
        assert ended(submit(engine, decoding={"max_new_tokens": 8})).lost == {"assistant": 0}
        monkeypatch.setattr(runs, "monotonic", lambda: passed() + 60)
        again = ended(submit(engine, decoding={"max_new_tokens": 8}))  # while the long text goes on
        assert again == alone
        assert backend.calls
        assert 0 < ended(long).lost["assistant"] < 300

    def test_a_run_without_it_is_not_kept(
        self, engine: Engine, members: list[Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runs, "_WITHOUT_SECONDS", 0.1)
        backend_of(members[1]).arm(0)
        assert ended(submit(engine, decoding={"max_new_tokens": 2})).lost
        backend_of(members[1]).arm(None)
        assert until(lambda: not engine.load.bytes_held)

    def test_one_that_hangs_is_not_asked_again_at_once(
        self, engine: Engine, members: list[Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every text waits while a server's time limit runs out."""
        backend = backend_of(members[1])
        clock = [0.0]
        now = runs.monotonic
        monkeypatch.setattr(runs, "monotonic", lambda: now() + clock[0])
        step = OpenRun.step

        def slow_step(run: OpenRun, **given: Any) -> Any:
            lost = bool(run.lost)
            written = step(run, **given)
            clock[0] += 60 if run.lost and not lost else 0
            return written

        monkeypatch.setattr(OpenRun, "step", slow_step)
        backend.arm(0)
        for waited in (0, 500):
            clock[0] += waited
            assert ended(submit(engine, decoding={"max_new_tokens": 2})).lost
        assert clock[0] == 560  # it was lost once, and asked no more
        clock[0] += 200
        assert ended(submit(engine, decoding={"max_new_tokens": 2})).lost
        assert clock[0] == 820
        backend.arm(None)


class TestALongPrompt:
    def test_of_another_model_holds_nobody_up(self, engine: Engine) -> None:
        going = submit(engine, decoding={"max_new_tokens": 360}).begun()
        before = len(going.pieces)
        long = submit(engine, model="main", prompt=PROSE[:380], decoding={"max_new_tokens": 1})
        ended(long)
        assert len(going.pieces) - before >= 380 // CHUNK - 5
        ended(going)

    def test_is_read_piece_by_piece_where_nobody_writes(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So others can join, and one that nobody wants any more is not read to its end."""
        monkeypatch.setattr("deepen_ext.decoding.open_run._ALONE", 50)
        steps = _steps(monkeypatch)
        ended(submit(engine, prompt=PROSE[:390], decoding={"max_new_tokens": 1}))
        assert len(steps) == 8  # 390 tokens but for the last chunk, and the first token


def _steps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every step of a run."""
    found: list[None] = []
    step = OpenRun.step

    def noted(run: OpenRun, **given: Any) -> Any:
        found.append(None)
        return step(run, **given)

    monkeypatch.setattr(OpenRun, "step", noted)
    return found


def test_a_text_that_fills_its_context_leaves_room_for_others(engine: Engine) -> None:
    """Its new tokens count once, also when most of them are written."""
    full = submit(engine, prompt=PROSE[:100], decoding={"max_new_tokens": 300})
    while len(full.pieces) < 50:
        threading.Event().wait(0.002)
    assert ended(submit(engine, prompt="So", decoding={"max_new_tokens": 3})).completion_tokens == 3
    assert ended(full).completion_tokens == 300


class TestMemory:
    def test_a_prompt_is_read_and_told_once_while_its_text_waits(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ended(submit(engine, model="main", decoding={"max_new_tokens": 1}))  # its run has less room
        going = submit(engine, decoding={"max_new_tokens": 200}).begun()
        asks = threading.get_ident()

        def free(_: Any) -> int:
            return 1 << 40 if threading.get_ident() == asks or isinstance(going.last, Ended) else 0

        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", free)
        waits = submit(engine, model="main", prompt=PROSE[:300], prompt_top=2, decoding={"max_new_tokens": 2})
        ended(waits)
        assert [isinstance(one, Prompted) for one in waits.events] == [True, False, False, False]

    def test_what_does_not_fit_is_told_what_to_do(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asks = threading.get_ident()
        free = lambda _: 1 << 40 if threading.get_ident() == asks else 0  # noqa: E731
        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", free)
        told = submit(engine, decoding={"max_new_tokens": 2}).wait()
        assert isinstance(told.last, Failed)
        assert isinstance(told.last.error, NoRoom)
        assert "GB are free; send a shorter prompt" in str(told.last.error)
        assert "batch_size" not in str(told.last.error)

    def test_runs_are_bounded(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each way of fusing has one, and one that is idle makes room."""
        monkeypatch.setattr(engines, "_MOST_RUNS", 2)
        ended(submit(engine, model="main", decoding={"max_new_tokens": 1}))
        fusers = ("average", "union-topk", "union-vocab", "product")
        told = [submit(engine, fusion={"fuser": one}, decoding={"max_new_tokens": 20}) for one in fusers]
        most = 0
        while not all(one.events and isinstance(one.last, Ended | Failed) for one in told):
            most = max(most, len(engine._runs))
        assert [ended(one).completion_tokens for one in told] == [20] * len(fusers)
        assert most == 2

    def test_the_oldest_idle_run_makes_room(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "_MOST_RUNS", 2)
        fusers = ("average", "union-topk", "union-vocab")
        for one in fusers:
            ended(submit(engine, fusion={"fuser": one}, decoding={"max_new_tokens": 1}))
        left = [run._ensemble.method for run in engine._runs.values()]
        assert left == ["union-topk", "union-vocab"]

    def test_a_text_that_has_ended_gives_its_memory_up(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a run keeps for texts that begin alike is not in the way of one that does not."""
        ended(submit(engine, model="main", prompt=PROSE[:300], decoding={"max_new_tokens": 1}))
        closed = closed_runs(monkeypatch)
        asks = threading.get_ident()
        free = lambda _: 1 << 40 if threading.get_ident() == asks or closed else 0  # noqa: E731
        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", free)
        told = submit(engine, model="main", prompt="So" + PROSE[:350], decoding={"max_new_tokens": 30})
        assert ended(told).completion_tokens == 30

    def test_it_can_be_sent_to_another_process(self) -> None:
        error = pickle.loads(pickle.dumps(NoRoom("it needs 3 GB", "take less")))
        assert (str(error), error.why) == ("it needs 3 GB; take less", "it needs 3 GB")
        busy = pickle.loads(pickle.dumps(Busy("8 texts wait already", 3)))
        assert (str(busy), busy.retry_after) == ("8 texts wait already; try again in 3 s", 3)


class TestFaultsOfOurs:
    def test_a_bad_number_of_a_member_is_no_fault_of_its_clients(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise InputError("logits of main: NaN")

        monkeypatch.setattr(OpenRun, "step", fail)
        told = submit(engine).wait()
        assert isinstance(told.last, Failed)
        assert isinstance(told.last.error, ModelError)
        assert "NaN" in str(told.last.error)

    def test_a_run_that_cannot_be_closed_does_not_end_the_engine(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(runs.Running, "close", fail)
            patch.setattr(engines, "_IDLE_SECONDS", 0.0)
            ended(submit(engine, decoding={"max_new_tokens": 2}))
            assert until(lambda: not engine._runs)
        assert not engine.closed
        ended(submit(engine, decoding={"max_new_tokens": 2}))

    def test_a_text_that_cannot_be_cancelled_does_not_end_the_engine(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError

        told = Told()
        ticket = engine.submit(runs.Request("deepen", "So", decoding={"max_new_tokens": 300}), told)
        told.begun()
        with monkeypatch.context() as patch:
            patch.setattr(OpenRun, "cancel", fail)
            ticket.cancel()
            assert isinstance(told.wait().last, Failed)
        ended(submit(engine, decoding={"max_new_tokens": 2}))


class TestKeptLanes:
    def test_a_common_beginning_does_not_cost_a_chat_its_lane(self) -> None:
        kept = KeptLanes()
        chat, other = [1, *range(100, 200)], [1, *range(500, 600)]
        kept.keep(0, [chat])
        assert kept.best(other, [0, 1]) == 1
        assert kept.best([*chat, 7, 8], [0, 1]) == 0
        assert list(kept) == []

    def test_the_end_of_a_text_may_be_written_otherwise(self) -> None:
        kept = KeptLanes()
        kept.keep(0, [list(range(100))])
        assert kept.best([*range(95), 1000, 1001], [0, 1]) == 0

    def test_without_an_empty_lane_the_most_like_it_goes(self) -> None:
        kept = KeptLanes()
        kept.keep(0, [[1, *range(100, 200)]])
        kept.keep(1, [[1, 2, 3, *range(300, 400)]])
        assert kept.best([1, 2, 3, 4], [0, 1]) == 1

    def test_two_chats_in_turn_beside_another_text(self, engine: Engine, members: list[Member]) -> None:
        """Each goes on where it was: what its lane holds is not read again."""
        chats = [PROSE[:120], PROSE[0] + PROSE[150:270]]
        for one in chats:
            ended(submit(engine, prompt=one, decoding={"max_new_tokens": 1}))
        going = submit(engine, prompt="So", decoding={"max_new_tokens": 300}).begun()
        fed = [counted(member) for member in members]
        written = -len(going.pieces)
        for one in chats:
            ended(submit(engine, prompt=one + " and so", decoding={"max_new_tokens": 1}))
        written += len(going.pieces)
        for count in fed:
            assert count[0] - written < 2 * (len(" and so") + CHUNK + 5)
        ended(going)
