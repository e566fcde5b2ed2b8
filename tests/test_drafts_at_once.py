"""Drafts that the main model writes at once, as on CUDA; here over fixed buffers without captures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sessions import changed, on_fixed_buffers
from tiny_models import AWKWARD, PROSE
from torch.utils._python_dispatch import TorchDispatchMode

from deepen_ext import Ensemble
from deepen_ext.decoding.drafts.draft_settings import LOOKUP, MAIN, DraftSettings
from deepen_ext.decoding.drafts.main_word import WordReader
from deepen_ext.decoding.drafts.pace import _CLEARLY, MOST_OFFERED, Pace, Plan
from deepen_ext.decoding.observed.costs import Costs
from deepen_ext.decoding.observed.history import FUSION, History
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.members.hf.session import HFSession
from deepen_ext.members.top_k_only import TopKOnly

PROMPTS = ["The history of tea begins in", PROSE[:200], AWKWARD[:40], "Once"]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "certified": {"certified_skip": True},
    "gated": {"confidence_gate": 0.9},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 7},
    "a seed for each": {"do_sample": True, "temperature": 0.7, "seed": [3, 4, 3, 5]},
    "suppressed": {"suppress_tokens": [260, 28, 338]},
    "processors for the verification": {"suppress_tokens": [260], "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def members(tiny_smollm2, tiny_gemma):
    return [on_fixed_buffers(tiny_smollm2), on_fixed_buffers(tiny_gemma)]


@pytest.fixture(scope="module")
def pair(members):
    return Ensemble(members, learning_rate=0.3)


@contextmanager
def counted() -> Iterator[SimpleNamespace]:
    """How many tokens were written at once, call by call, and how often the host read the model's word."""
    found = SimpleNamespace(written=[], read=0)
    write, read = HFSession.write, WordReader.read

    def writing(session, targets, k, count, choose):
        found.written.append(count)
        return write(session, targets, k, count, choose)

    def reading(*given, **named):
        found.read += 1
        return read(*given, **named)

    with patch.object(HFSession, "write", writing), patch.object(WordReader, "read", reading):
        yield found


def _one(asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked for several texts, for the first of them."""
    return {"seed": asked["seed"][:1]} if isinstance(asked.get("seed"), list) else {}


class TestTheSameText:
    @pytest.fixture(scope="class", params=SETTINGS)
    @staticmethod
    def without(request, pair):
        """Ragged prompts, three at a time; a text that ends by a stop string, and the others by length."""
        asked = {"max_new_tokens": 18, "batch_size": 3} | SETTINGS[request.param]
        asked["stop_strings"] = [pair.generate(PROMPTS[:1], **asked | _one(asked)).texts[0].split()[2]]
        plain = pair.generate(PROMPTS, **asked, draft=0)
        assert {one.finish_reason for one in plain} == {"stop_string", "length"}
        return request.param, asked, plain

    @pytest.mark.parametrize("draft", [1, 3, 8, "auto"])
    def test_with_drafts_and_without(self, pair, without, draft) -> None:
        settings, asked, plain = without
        with counted() as calls:
            found = pair.generate(PROMPTS, **asked, draft=draft, drafter="main")
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]
        assert [one.finish_reason for one in found] == [one.finish_reason for one in plain]
        assert [one.changed_tokens for one in found] == [one.changed_tokens for one in plain]
        assert found.texts == plain.texts
        timings = found.timings
        assert timings.tokens == plain.timings.tokens
        if settings == "processors for the verification":
            assert not calls.written  # the next guess depends on the ids
            return
        if draft != "auto":
            assert calls.written
            assert max(calls.written) == draft
            assert 0 < timings.stood < timings.drafted
            assert timings.steps < plain.timings.steps
            # Every cycle reads the main model's word once, however long the draft; once a text is begun
            # or near its end it is a step of one place.
            assert calls.read == timings.steps

    def test_one_text_to_the_end_of_a_context(self, members) -> None:
        """The main model's, and an assistant's, which has more tokens for the text."""
        reasons = set()
        for i, longest in ((0, 40), (1, 44)):
            short = list(members)
            short[i] = on_fixed_buffers(changed(members[i], context_length=longest))
            ensemble = Ensemble(short, learning_rate=0.3)
            prompt = AWKWARD[:12] if i else PROMPTS[0]
            used = len(members[i].tokenizer(prompt).input_ids)
            plain = ensemble.generate(prompt, max_new_tokens=longest - used, draft=0)
            with counted() as calls:
                found = ensemble.generate(prompt, max_new_tokens=longest - used, draft=5)
            assert (found.token_ids, found.finish_reason) == (plain.token_ids, plain.finish_reason)
            assert calls.written
            reasons.add(plain.finish_reason)
        assert "length" in reasons

    def test_eos_inside_of_a_draft(self, pair) -> None:
        """Taken from the middle of what is written without it."""
        plain = pair.generate(PROMPTS[1], max_new_tokens=24, draft=0)
        eos = next(t for t in plain.token_ids[5:] if t not in plain.token_ids[:5])
        settings = {"max_new_tokens": 24, "eos_token_id": eos}
        plain = pair.generate(PROMPTS[1], **settings, draft=0)
        assert plain.finish_reason == "eos"
        for draft in (3, 8):
            with counted() as calls:
                found = pair.generate(PROMPTS[1], **settings, draft=draft)
            assert (found.token_ids, found.text) == (plain.token_ids, plain.text)
            assert calls.written


class TestWhereItDoesNotHold:
    def test_shared_forwards_and_hidden_logits(self, pair, members) -> None:
        plain = pair.generate(PROMPTS[:2], max_new_tokens=12, draft=0)
        hidden = replace(members[0], backend=TopKOnly(members[0].backend, 128))
        assert not hidden.backend.capabilities.writes
        with counted() as calls, SharedForwards() as shared:
            found = pair.generate(PROMPTS[:2], max_new_tokens=12, draft=3, shared=shared)
            Ensemble([hidden, members[1]]).generate(PROMPTS[:2], max_new_tokens=12, draft=3)
        assert not calls.written
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]

    def test_a_processor_of_the_callers_own(self, pair) -> None:
        """Guesses do without it, and it sees each token once, in order."""
        seen: list[list[int]] = []

        def third(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(ids[0].tolist())
            scores[:, len(seen) % 3 :: 3] = -torch.inf
            return scores

        texts, orders = [], []
        for draft in (0, 3):
            seen.clear()
            with counted() as calls:
                found = pair.generate(PROMPTS[1], max_new_tokens=12, draft=draft, logits_processor=[third])
            texts.append(found.token_ids)
            orders.append(list(seen))
            assert bool(calls.written) == bool(draft)
        assert texts[0] == texts[1]
        assert orders[0] == orders[1]


class _NoReads(TorchDispatchMode):
    """Whatever gives a value of a tensor to Python raises."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(operation), "a value was read"
        return operation(*args, **(kwargs or {}))


@contextmanager
def no_reads() -> Iterator[None]:
    def refuse(*given, **named):
        raise AssertionError("a tensor was read")

    with (
        patch.object(torch.Tensor, "tolist", refuse),
        patch.object(torch.Tensor, "numpy", refuse),
        patch.object(torch.Tensor, "cpu", refuse),
        _NoReads(),
    ):
        yield


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 50, "seed": 2}])
def test_nothing_is_read_while_it_is_written(members, sampling) -> None:
    """What a CPU can show of it: Python is given no value of any tensor, by the session or the sampler."""
    member = members[0]
    ids = member.vocabulary.encode(PROSE[:120])
    chooser = Chooser(Settings.read(member, **sampling), [ids], "cpu")
    assert chooser.guesses_by_scores

    def choose(logits: torch.Tensor, n: int) -> torch.Tensor:
        return chooser.propose(logits, [0], [range(len(ids) + n)])

    with member.backend.open(1, 200) as session:
        session.ask({0: ids}, 8).wait()
        with no_reads():
            tokens, said = session.write({0: ids}, 8, 3, choose)
        written = tokens[0].tolist()
        with pytest.raises(AssertionError, match="read"), no_reads():
            session.ids(0)
        assert len(said) == 4
    with member.backend.open(1, 200) as session:
        for n in range(3):
            scores = session.ask({0: ids + written[:n]}, 8).wait().scores()
            assert chooser.propose(scores, [0], [ids + written[:n]]).tolist() == [written[n]]


class TestPace:
    """The length of a draft that must be known beforehand."""

    @staticmethod
    def pace(history: History, *drafters: int) -> Pace:
        team: Any = SimpleNamespace(
            histories={False: history}, members=[None, None], device=torch.device("cpu")
        )
        return Pace(team, DraftSettings(None, drafters or (MAIN,)), sampled=False, at_once=True)

    @staticmethod
    def history(write: float, read: dict[int, float], share: float) -> History:
        history = History()
        history.cost(MAIN).add(1, 1, write)
        for width, ms in read.items():
            history.cost(1).add(1, width, ms)
            history.cost(FUSION).add(1, width, 0.1)
        rng = random.Random(3)
        for _ in range(2000):
            history.accepted(MAIN).see(0.5, rng.random() < share)
        return history

    def test_nothing_is_known(self) -> None:
        assert self.pace(History()).plan(1, []) == Plan(MAIN, 0)

    @pytest.mark.parametrize("share", [0.3, 0.7, 0.9, 0.97])
    def test_the_least_time_a_token(self, share: float) -> None:
        """Where reading several tokens costs what one does."""
        history = self.history(8.0, dict.fromkeys(range(1, 10), 12.0), share)
        assert abs(history.accepted(MAIN).mean - share) < 0.1
        plan = self.pace(history).plan(1, [])
        assert plan == self.least(history, 8.0, 12.1, 1.0)
        assert (plan.length > 0) == (share > 0.5)

    @staticmethod
    def least(history: History, write: float, read: float, asked: float) -> Plan:
        """By the formula, where assistants are asked about this share of the tokens."""
        a = 1 - asked * (1 - history.accepted(MAIN).mean)
        rates = [
            ((g + 1) * write + read * (1 - (1 - asked) ** (g + 1))) / sum(a**i for i in range(g + 1))
            for g in range(MOST_OFFERED + 1)
        ]
        best = min(range(len(rates)), key=rates.__getitem__)
        return Plan(MAIN, best if rates[best] < _CLEARLY * rates[0] else 0)

    def test_none_where_reading_costs_by_the_token(self) -> None:
        history = self.history(8.0, {width: 10.0 * width for width in range(1, 10)}, 0.9)
        assert self.pace(history).plan(1, []) == Plan(MAIN, 0)

    def test_what_no_assistant_is_asked_about(self) -> None:
        """It stands: longer drafts. But without a draft, too, there is little to verify, and dear tokens."""
        history = self.history(1.0, dict.fromkeys(range(1, 10), 12.0), 0.6)
        before = self.pace(history).plan(1, []).length
        history.opened = (30.0, 100.0)
        assert self.pace(history).plan(1, []).length > before > 0
        history = self.history(8.0, dict.fromkeys(range(1, 10), 12.0), 0.6)
        assert self.pace(history).plan(1, []).length == 1
        history.opened = (30.0, 100.0)
        assert self.pace(history).plan(1, []).length == 0
        lengths = set()
        for write in (0.5, 1.0, 2.0, 3.0):
            history = self.history(write, dict.fromkeys(range(1, 10), 12.0), 0.6)
            history.opened = (50.0, 100.0)
            plan = self.pace(history).plan(1, [])
            assert plan == self.least(history, write, 12.1, 0.5)
            lengths.add(plan.length)
        assert len(lengths) > 2

    def test_widths_are_tried_by_and_by(self) -> None:
        """What was never measured is tried, not more than twice as wide as what was."""
        history = self.history(1.0, {1: 10.0}, 0.97)
        assert self.pace(history).plan(1, []) == Plan(MAIN, 1)
        history.cost(1).add(1, 2, 10.0)
        history.cost(FUSION).add(1, 2, 0.1)
        assert self.pace(history).plan(1, []) == Plan(MAIN, 3)

    def test_a_shapes_first_runs_do_not_count(self) -> None:
        """On CUDA they are slow: the shape is new, then it is captured."""
        costs = Costs()
        for ms in (500.0, 900.0):
            costs.add(1, 4, ms, warm_up=2)
            assert costs.ms(1, 4) is None
        costs.add(1, 4, 10.0, warm_up=2)
        costs.add(1, 1, 10.0)
        assert costs.ms(1, 4) == 10.0

    def test_it_does_not_lose_to_its_own_pace(self) -> None:
        """What recent cycles took with drafts is no reason against drafts."""
        history = self.history(8.0, dict.fromkeys(range(1, 10), 12.0), 0.9)
        plan = self.pace(history).plan(1, [])
        history.spent[1] = (1000.0, 1000 / 12.5)
        assert self.pace(history).plan(1, []) == plan != Plan(MAIN, 0)

    def test_another_drafter_that_is_cheaper(self) -> None:
        history = self.history(8.0, dict.fromkeys(range(1, 10), 12.0), 0.9)
        for i in range(500):
            history.accepted(LOOKUP).see(0.0, i % 20 > 0)
        for width in range(2, 10):
            history.cost(MAIN).add(1, width, 8.0)
        assert self.pace(history, MAIN, LOOKUP).plan(1, [8]).drafter == LOOKUP
        assert self.pace(history, MAIN, LOOKUP).plan(1, [0]).drafter == MAIN

    def test_a_forward_of_one_token_is_known_from_drafts(self, members) -> None:
        """A cycle's forward passes of the main model, each its share."""
        ensemble = Ensemble(members, learning_rate=0.3)
        seen = []
        with (
            patch.object(Pace, "read", lambda pace, *one: seen.append(one)),
            patch.object(Pace, "plan", lambda pace, lanes, found: Plan(MAIN, 3)),
            counted() as calls,
        ):
            found = ensemble.generate(PROMPTS[0], max_new_tokens=12, draft="auto", drafter="main")
        assert len(calls.written) > 1
        assert {(lanes, width) for lanes, width, _ in seen} == {(1, 1)}
        cycles = len(seen)  # all but the first step, which reads the prompt
        assert cycles == found.timings.steps - 1
        told = sum(ms for _, _, ms in seen[-len(calls.written) :])
        assert 0 < told < found.timings.members_ms[members[0].name] / 2
