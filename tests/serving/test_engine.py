"""Texts that join and leave one loop: each is the text that it is alone, whatever is written beside it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from losing_backend import backend_of
from tiny_models import PROSE
from told import LOUD, SECONDS, Told, closed_runs, counted, submit
from transformers import LogitsProcessor

from deepen_ext import Ensemble
from deepen_ext.errors import InputError, MemberLost
from deepen_ext.members.member import Member
from deepen_ext.serving.engine import Busy, Engine, UnknownModel
from deepen_ext.serving.refusals import Closed
from deepen_ext.serving.requests import Ended, Failed, Prompted, Request
from deepen_ext.serving.running import Running


@pytest.fixture(scope="module")
def models(members: list[Member]) -> dict[str, Ensemble]:
    return {
        "deepen": Ensemble(members, fuser="deepen", **LOUD),
        "default": Ensemble(members, cache=False),
        "main": Ensemble(members[:1], fuser="single"),
    }


@pytest.fixture
def engine(models: dict[str, Ensemble]) -> Iterator[Engine]:
    with Engine(models, lanes=3, queue=100, prompt_chunk=7) as made:
        yield made


class Forbid(LogitsProcessor):
    """Leaves no token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)


def asked(rng: random.Random) -> dict[str, Any]:
    """A request of any kind."""
    start = rng.randrange(600)
    decoding: dict[str, Any] = {"max_new_tokens": rng.randint(1, 20)}
    if rng.random() < 0.4:
        decoding |= {"do_sample": True, "seed": rng.randrange(99), "temperature": rng.choice([0.5, 1.0, 2.0])}
        decoding |= {"top_p": 0.9} if rng.random() < 0.5 else {"top_k": 20}
    if rng.random() < 0.3:
        decoding["repetition_penalty"] = 1.2
    if rng.random() < 0.3:
        decoding["stop_strings"] = [rng.choice(["e", "th", "\n"])]
    return {
        "model": rng.choice(["deepen", "deepen", "default", "main"]),
        "prompt": PROSE[start : start + rng.choice([3, 20, 90])],
        "decoding": decoding,
        "draft": rng.choice([0, 0, 2]),
        "top": rng.choice([0, 0, 3]),
        "explain": rng.random() < 0.3,
    }


def test_each_text_is_the_one_it_is_alone(engine: Engine, models: dict[str, Ensemble]) -> None:
    rng = random.Random(5)
    requests = [asked(rng) for _ in range(24)]
    for request in requests:
        if request["model"] != "main" and rng.random() < 0.2:
            request["fusion"] = {"fuser": "average"}
    told = []
    for request in requests:
        told.append(submit(engine, **request))
        if rng.random() < 0.3:
            told[-1].wait()  # then the next ones join others
    for request, one in zip(requests, told, strict=True):
        one.wait()
        ensemble = models[request["model"]]
        if "fusion" in request:
            ensemble = ensemble.variant(**request["fusion"])
        alone = ensemble.generate(request["prompt"], draft=0, **request["decoding"])
        assert one.ids == alone.token_ids, request
        assert one.text == alone.text
        assert isinstance(one.last, Ended)
        assert (one.last.finish_reason, one.last.changed_tokens) == (
            alone.finish_reason,
            alone.changed_tokens,
        )
        assert one.last.completion_tokens == len(alone.token_ids)
        assert all((piece.scored is None) == (request["top"] == 0) for piece in one.pieces)
        assert all((piece.record is None) != request["explain"] for piece in one.pieces)
    assert engine.load.tokens == sum(len(one.ids) for one in told)


def test_what_is_told_of_a_token(engine: Engine) -> None:
    told = submit(engine, top=3, explain=True, decoding={"max_new_tokens": 6}).wait()
    for piece in told.pieces:
        assert piece.scored is not None
        assert piece.record is not None
        best = [one.logprob for one in piece.scored.top]
        assert best == sorted(best, reverse=True)
        assert piece.scored.logprob == best[0]  # greedy
        fused = [one["probability"] for one in piece.record["fused"]][:3]
        assert torch.tensor(best).exp().tolist() == pytest.approx(fused, abs=2e-6)
        assert piece.record["token"]["id"] == piece.token


def test_ids_as_a_prompt_and_what_a_member_says_of_them(engine: Engine, members: list[Member]) -> None:
    ids = members[0].vocabulary.encode(PROSE[:25])
    request = {"model": "main", "prompt": tuple(ids), "decoding": {"max_new_tokens": 2}}
    told = submit(engine, **request, prompt_top=4, top=1).wait()
    first = told.events[0]
    assert isinstance(first, Prompted)
    assert list(first.ids) == ids
    said = list(members[0].backend.open(1, len(ids)).read(0, ids[:-1], 0, 4))
    logprobs = torch.cat([one.scores() for one in said]).log_softmax(-1)
    wanted = logprobs[range(len(ids) - 1), ids[1:]].tolist()
    assert [one.logprob for one in first.scored] == pytest.approx(wanted, abs=1e-5)
    assert told.ids == submit(engine, **{**request, "prompt": PROSE[:25]}).wait().ids
    assert isinstance(submit(engine, prompt_top=4).wait().last, Failed)  # of an ensemble


def test_a_prompt_that_begins_like_one_before_is_not_read_again(
    engine: Engine, members: list[Member]
) -> None:
    fed = [counted(member) for member in members]
    long = PROSE[:200]
    submit(engine, prompt=long, decoding={"max_new_tokens": 3}).wait()
    before = [one[0] for one in fed]
    submit(engine, prompt=long + PROSE[200:215], decoding={"max_new_tokens": 1}).wait()
    assert all(one[0] - earlier < 60 for one, earlier in zip(fed, before, strict=True))


def test_one_text_that_cannot_go_on_leaves_the_others(engine: Engine, models: dict[str, Ensemble]) -> None:
    decoding = {"max_new_tokens": 12}
    others = [submit(engine, prompt=PROSE[at : at + 20], decoding=decoding) for at in (0, 50)]
    bad = submit(engine, decoding={"logits_processor": [Forbid()]}).wait()
    assert isinstance(bad.last, Failed)
    assert "forbid" in str(bad.last.error)
    for at, told in zip((0, 50), others, strict=True):
        alone = models["deepen"].generate(PROSE[at : at + 20], **decoding)
        assert told.wait().ids == alone.token_ids


def test_a_member_that_is_lost_ends_its_texts_and_not_the_engine(
    engine: Engine, members: list[Member]
) -> None:
    backend = backend_of(members[1])
    told = [submit(engine, decoding={"max_new_tokens": 200}) for _ in range(3)]
    for one in told:
        one.begun()
    backend.arm(0)
    for one in told:
        one.wait()
        assert isinstance(one.last, Failed)
        assert isinstance(one.last.error, MemberLost)
        (written,) = one.last.error.generations
        assert written.token_ids == one.ids
    backend.arm(None)
    assert isinstance(submit(engine, decoding={"max_new_tokens": 2}).wait().last, Ended)


def test_cancelled_texts_make_room(engine: Engine) -> None:
    long, tickets = {"max_new_tokens": 90}, []
    told = [Told() for _ in range(5)]
    for one in told:
        tickets.append(engine.submit(Request("deepen", "So", decoding=long), one))
    for ticket in (tickets[4], tickets[0], tickets[1]):  # one that waits, two that are written
        ticket.cancel()
    for one in (told[0], told[1], told[4]):
        last = one.wait().last
        assert isinstance(last, Ended)
        assert last.finish_reason == "cancelled"
        assert last.completion_tokens == len(one.ids) < 90
    for one in (told[2], told[3]):
        assert len(one.wait().ids) == 90


class TestOneThatCannotBegin:
    """Beside a text that is being written, of another run."""

    @pytest.fixture
    def running(self, engine: Engine) -> Told:
        return submit(engine, decoding={"max_new_tokens": 200}).begun()

    def test_waits_for_memory_until_the_other_has_ended(
        self, engine: Engine, running: Told, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asks = threading.get_ident()

        def free(device: torch.device) -> int:
            """To who asks there is enough; to the engine's thread, once the first text has ended."""
            return 1 << 40 if threading.get_ident() == asks or isinstance(running.last, Ended) else 0

        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", free)
        waits = submit(engine, model="main", decoding={"max_new_tokens": 3})
        assert len(waits.wait().ids) == 3
        assert isinstance(running.last, Ended)
        assert len(running.ids) == 200

    def test_has_the_memory_of_runs_that_are_idle(
        self, engine: Engine, running: Told, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where it comes while another text is being written, and nobody has room for it."""
        submit(engine, model="default", decoding={"max_new_tokens": 2}).wait()
        while engine.load.running > 1:
            threading.Event().wait(0.01)
        closed = closed_runs(monkeypatch)
        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", lambda _: len(closed) << 40)
        found = submit(engine, model="main", decoding={"max_new_tokens": 3}).wait()
        assert len(found.ids) == 3
        assert len(closed) == 1
        assert not isinstance(running.last, Ended)

    def test_two_that_wait_leave_each_other_alone(
        self, engine: Engine, running: Told, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each has a run of its own, which holds nothing yet: closing it for the other would help nobody."""
        opened: list[Running] = []
        begin = Running.__init__

        def noted(run: Running, *given: Any) -> None:
            begin(run, *given)
            opened.append(run)

        monkeypatch.setattr(Running, "__init__", noted)
        # Enough for a run without texts, and for no text until the first one has ended.
        free = lambda _: 1 << 40 if isinstance(running.last, Ended) else 800_000  # noqa: E731
        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", free)
        short: dict[str, Any] = {"model": "default", "decoding": {"max_new_tokens": 3}}
        both = [submit(engine, fusion=fusion, **short) for fusion in ({}, {"fuser": "average"})]
        assert [len(one.wait().ids) for one in both] == [3, 3]
        assert len(running.ids) == 200
        assert len(opened) == 2

    def test_is_told_at_once_what_else_is_wrong(
        self, engine: Engine, running: Told, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> int:
            raise InputError("no such prompt")

        monkeypatch.setattr("deepen_ext.decoding.open_run.OpenRun.add", refuse)
        bad = submit(engine, model="main").wait()
        assert isinstance(bad.last, Failed)
        assert str(bad.last.error) == "no such prompt"
        assert not isinstance(running.last, Ended)


class TestRefused:
    def test_early(self, engine: Engine) -> None:
        for request, why in (
            ({"decoding": {"temperature": -1.0, "do_sample": True}}, "temperature"),
            ({"decoding": {"num_beams": 4}}, "num_beams"),
            ({"decoding": {"max_new_tokens": 10**6}}, "context"),
            ({"prompt": ""}, "empty"),
            ({"prompt": (5, 10**6)}, "must lie in"),
            ({"fusion": {"fuser": "nonsense"}}, "nonsense"),
            ({"draft": -1}, "draft"),
        ):
            with pytest.raises(InputError, match=why):
                submit(engine, **request)
        with pytest.raises(UnknownModel, match="choose one of deepen, default, main"):
            submit(engine, model="gpt-4")
        with pytest.raises(InputError, match="nothing to serve"):
            Engine({})

    def test_a_full_queue(self, models: dict[str, Ensemble]) -> None:
        with Engine(models, lanes=1, queue=2) as engine:
            long = {"decoding": {"max_new_tokens": 200}}
            submit(engine, **long).begun()
            submit(engine, **long)
            submit(engine, **long)
            with pytest.raises(Busy, match="2 texts wait already; try again in") as refused:
                submit(engine, **long)
            assert refused.value.retry_after >= 1

    def test_after_the_end(self, models: dict[str, Ensemble]) -> None:
        engine = Engine(models, lanes=2)
        told = submit(engine, decoding={"max_new_tokens": 150})
        waits = [submit(engine, decoding={"max_new_tokens": 200}) for _ in range(3)]
        engine.close(0)
        assert all(isinstance(one.wait().last, Ended) for one in (told, *waits))
        assert engine.load.bytes_held == engine.load.running == 0
        with pytest.raises(Closed, match="about to end"):
            submit(engine)

    def test_running_texts_may_end(self, models: dict[str, Ensemble]) -> None:
        engine = Engine(models, lanes=2)
        told = submit(engine, decoding={"max_new_tokens": 30})
        engine.close(SECONDS)
        assert len(told.wait().ids) == 30
