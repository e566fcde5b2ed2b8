"""What every backend's sessions promise (deepen_ext/members/backend.py), with one lane and with several."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from time import monotonic, sleep

import pytest
import torch
from asking import K, ask, assert_same, compare, fresh, opened, text
from subjects import SUBJECTS, Subject

from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.backend import Backend, Session


class TestAsk:
    def test_any_history_is_as_a_fresh_session(self, subject: Subject, lanes: int) -> None:
        """Growth and rollback, past the expected length, of any lanes in any order, several positions."""
        rng = random.Random(lanes)
        backward = forward = longest = 0
        with opened(subject.backend, lanes, capacity=20) as session:
            held = {lane: text(rng.randint(1, 40), lane) for lane in range(lanes)}
            ask(subject, session, held)
            for _ in range(14):
                for lane in rng.sample(range(lanes), rng.randint(1, lanes)):
                    kept = max(len(held[lane]) - rng.choice([0, 0, 1, 3, 25]), 0)
                    new = text(rng.choice([0, 1, 1, 2, 9, 30]), rng.random())
                    backward += kept < len(held[lane])
                    forward += bool(new)
                    held[lane] = (held[lane][:kept] + new)[: subject.context_length] or text(2, lane)
                    longest = max(longest, len(held[lane]))
                asked = {lane: held[lane] for lane in rng.sample(range(lanes), rng.randint(1, lanes))}
                counts = {lane: min(rng.choice([1, 1, 1, 2, 4]), len(ids)) for lane, ids in asked.items()}
                ask(subject, session, asked, rng.choice([counts, min(counts.values())]))
        assert min(backward, forward) > 3
        assert longest > 20

    def test_the_same_ids_again(self, subject: Subject, lanes: int) -> None:
        """They cost nothing; others cost what is new, not the whole text."""
        targets = {lane: text(60 + lane, lane) for lane in range(lanes)}
        with opened(subject.backend, lanes) as session:
            ask(subject, session, targets)
            for _ in range(2):
                said, spent = _spent(subject, lambda: session.ask(targets, K).wait())
                compare(subject, said, targets)
                assert spent in (0, None)
            for more in ([5], [6, 7]):
                longer = {lane: ids[:-1] + more for lane, ids in targets.items()}
                said, spent = _spent(subject, lambda longer=longer: session.ask(longer, K).wait())
                compare(subject, said, longer)
                assert spent is None or 0 < spent < lanes * 30 or not subject.cuts

    def test_another_k(self, subject: Subject) -> None:
        """The same tokens, fewer or more of them."""
        with opened(subject.backend) as session:
            whole = session.ask({0: text(15)}, K).wait().clone()
            for k in (3, K, 1):
                said = session.ask({0: text(15)}, k).wait()
                assert said.topk.ids.tolist() == whole.topk.ids[:, :k].tolist()
                assert_same(subject, said.top(k), [whole.top(k)])

    def test_to_the_end_of_the_context(self, subject: Subject, lanes: int) -> None:
        length = subject.context_length
        assert length is not None
        with opened(subject.backend, lanes) as session:
            for n in (length - 1, length):
                ask(subject, session, {lanes - 1: text(n)})

    def test_texts_that_begin_alike(self, subject: Subject) -> None:
        common = text(60)
        with opened(subject.backend, 4) as session:
            targets = {lane: [*common, *text(3 + 5 * lane, lane + 1)] for lane in range(4)}
            ask(subject, session, targets)
            ask(subject, session, {2: [*targets[0], 7], 3: [*common[:30], 8, 9]})

    def test_lanes_not_named_stay(self, subject: Subject) -> None:
        with opened(subject.backend, 3) as session:
            held = {lane: text(40 + lane, lane) for lane in range(3)}
            ask(subject, session, held)
            ask(subject, session, {1: [*held[1], 4, 5]})
            ask(subject, session, {1: text(3, 9)})
            said, spent = _spent(subject, lambda: session.ask({2: held[2], 0: held[0]}, K).wait())
            compare(subject, said, {2: held[2], 0: held[0]})
            assert spent in (0, None)
            ask(subject, session, {2: [*held[2], 6], 0: [*held[0], 7]})

    def test_what_is_said_belongs_to_its_answer(self, subject: Subject) -> None:
        """A copy of it does not change with what the session is asked next."""
        with opened(subject.backend, 2) as session:
            targets = {0: text(20), 1: text(25, 1)}
            copied = session.ask(targets, K).wait().clone()
            ask(subject, session, {0: text(22, 3), 1: text(27, 4)})
            compare(subject, copied, targets)


class TestPositions:
    @pytest.mark.parametrize("positions", [1, 2, 5, 9])
    def test_after_each_of_the_last_ids(self, subject: Subject, lanes: int, positions: int) -> None:
        targets = {lane: text(positions + 3 * lane, lane) for lane in reversed(range(lanes))}
        with opened(subject.backend, lanes) as session:
            ask(subject, session, targets, positions)

    @pytest.mark.parametrize("positions", [2, 5, 9])
    def test_more_than_is_new(self, subject: Subject, lanes: int, positions: int) -> None:
        """Of ids that the lane holds already, after a rollback, and of a draft."""
        held = {lane: text(20 + lane, lane) for lane in range(lanes)}
        with opened(subject.backend, lanes) as session:
            ask(subject, session, held)
            ask(subject, session, held, positions)
            ask(subject, session, held, positions - 1)
            held = {lane: ids[:-7] for lane, ids in held.items()}
            ask(subject, session, held, positions)
            held = {lane: [*ids, 3, *[4] * lane] for lane, ids in held.items()}
            ask(subject, session, held, positions)
            ask(subject, session, {0: [*held[0], *text(positions, 8)]}, positions + 1)
            ask(subject, session, held)

    @pytest.mark.parametrize("positions", [(1, 3, 2), (4, 4, 1), (2, 1, 9)])
    def test_of_each_lane_its_own(self, subject: Subject, positions: tuple[int, ...]) -> None:
        """Prompts, drafts of different lengths, their rollback, and lanes that hold their ids already."""
        counts = dict(enumerate(positions))
        held = {lane: text(20 + lane, lane) for lane in counts}
        with opened(subject.backend, 3) as session:
            ask(subject, session, held, counts)
            held = {lane: [*ids, *text(counts[lane], lane + 5)] for lane, ids in held.items()}
            ask(subject, session, held, counts)
            held = {lane: [*ids[: -counts[lane]], 3] for lane, ids in held.items()}
            ask(subject, session, {lane: held[lane] for lane in (2, 0, 1)}, counts)
            for lane in counts:  # beside two lanes that know theirs
                held[lane] = [*held[lane][:-1], 4, 5]
                ask(subject, session, held, counts)
            fewer = {lane: max(1, count - 1) for lane, count in counts.items()}
            said, spent = _spent(subject, lambda: session.ask(held, K, fewer).wait())
            compare(subject, said, held, fewer)
            assert spent in (0, None)
            # A lane that was fed beside a longer one has no distributions before its own new ids.
            held = {lane: [*ids, *text(counts[lane], lane + 9)] for lane, ids in held.items()}
            ask(subject, session, held, counts)
            ask(subject, session, held, {lane: count + 3 for lane, count in counts.items()})
            ask(subject, session, held, max(positions))

    def test_a_text_shorter_than_another_lanes_positions(self, subject: Subject, lanes: int) -> None:
        targets = {lane: text(1 + lane, lane) for lane in range(lanes - 1)} | {lanes - 1: text(12, 9)}
        counts = {lane: 1 + lane for lane in range(lanes - 1)} | {lanes - 1: 11}
        with opened(subject.backend, lanes) as session:
            ask(subject, session, targets, counts)
            ask(subject, session, targets)
            ask(subject, session, {lane: [*ids, 4] for lane, ids in targets.items()}, counts)

    def test_only_what_a_lane_needs_is_fed(self, subject: Subject) -> None:
        """Other lanes' positions cost a lane nothing."""
        held = {lane: text(40 + lane, lane) for lane in range(3)}
        more = {0: [*held[0], 5], 1: held[1], 2: [*held[2], 6]}
        with opened(subject.backend, 3) as session:
            ask(subject, session, held)
            said, spent = _spent(subject, lambda: session.ask(held, K, {0: 1, 1: 12, 2: 1}).wait())
            compare(subject, said, held, {0: 1, 1: 12, 2: 1})
            assert spent in (12, None) or not subject.cuts
            said, spent = _spent(subject, lambda: session.ask(more, K, {0: 1, 1: 12, 2: 1}).wait())
            compare(subject, said, more, {0: 1, 1: 12, 2: 1})
            assert spent is None or 0 < spent <= 3 or not subject.cuts

    def test_of_other_lanes_or_none(self, subject: Subject) -> None:
        """Said with the member's name, early: no lane has changed."""
        name = subject.backend.name
        held = {0: text(8), 1: text(9, 1)}
        more = {lane: [*ids, 5] for lane, ids in held.items()}
        wrong = {
            r"lanes \[0\] and texts for lanes \[0, 1\]": {0: 2},
            r"lanes \[0, 1, 2\] and texts for lanes \[0, 1\]": {0: 1, 1: 1, 2: 1},
            r"lanes \[\] and texts": {},
            "lane 1: positions is 0": {0: 3, 1: 0},
            "lane 0: positions is 1.5": {0: 1.5, 1: 1},
            "lane 1: 11 positions are asked for of a text of 10 tokens": {0: 1, 1: 11},
        }
        with opened(subject.backend, 2) as session:
            ask(subject, session, held)
            for message, positions in wrong.items():
                with pytest.raises(InputError, match=f"^{name}.*{message}"):
                    session.ask(more, K, positions)
            with pytest.raises(InputError, match=f"^{name}.*lanes"):
                session.ask({}, K, {0: 1})
            assert len(session.ask({}, K, {}).wait()) == 0
            said, spent = _spent(subject, lambda: session.ask(held, K).wait())
            compare(subject, said, held)
            assert spent in (0, None)

    def test_more_than_there_are(self, subject: Subject) -> None:
        name = subject.backend.name
        with opened(subject.backend, 2) as session:
            ask(subject, session, {0: text(8)})
            with pytest.raises(InputError, match=rf"{name}.*4 positions.*3 tokens"):
                session.ask({0: text(9), 1: text(3)}, K, 4)
            for positions in (0, -1):
                with pytest.raises(InputError, match=rf"{name}.*positions"):
                    session.ask({0: text(9)}, K, positions)
            ask(subject, session, {0: text(9), 1: text(3)}, 3)


def pick(logits: torch.Tensor, n: int) -> torch.Tensor:
    """One of the three most probable tokens, another one at each turn and in each lane."""
    turns = (torch.arange(len(logits), device=logits.device) + n) % 3
    return logits[:, :100].topk(3).indices.gather(1, turns[:, None])[:, 0]


class TestWrite:
    """Of the sessions that can: what they write is what `ask` gives token by token."""

    def test_as_asked_token_by_token(self, subject: Subject, lanes: int) -> None:
        """Prompts, what follows, rollbacks into what was written, some of the lanes in any order."""
        if not subject.backend.capabilities.writes:
            return
        rng = random.Random(lanes)
        with opened(subject.backend, lanes, capacity=20) as session:
            held = {lane: text(rng.randint(1, 40), lane) for lane in range(lanes)}
            for turn in range(12):
                named = rng.sample(range(lanes), rng.randint(1, lanes))
                for lane in named:
                    kept = max(len(held[lane]) - rng.choice([0, 1, 2, 5]), 1) if turn else None
                    held[lane] = [*held[lane][:kept], *text(rng.choice([0, 1, 1, 3]), rng.random())]
                written = write(subject, session, {lane: held[lane] for lane in named}, rng.choice([1, 3, 4]))
                for lane, ids in zip(named, written, strict=True):
                    held[lane] += ids
                if turn % 3 == 0:  # the lanes hold what was written, and what was said of it
                    last = {lane: held[lane] for lane in reversed(named)}
                    said, spent = _spent(subject, lambda last=last: session.ask(last, K, 2).wait())
                    compare(subject, said, last, 2)
                    assert spent in (0, None)
                if turn % 4 == 1:
                    ask(subject, session, {lane: [*ids[:-1], 7] for lane, ids in held.items()}, 1)

    def test_lanes_released_and_set_aside(self, subject: Subject) -> None:
        if not subject.backend.capabilities.writes:
            return
        with opened(subject.backend, 4) as session:
            held = {lane: text(15 + 4 * lane, lane) for lane in range(4)}
            ask(subject, session, held)
            session.set_aside(3)
            written = write(subject, session, {lane: held[lane] for lane in (2, 0, 1)}, 3)
            held |= {lane: held[lane] + ids for lane, ids in zip((2, 0, 1), written, strict=True)}
            session.release(0)  # the others move up, with what was written
            said, spent = _spent(subject, lambda: session.ask({1: held[1], 2: held[2]}, K, 3).wait())
            compare(subject, said, {1: held[1], 2: held[2]}, 3)
            assert spent in (0, None)
            write(subject, session, {3: held[3], 1: held[1][:-1]}, 4)
            list(session.read(2, held[2], len(held[2]) - 2, K))
            write(subject, session, {2: held[2], 1: held[1]}, 2)

    def test_to_the_end_of_the_context(self, subject: Subject) -> None:
        if not subject.backend.capabilities.writes:
            return
        name, length = subject.backend.name, subject.context_length
        assert length is not None
        ids = text(length - 3)
        with opened(subject.backend, 2) as session:
            with pytest.raises(InputError, match=f"{name}.*{length + 1} tokens exceed its context"):
                session.write({0: ids}, K, 4, pick)
            for wrong, message in (
                ({}, "nothing to write"),
                ({0: []}, "nothing to feed"),
                ({5: ids}, "lane 5"),
            ):
                with pytest.raises(InputError, match=f"{name}.*{message}"):
                    session.write(wrong, K, 1, pick)
            with pytest.raises(InputError, match=f"{name}.*number of tokens"):
                session.write({0: ids}, K, 0, pick)
            write(subject, session, {0: ids, 1: ids[:4]}, 3)

    def test_a_forward_that_fails(self, subject: Subject, lanes: int) -> None:
        """And a choice that fails: the lanes hold what they were brought to, and the session goes on."""
        if not subject.backend.capabilities.writes or subject.breaks is None:
            return

        def fail(logits: torch.Tensor, n: int) -> torch.Tensor:
            if n == 2:
                raise InputError("none of these")
            return pick(logits, n)

        held = {lane: text(20 + lane, lane) for lane in range(lanes)}
        with opened(subject.backend, lanes) as session:
            with failing(subject):
                session.write(held, K, 3, pick)
            ask(subject, session, held)
            with failing(subject):  # in the first forward of what is written
                session.write(held, K, 3, pick)
            with pytest.raises(InputError, match="none of these"):
                session.write(held, K, 3, fail)
            said, spent = _spent(subject, lambda: session.ask(held, K).wait())
            compare(subject, said, held)
            assert spent in (0, None)
            write(subject, session, held, 3)
        with opened(subject.backend, lanes) as session:
            write(subject, session, held, 2)


def write(subject: Subject, session: Session, targets: dict[int, list[int]], count: int) -> list[list[int]]:
    """Write by `pick`, and compare with what is asked token by token; the tokens of each lane."""
    tokens, said = session.write(targets, K, count, pick)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(targets), count)
    written = tokens.tolist()
    longer = {lane: ids + new for (lane, ids), new in zip(targets.items(), written, strict=True)}
    compare(subject, said, longer, count + 1)
    for n in range(count):
        assert pick(said.scores()[n :: count + 1], n).tolist() == [new[n] for new in written]
    return written


class TestRead:
    @pytest.mark.parametrize("start", [0, 7, 29])
    def test_it_says_what_ask_says(self, subject: Subject, lanes: int, start: int) -> None:
        ids = text(30)
        with opened(subject.backend, lanes) as session:
            ask(subject, session, {0: text(12)})
            blocks = list(session.read(lanes - 1, ids, start, K))
            _compare_blocks(subject, blocks, ids, start, range(start, 30, 4))
            said, spent = _spent(subject, lambda: session.ask({lanes - 1: ids}, K).wait())
            compare(subject, said, {lanes - 1: ids})
            assert spent is None or spent < 30 or not subject.cuts
            ask(subject, session, {lanes - 1: [*ids[:-2], 5]})

    def test_what_the_lane_holds_is_not_read_again(self, subject: Subject) -> None:
        """But for what comes after the start."""
        held, more = text(60), [*text(60), 4, 6]
        with opened(subject.backend, 2) as session:
            ask(subject, session, {0: held, 1: text(25, 1)})
            blocks, spent = _spent(subject, lambda: list(session.read(0, more, 59, K)))
            _compare_blocks(subject, blocks, more, 59, range(59, 62))
            assert spent is None or 0 < spent < 30 or not subject.cuts
            ask(subject, session, {1: [*text(25, 1), 3]})

    def test_in_blocks_while_another_lane_is_asked(self, subject: Subject) -> None:
        """A block is the caller's to keep: what comes after it does not change it."""
        length = subject.context_length or 200
        ids = text(length)
        with opened(subject.backend, 2) as session:
            ask(subject, session, {1: text(10, 1)})
            reading = session.read(0, ids, 5, K)
            blocks = [next(reading)]
            kept = blocks[0].clone()
            ask(subject, session, {1: [*text(10, 1), 3]})
            blocks += reading
            ask(subject, session, {1: text(8, 1)})
            assert_same(subject, blocks[0], [kept.at([i]) for i in range(len(kept))])
            _compare_blocks(subject, blocks, ids, 5, [5, 6, 50, length // 2, length - 2, length - 1])
            ask(subject, session, {0: ids})

    def test_dropped_half_way(self, subject: Subject, lanes: int) -> None:
        ids = text(subject.context_length or 200)
        with opened(subject.backend, lanes) as session:
            next(session.read(lanes - 1, ids, 0, K))
            ask(subject, session, {lanes - 1: ids[:40]})
            session.read(lanes - 1, ids, 0, K)  # not even begun
            ask(subject, session, {lanes - 1: [*ids[:41], 9], 0: ids[:42]})

    def test_a_start_that_is_no_position(self, backend: Backend) -> None:
        with opened(backend) as session:
            for start in (-1, 5):
                with pytest.raises(InputError, match=f"{backend.name}.*choose 0 to 4"):
                    session.read(0, text(5), start, K)


class TestLanes:
    def test_released_and_set_aside(self, subject: Subject) -> None:
        with opened(subject.backend, 5) as session:
            held = {lane: text(15 + 4 * lane, lane) for lane in range(5)}
            ask(subject, session, held)
            session.set_aside(1)
            session.set_aside(1)  # no harm
            session.release(3)
            held = {lane: [*held[lane], 5] for lane in (0, 2, 4)}
            ask(subject, session, held)
            session.release(0)
            ask(subject, session, {4: [*held[4], 6], 2: held[2][:-4]}, 3)
            ask(subject, session, {1: [*text(19, 1), 7]})  # from where it was
            for lane in (1, 2, 4):
                session.set_aside(lane)
            ask(subject, session, {2: held[2], 1: text(19, 1), 4: held[4]})

    def test_lanes_that_are_emptied_and_asked_again(self, subject: Subject) -> None:
        with opened(subject.backend, 4) as session:
            for lane in range(4):
                session.set_aside(lane, forget=True)  # nothing was asked yet
            held = {lane: text(15 + 4 * lane, lane) for lane in range(3)}
            ask(subject, session, held)
            session.set_aside(0, forget=True)
            ask(subject, session, {2: [*held[2], 4], 1: [*held[1], 3]})
            said, spent = _spent(subject, lambda: session.ask({0: held[0]}, K).wait())
            compare(subject, said, {0: held[0]})
            assert spent in (len(held[0]), None)  # nothing of it was kept
            session.set_aside(1)
            session.set_aside(2, forget=True)
            ask(subject, session, {3: text(9, 7), 0: [*held[0], 8]}, 2)
            ask(subject, session, {1: [*held[1], 3, 6], 2: text(12, 9), 0: held[0], 3: text(9, 7)})

    def test_a_lane_takes_the_next_text(self, subject: Subject) -> None:
        with opened(subject.backend, 2) as session:
            ask(subject, session, {0: text(30), 1: text(20, 1)})
            ask(subject, session, {0: text(10, 5), 1: [*text(20, 1), 4]})

    def test_lanes_that_cannot_be_asked(self, subject: Subject) -> None:
        backend = subject.backend
        with opened(backend, 2) as session:
            ask(subject, session, {0: text(4), 1: text(5)})
            session.release(1)
            for lane, why in ((1, "was released"), (2, "is not one of"), (-1, "is not one of")):
                for call in _calls(session, lane):
                    with pytest.raises(InputError, match=f"{backend.name}.*lane {lane} {why}"):
                        call()
            ask(subject, session, {0: text(6)})
        for count in (0, -1):
            with pytest.raises(InputError, match=f"{backend.name}.*lanes"):
                backend.open(count)

    def test_closing(self, subject: Subject) -> None:
        name = subject.backend.name
        session = subject.backend.open(2)
        ask(subject, session, {0: text(9)})
        session.close()
        session.close()
        for call in _calls(session, 0):
            with pytest.raises(InputError, match=name):
                call()
        subject.backend.open(2).close()  # never asked


class TestSessionsDoNotMeet:
    def test_of_one_backend(self, subject: Subject) -> None:
        """All are asked before any is waited for."""
        with opened(subject.backend, 2) as one, opened(subject.backend, 2) as other:
            for length in (10, 11, 14):
                mine = {0: text(length), 1: text(length, 1)}
                theirs = {0: text(length, 2), 1: text(length, 3)}
                answers = [one.ask(mine, K), other.ask(theirs, K)]
                for answer, targets in zip(answers, (mine, theirs), strict=True):
                    compare(subject, answer.wait(), targets)

    def test_an_answer_is_ready_some_time(self, subject: Subject) -> None:
        """Whoever looks does not wait, and changes nothing."""
        with opened(subject.backend, 2) as session:
            for length in (12, 14):
                targets = {0: text(length), 1: text(length + 2, 1)}
                answer, end = session.ask(targets, K), monotonic() + 30
                while not answer.ready():
                    assert monotonic() < end
                    sleep(0.001)
                assert answer.ready()
                compare(subject, answer.wait(), targets)

    def test_one_after_the_other(self, subject: Subject) -> None:
        """What a session leaves behind is not in the next one."""
        for lanes, length in ((2, 50), (2, 20), (3, 20), (2, 300)):
            with opened(subject.backend, lanes, capacity=length) as session:
                ask(subject, session, {lane: text(30 - lane, lane + length) for lane in range(lanes)})

    def test_in_threads(self, subject: Subject) -> None:
        """Each thread has a session of its own."""
        texts = [[text(n, seed) for n in range(20, 32)] for seed in range(3)]
        for ids in [ids for own in texts for ids in own]:
            fresh(subject, ids)
        with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
            sessions = [stack.enter_context(opened(subject.backend, 2)) for _ in texts]

            def write(session: Session, own: list[list[int]]) -> None:
                for ids in own:
                    ask(subject, session, {0: ids, 1: own[0]})

            for done in [pool.submit(write, *one) for one in zip(sessions, texts, strict=True)]:
                done.result()


def test_backends_are_asked_together() -> None:
    """All kinds at once, before any is waited for: the same as one after the other."""
    subjects = [make() for make in SUBJECTS.values()]
    with ExitStack() as stack:
        sessions = [stack.enter_context(opened(one.backend, 2)) for one in subjects]
        for length in (12, 13, 9):
            targets = {1: text(length), 0: text(length + 4, 1)}
            answers = [session.ask(targets, K, 2) for session in sessions]
            for subject, answer in zip(subjects, answers, strict=True):
                compare(subject, answer.wait(), targets, 2)


class TestErrors:
    @pytest.mark.parametrize("wrong", ["nothing", "beyond the vocabulary", "negative", "too long"])
    def test_wrong_ids(self, subject: Subject, lanes: int, wrong: str) -> None:
        """Said with the member's name, early: no lane has changed."""
        name, last = subject.backend.name, subject.vocab_size - 1
        assert subject.context_length is not None
        too_many = subject.context_length + 1
        ids, message = {
            "nothing": ([], "nothing to feed"),
            "beyond the vocabulary": ([3, last + 1], rf"0\.\.{last}"),
            "negative": ([-1], rf"0\.\.{last}"),
            "too long": (text(too_many), f"{too_many} tokens exceed its context of {too_many - 1}"),
        }[wrong]
        with opened(subject.backend, lanes) as session:
            held = {lane: text(8 + lane, lane) for lane in range(lanes)}
            ask(subject, session, held)
            with pytest.raises(InputError, match=f"{name}.*{message}"):
                session.ask({lane: [*own, 5] for lane, own in held.items()} | {lanes - 1: ids}, K)
            with pytest.raises(InputError, match=f"{name}.*{message}"):
                session.read(0, ids, 0, K)
            said, spent = _spent(subject, lambda: session.ask(held, K).wait())
            compare(subject, said, held)
            assert spent in (0, None)
            ask(subject, session, {lane: [*own, 6] for lane, own in held.items()})

    @pytest.mark.parametrize("positions", [1, 3])
    def test_a_forward_that_fails(self, subject: Subject, lanes: int, positions: int) -> None:
        """An error with the member's name, and the session goes on: a first forward, a later one, a read."""
        if subject.breaks is None:
            return  # its forward passes cannot be made to fail
        held = {lane: text(20 + lane, lane) for lane in range(lanes)}
        more = {lane: [*ids[:-2], 4, 5, 6] for lane, ids in held.items()}
        with opened(subject.backend, lanes) as session:
            with failing(subject):
                session.ask(held, K, positions).wait()
            ask(subject, session, held)
            with failing(subject):
                session.ask(more, K, positions).wait()
            ask(subject, session, {0: held[0]}, positions)
            with failing(subject):
                session.ask({lanes - 1: more[lanes - 1]}, K, positions).wait()
            ask(subject, session, more, positions)
            with failing(subject):
                list(session.read(0, text(30, 9), 3, K))
            ask(subject, session, held)
        with opened(subject.backend, lanes) as session:
            ask(subject, session, more)


@contextmanager
def failing(subject: Subject) -> Iterator[None]:
    """Forward passes fail, and the error says whose and why."""
    assert subject.breaks is not None
    with subject.breaks() as why, pytest.raises(ModelError, match=f"^{subject.backend.name}: .*{why}"):
        yield


def _spent(subject: Subject, call: Callable) -> tuple:
    """What a call returns, and how many tokens the model read for it; None where nobody can see that."""
    before = None if subject.fed is None else subject.fed()
    found = call()
    return found, None if before is None else subject.fed() - before


def _calls(session: Session, lane: int) -> list[Callable]:
    return [
        lambda: session.ask({lane: text(3)}, K),
        lambda: session.read(lane, text(3), 0, K),
        lambda: session.release(lane),
        lambda: session.set_aside(lane),
    ]


def _compare_blocks(subject: Subject, blocks: list, ids: list[int], start: int, positions) -> None:
    """Blocks of a read from a start, at some positions of the ids."""
    found = [block.at([i]) for block in blocks for i in range(len(block))]
    assert len(found) == len(ids) - start
    for at in positions:
        assert_same(subject, found[at - start], [fresh(subject, ids[: at + 1])])
