"""Rows that begin alike: what they share goes through the model once, and each is as it is alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from sessions import open_session, sync

from deepen_ext.members.hf import attention
from deepen_ext.members.hf import session as module
from deepen_ext.members.hf.feed_plan import SHARED, common_prefix, cost, fed_first
from deepen_ext.members.hf.kv_cache import LaneCache
from deepen_ext.members.member import Member

TEXT = Path(__file__).read_text()


@pytest.fixture(params=["tiny_smollm2", "windowed on fixed buffers"])
def member(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Member:
    """On fixed buffers short pieces go as on CUDA; here nothing is captured."""
    if "fixed" in request.param:
        monkeypatch.setattr(module, "_on_fixed_buffers", lambda member, cache: True)
    return request.getfixturevalue(request.param.split()[0])


def pieces(member: Member, *lengths: int) -> list[list[int]]:
    """Different runs of ids, of these lengths; no two begin with the same one."""
    ids = member.vocabulary.encode(TEXT)
    assert len(ids) > sum(lengths)
    found, at = [], 0
    for number, length in enumerate(lengths):
        found.append([1000 + number, *ids[at + 1 : at + length]])
        at += length
    return found


def assert_as_alone(member: Member, targets: dict[int, list[int]], logits: torch.Tensor) -> None:
    """Each row's logits are those of a session of one row, in which there is nothing to copy.

    It rolls back from text to text: tests/test_session.py compares that with fresh forwards.
    """
    assert len(logits) == len(targets)
    with open_session(member) as alone:
        for row, ids in sorted(targets.items(), key=lambda one: one[1]):
            got, expected = logits[list(targets).index(row)], sync(alone, {0: ids})[0]
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
            assert int(got.argmax()) == int(expected.argmax())


class TestOneCall:
    def test_three_groups(self, member: Member) -> None:
        """Demonstrations of three domains before five questions; one row shares with nobody."""
        *demos, lonely = pieces(member, 60, 40, 50, 30)
        questions = pieces(member, 7, 20, 12, 5, 9)
        of = [0, 1, 2, 0, 1]
        targets = {row: demos[of[row]] + questions[row] for row in range(5)} | {5: lonely}
        session = open_session(member, lanes=6, capacity=100)
        logits = sync(session, targets)
        assert session.tokens_fed == sum(map(len, demos)) + sum(map(len, questions)) + len(lonely)
        assert [session.ids(row) for row in range(6)] == list(targets.values())
        assert_as_alone(member, targets, logits)
        targets = {row: [*ids[: -(row % 3) or None], 50 + row, 60] for row, ids in targets.items()}
        assert_as_alone(member, targets, sync(session, targets))

    def test_a_prefix_past_the_window(self, windowed: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        """Longer than a window and than one forward: the last query sees copied states of both kinds."""
        monkeypatch.setattr(module, "CHUNK", 400)
        prefix, *questions = pieces(windowed, 530, 12, 20)
        targets = {row: prefix + question for row, question in enumerate(questions)}
        session = open_session(windowed, lanes=2)
        logits = sync(session, targets)
        assert session.tokens_fed == len(prefix) + sum(map(len, questions))
        assert_as_alone(windowed, targets, logits)
        # A rollback to the middle of what was copied, past the window too.
        targets = {1: prefix[:515] + questions[0]}
        fed = session.tokens_fed
        assert_as_alone(windowed, targets, sync(session, targets))
        assert session.tokens_fed == fed + 12

    def test_equal_rows_and_strict_prefixes(self, member: Member) -> None:
        """Of a row that adds nothing one token is fed, for its logits."""
        (ids,) = pieces(member, 100)
        targets = {0: ids[:70], 1: ids, 2: ids[:40], 3: ids, 4: ids[:70]}
        session = open_session(member, lanes=5, capacity=200)
        logits = sync(session, targets)
        assert session.tokens_fed == 100 + 4  # one each, but for the longest
        assert_as_alone(member, targets, logits)

    def test_a_prefix_within_a_prefix(self, tiny_smollm2: Member) -> None:
        """A system prompt before all rows, demonstrations before half of them each."""
        system, *demos = pieces(tiny_smollm2, 40, 50, 60)
        questions = pieces(tiny_smollm2, 10, 11, 12, 13)
        targets = {row: system + demos[row % 2] + questions[row] for row in range(4)}
        session = open_session(tiny_smollm2, lanes=4)
        logits = sync(session, targets)
        assert session.tokens_fed == 40 + 50 + 60 + sum(map(len, questions))
        assert_as_alone(tiny_smollm2, targets, logits)

    def test_short_prefixes_are_not_worth_it(self, tiny_smollm2: Member) -> None:
        prefix, *questions = pieces(tiny_smollm2, SHARED - 1, 40, 40, 40)
        session = open_session(tiny_smollm2, lanes=3)
        sync(session, {row: prefix + question for row, question in enumerate(questions)})
        assert session.tokens_fed == 3 * (SHARED - 1 + 40)


class TestSteps:
    def test_what_all_rows_have_is_read_once(
        self, tiny_smollm2: Member, windowed: Member, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Four rows on one long prefix write on, one rolls back into it, and all go on."""
        calls = []
        parts = attention._in_two_parts
        monkeypatch.setattr(attention, "_in_two_parts", lambda *a: (calls.append(a[4]), parts(*a))[1])
        for member, length, layers in [(tiny_smollm2, 360, 3), (windowed, 560, 3)]:
            prefix, *questions = pieces(member, length, 12, 20, 15, 13)
            targets = {row: prefix + question for row, question in enumerate(questions)}
            session = open_session(member, lanes=4)
            sync(session, targets)
            calls.clear()
            targets = {row: [*ids, 50 + row, 60] for row, ids in targets.items()}
            assert_as_alone(member, targets, sync(session, targets))
            # Of Gemma's kind one layer sees everything; the others' windows begin 61 states into the prefix.
            assert [calls.count(states) for states in (length, length - 61)] in ([3, 0], [1, 2])
            assert len(calls) == layers
            targets[1] = [*prefix[:-20], 70, 71]
            sync(session, targets)
            calls.clear()
            targets = {row: [*ids, 80 + row] for row, ids in targets.items()}
            assert_as_alone(member, targets, sync(session, targets))
            assert calls.count(length - 20) >= 1


class TestLaterCalls:
    def test_from_a_row_that_sits_out(self, member: Member) -> None:
        """Another row, not in the call, holds the prefix; it is as it was afterwards."""
        prefix, first, second, third = pieces(member, 50, 6, 12, 8)
        held = {2: prefix + first}
        session = open_session(member, lanes=4, capacity=200)
        sync(session, held)
        targets = {0: prefix + second, 3: prefix[:30] + third}
        logits = sync(session, targets)
        assert session.tokens_fed == 56 + 12 + 8
        assert_as_alone(member, targets, logits)
        fed = session.tokens_fed
        assert_as_alone(member, held, sync(session, held))
        assert session.tokens_fed == fed  # its logits were still known
        held[2] = [*held[2], 77]
        assert_as_alone(member, held, sync(session, held))

    def test_only_what_is_missing_is_copied(
        self, tiny_smollm2: Member, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A row keeps its own states as far as they go; a source rolled back in the same call gives less."""
        prefix, first, second = pieces(tiny_smollm2, 80, 10, 15)
        session = open_session(tiny_smollm2, lanes=2)
        sync(session, {0: prefix + first, 1: prefix[:40] + second})
        fed = session.tokens_fed
        copied = []
        copy = LaneCache.copy_prefix
        monkeypatch.setattr(
            LaneCache, "copy_prefix", lambda cache, *where: (copied.append(where), copy(cache, *where))
        )
        targets = {0: prefix[:60] + second, 1: prefix + second}
        logits = sync(session, targets)
        assert copied == [(0, 1, 40, 60)]
        assert session.tokens_fed == fed + 15 + 20 + 15
        assert_as_alone(tiny_smollm2, targets, logits)

    def test_released_rows_give_nothing(self, member: Member) -> None:
        """Lanes move when a row is released; sources and targets are found where they are now."""
        prefix, other, *questions = pieces(member, 60, 70, 6, 7, 8)
        session = open_session(member, lanes=4, capacity=200)
        sync(session, {0: prefix + questions[0], 1: other + questions[0]})
        session.release(0)
        fed = session.tokens_fed
        targets = {3: other + questions[1], 2: prefix + questions[2]}
        logits = sync(session, targets)
        assert session.tokens_fed == fed + 7 + 60 + 8
        assert_as_alone(member, targets, logits)
        session.release(1)
        targets = {2: [*targets[2], 5], 3: prefix + questions[1]}
        logits = sync(session, targets)
        assert session.tokens_fed == fed + 7 + 60 + 8 + 1 + 7
        assert_as_alone(member, targets, logits)

    def test_random_histories(self, tiny_smollm2: Member) -> None:
        """Rows that jump between branches of one tree of texts."""
        rng = random.Random(5)
        parts = pieces(tiny_smollm2, *[SHARED + 4] * 6)
        session = open_session(tiny_smollm2, lanes=4, capacity=100)
        total = 0
        for _ in range(4):
            chosen = rng.sample(range(4), rng.randint(2, 4))
            targets = {
                row: [id for _ in range(rng.randint(1, 3)) for id in parts[rng.randrange(2)]]
                + parts[2 + rng.randrange(4)][: rng.randint(1, 9)]
                for row in chosen
            }
            held = {row: common_prefix(session.ids(row), ids) for row, ids in targets.items()}
            total += sum(len(ids) - held[row] for row, ids in targets.items())
            assert_as_alone(tiny_smollm2, targets, sync(session, targets))
            assert [session.ids(row) for row in targets] == list(targets.values())
        assert session.tokens_fed < 0.85 * total


class TestFailures:
    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
    @pytest.mark.parametrize("place", ["first forward", "copy", "second forward"])
    def test_the_session_stays_usable(
        self, tiny_smollm2: Member, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
    ) -> None:
        """What fails half way leaves each row with what is surely in its cache."""
        prefix, *questions = pieces(tiny_smollm2, 80, 20, 25, 30)
        targets = {row: prefix + question for row, question in enumerate(questions)}
        session = open_session(tiny_smollm2, lanes=4)
        calls = 0

        def fail(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == (2 if place == "second forward" else 1):
                raise error

        copy = LaneCache.copy_prefix

        def half(cache: LaneCache, source: int, target: int, start: int, end: int) -> None:
            copy(cache, source, target, start, end // 2)
            fail()

        with monkeypatch.context() as patch:
            hook = tiny_smollm2.model.model.layers[1].register_forward_pre_hook(fail)
            if place == "copy":
                hook.remove()
                patch.setattr(LaneCache, "copy_prefix", half)
            with pytest.raises(type(error)):
                sync(session, targets)
            hook.remove()
        expected = {
            "first forward": [[], [], [], []],
            "copy": [[], [], targets[2], []],
            "second forward": [prefix, prefix, targets[2], []],
        }
        assert [session.ids(row) for row in range(4)] == expected[place]
        targets[3] = prefix[:70]
        assert_as_alone(tiny_smollm2, targets, sync(session, targets))


class TestPlan:
    def test_the_longest_of_each_group_goes(self) -> None:
        one, two = list(range(200)), list(range(500, 700))
        wanted = {4: [*one, 7], 1: [*two, 8], 0: [*one, 9], 2: [*two, 7]}
        assert fed_first(wanted, dict.fromkeys(wanted, 0), "cpu") == [4, 1]
        assert fed_first(wanted | {2: [*two, 7, 7]}, dict.fromkeys(wanted, 0), "cpu") == [2, 4]
        assert fed_first(wanted, dict.fromkeys(wanted, 200), "cpu") == list(wanted)
        # Row 0 holds what it shares; row 2 does not.
        assert fed_first(wanted, {4: 0, 1: 0, 0: 200, 2: 0}, "cpu") == [4, 1, 0]

    def test_nobody_waits_for_less_than_a_forward(self) -> None:
        """Two rows share 60 tokens: on a GPU one forward more costs more than they do."""
        wanted = {row: [*range(60), 100 + row] for row in range(2)}
        nothing = {0: 0, 1: 0}
        assert fed_first(wanted, nothing, "cpu") == [0]
        assert fed_first(wanted, nothing, "cuda") == [0, 1]
        assert cost({0: 61, 1: 61}, "cuda") == 128 + 2 * 61
        many = {row: [*range(60), 100 + row] for row in range(8)}
        assert fed_first(many, dict.fromkeys(many, 0), "cuda") == [0]

    def test_steps_are_not_taken_apart(self) -> None:
        """Rows that write the same text go on together."""
        wanted = {row: list(range(300)) for row in range(4)}
        assert fed_first(wanted, dict.fromkeys(wanted, 300 - SHARED), "cpu") == [0, 1, 2, 3]

    def test_common_prefix(self) -> None:
        rng = random.Random(3)
        for _ in range(300):
            left, right = ([rng.random() < 0.1 for _ in range(rng.randrange(12))] for _ in range(2))
            expected = next(
                (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
                min(len(left), len(right)),
            )
            assert common_prefix(left, right) == expected
