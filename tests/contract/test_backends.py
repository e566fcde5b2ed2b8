"""What every backend promises (deepen_ext/members/backend.py), with one lane and with several.

The oracle of a text is the backend's own fresh session, fed the whole text at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch
from subjects import CONTEXT, SUBJECTS, VOCAB, Subject

from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.backend import Backend, Session, require
from deepen_ext.members.distribution import Distribution

K = 12


@pytest.fixture(scope="module", params=list(SUBJECTS))
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]()


@pytest.fixture
def backend(subject: Subject) -> Backend:
    return subject.backend


@pytest.fixture(params=[1, 2, 5])
def lanes(request: pytest.FixtureRequest) -> int:
    return request.param


@contextmanager
def opened(backend: Backend, lanes: int = 1, capacity: int = 0) -> Iterator[Session]:
    session = backend.open(lanes, capacity)
    try:
        yield session
    finally:
        session.close()


def text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def fresh(subject: Subject, ids: Sequence[int], k: int = K) -> Distribution:
    """What the backend says after these ids, asked of nothing else."""
    with opened(subject.backend) as session:
        return session.ask({0: ids}, k).wait().clone()


def assert_same(subject: Subject, found: Distribution, wanted: Sequence[Distribution]) -> None:
    """Position by position the same probabilities; ids too, but for ties within the tolerance."""
    assert len(found) == len(wanted)
    for i, one in enumerate(wanted):
        got, want = found.at([i]).topk, one.topk
        assert got.probs.shape == want.probs.shape
        torch.testing.assert_close(got.probs, want.probs, atol=subject.tolerance, rtol=0)
        torch.testing.assert_close(got.tail, want.tail, atol=10 * subject.tolerance, rtol=0)
        apart = got.ids[0] != want.ids[0]
        assert bool((want.probs[0][apart] - got.probs[0][apart]).abs().le(subject.tolerance).all())
        assert int(apart.sum()) <= 2
        if one.logits is not None:
            own = found.at([i]).scores().softmax(-1)
            torch.testing.assert_close(own, one.scores().softmax(-1), atol=subject.tolerance, rtol=0)


def ask_and_compare(
    subject: Subject, session: Session, targets: Mapping[int, Sequence[int]], positions: int = 1
) -> None:
    found = session.ask(targets, K, positions).wait()
    wanted = [
        fresh(subject, ids[: len(ids) - back])
        for ids in targets.values()
        for back in range(positions - 1, -1, -1)
    ]
    assert_same(subject, found, wanted)


class TestWhatComesBack:
    def test_facts(self, backend: Backend) -> None:
        assert backend.name
        assert backend.vocab_size == VOCAB
        assert backend.context_length == CONTEXT
        assert backend.device == torch.device("cpu")
        described = backend.describe()
        assert described.architecture
        assert described.dtype == "float32"
        for figure in (described.parameters, described.weights_bytes, described.cache_bytes):
            assert figure is None or figure > 0

    def test_a_distribution_is_what_the_capabilities_say(self, backend: Backend) -> None:
        able = backend.capabilities
        with opened(backend) as session:
            for k in (1, 5, VOCAB + 10):
                said = session.ask({0: text(9)}, k).wait()
                size = min(k, able.max_topk or k, VOCAB)
                assert (said.logits is not None) == able.logits
                assert said.vocab_size == VOCAB
                assert len(said) == 1
                topk = said.topk
                assert topk.ids.shape == topk.probs.shape == (1, size)
                assert topk.ids.dtype == torch.int32
                assert topk.probs.dtype == topk.tail.dtype == torch.float32
                assert topk.status.tolist() == [0]
                assert len(set(topk.ids[0].tolist())) == size
                assert bool((topk.probs[0].diff() <= 0).all())
                assert float(topk.probs.sum() + topk.tail) == pytest.approx(1, abs=1e-5)
                if said.logits is not None:
                    assert said.logits.shape == (1, VOCAB)
                    best = said.logits.float().softmax(-1).topk(size)
                    torch.testing.assert_close(topk.probs, best.values)

    def test_tokens_depend_on_the_whole_text(self, subject: Subject) -> None:
        """Else nothing below would show anything."""
        ids = text(30)
        said = fresh(subject, ids).topk
        for changed in (0, 10, 28):
            other = fresh(subject, [*ids[:changed], (ids[changed] + 1) % VOCAB, *ids[changed + 1 :]]).topk
            assert float((said.probs - other.probs).abs().max()) > 20 * subject.tolerance

    def test_nothing_asked_is_nothing_said(self, backend: Backend) -> None:
        with opened(backend) as session:
            assert len(session.ask({}, K).wait()) == 0


class TestAsk:
    def test_any_history_is_as_a_fresh_session(self, subject: Subject, lanes: int) -> None:
        """Growth, rollback and both at once, past the expected length, of any lanes in any order."""
        rng = random.Random(lanes)
        with opened(subject.backend, lanes, capacity=20) as session:
            held = {lane: text(rng.randint(1, 40), lane) for lane in range(lanes)}
            ask_and_compare(subject, session, held)
            for _ in range(14):
                for lane in rng.sample(range(lanes), rng.randint(1, lanes)):
                    kept = held[lane][: max(len(held[lane]) - rng.choice([0, 0, 1, 3, 25]), 0)]
                    held[lane] = kept + text(rng.choice([1, 1, 2, 9, 30]), rng.random())
                    held[lane] = held[lane][: CONTEXT - 1]
                asked = rng.sample(range(lanes), rng.randint(1, lanes))
                ask_and_compare(subject, session, {lane: held[lane] for lane in asked})

    def test_the_same_ids_again(self, subject: Subject, lanes: int) -> None:
        targets = {lane: text(20 + lane, lane) for lane in range(lanes)}
        with opened(subject.backend, lanes) as session:
            for _ in range(3):
                ask_and_compare(subject, session, targets)

    def test_another_k(self, subject: Subject) -> None:
        with opened(subject.backend) as session:
            for k in (3, K, 1):
                found = session.ask({0: text(15)}, k).wait()
                assert_same(subject, found, [fresh(subject, text(15), k)])

    def test_to_the_end_of_the_context(self, subject: Subject, lanes: int) -> None:
        with opened(subject.backend, lanes) as session:
            for length in (CONTEXT - 1, CONTEXT):
                ask_and_compare(subject, session, {lanes - 1: text(length)})

    def test_texts_that_begin_alike(self, subject: Subject) -> None:
        common = text(60)
        with opened(subject.backend, 4) as session:
            targets = {lane: [*common, *text(3 + 5 * lane, lane + 1)] for lane in range(4)}
            ask_and_compare(subject, session, targets)
            ask_and_compare(subject, session, {2: [*targets[0], 7], 3: [*common[:30], 8, 9]})

    def test_lanes_not_named_stay(self, subject: Subject) -> None:
        with opened(subject.backend, 3) as session:
            held = {lane: text(12 + lane, lane) for lane in range(3)}
            ask_and_compare(subject, session, held)
            ask_and_compare(subject, session, {1: [*held[1], 4, 5]})
            ask_and_compare(subject, session, {2: [*held[2], 6], 0: [*held[0], 7]})

    def test_all_ask_then_all_wait(self, subject: Subject) -> None:
        """Sessions of one backend do not meet."""
        with opened(subject.backend, 2) as one, opened(subject.backend, 2) as other:
            for length in (10, 11, 14):
                mine = {0: text(length), 1: text(length, 1)}
                theirs = {0: text(length, 2), 1: text(length, 3)}
                answers = [one.ask(mine, K), other.ask(theirs, K)]
                said = [answer.wait() for answer in answers]
                for found, targets in zip(said, (mine, theirs), strict=True):
                    assert_same(subject, found, [fresh(subject, ids) for ids in targets.values()])


class TestPositions:
    @pytest.mark.parametrize("positions", [1, 2, 5, 9])
    def test_after_each_of_the_last_ids(self, subject: Subject, lanes: int, positions: int) -> None:
        targets = {lane: text(positions + 3 * lane, lane) for lane in range(lanes)}
        with opened(subject.backend, lanes) as session:
            ask_and_compare(subject, session, targets, positions)

    @pytest.mark.parametrize("positions", [2, 4])
    def test_more_than_is_new(self, subject: Subject, lanes: int, positions: int) -> None:
        """Of ids that the lane holds already, after a rollback, and of a draft."""
        held = {lane: text(30 + lane, lane) for lane in range(lanes)}
        with opened(subject.backend, lanes) as session:
            ask_and_compare(subject, session, held)
            ask_and_compare(subject, session, held, positions)
            held = {lane: ids[:-7] for lane, ids in held.items()}
            ask_and_compare(subject, session, held, positions)
            held = {lane: [*ids, 3] for lane, ids in held.items()}
            ask_and_compare(subject, session, held, positions)
            ask_and_compare(subject, session, {0: [*held[0], *text(positions, 8)]}, positions + 1)
            ask_and_compare(subject, session, held)

    def test_more_than_there_are(self, backend: Backend) -> None:
        with opened(backend, 2) as session:
            with pytest.raises(InputError, match=rf"{backend.name}.*4 positions.*3 tokens"):
                session.ask({0: text(9), 1: text(3)}, K, 4)
            with pytest.raises(InputError, match=f"{backend.name}.*positions"):
                session.ask({0: text(9)}, K, 0)


class TestRead:
    @pytest.mark.parametrize("start", [0, 7, 29])
    def test_it_says_what_ask_says(self, subject: Subject, lanes: int, start: int) -> None:
        ids = text(30)
        with opened(subject.backend, lanes) as session:
            blocks = list(session.read(lanes - 1, ids, start, K))
            found = [block.at([i]) for block in blocks for i in range(len(block))]
            assert len(found) == len(ids) - start
            for i in {0, len(found) // 2, len(found) - 1}:
                assert_same(subject, found[i], [fresh(subject, ids[: start + i + 1])])
            ask_and_compare(subject, session, {lanes - 1: [*ids, 5]})

    def test_what_the_lane_holds_counts_up_to_the_start(self, subject: Subject) -> None:
        with opened(subject.backend, 2) as session:
            ask_and_compare(subject, session, {0: text(20), 1: text(25, 1)})
            (block,) = session.read(0, [*text(20), 4, 6], 19, K)
            assert_same(subject, block, [fresh(subject, [*text(20), 4, 6][:n]) for n in (20, 21, 22)])
            ask_and_compare(subject, session, {1: [*text(25, 1), 3]})

    def test_dropped_half_way(self, subject: Subject) -> None:
        with opened(subject.backend) as session:
            next(iter(session.read(0, text(CONTEXT), 0, K)))
            ask_and_compare(subject, session, {0: text(40)})

    def test_a_start_that_is_no_position(self, backend: Backend) -> None:
        with opened(backend) as session:
            for start in (-1, 5):
                with pytest.raises(InputError, match=f"{backend.name}.*choose 0 to 4"):
                    session.read(0, text(5), start, K)


class TestLanes:
    def test_released_and_set_aside(self, subject: Subject) -> None:
        with opened(subject.backend, 5) as session:
            held = {lane: text(15 + 4 * lane, lane) for lane in range(5)}
            ask_and_compare(subject, session, held)
            session.set_aside(1)
            session.set_aside(1)  # no harm
            session.release(3)
            held = {lane: [*held[lane], 5] for lane in (0, 2, 4)}
            ask_and_compare(subject, session, held)
            session.release(0)
            ask_and_compare(subject, session, {4: [*held[4], 6], 2: held[2][:-4]})
            ask_and_compare(subject, session, {1: [*text(19, 1), 7]})  # from where it was

    def test_a_lane_takes_the_next_text(self, subject: Subject) -> None:
        with opened(subject.backend, 2) as session:
            ask_and_compare(subject, session, {0: text(30), 1: text(20, 1)})
            ask_and_compare(subject, session, {0: text(10, 5), 1: [*text(20, 1), 4]})

    def test_lanes_that_cannot_be_asked(self, backend: Backend) -> None:
        with opened(backend, 2) as session:
            session.ask({0: text(4), 1: text(5)}, K).wait()
            session.release(1)
            for lane, why in ((1, "was released"), (2, "is not one of"), (-1, "is not one of")):
                for call in (
                    lambda lane=lane: session.ask({lane: text(3)}, K),
                    lambda lane=lane: session.read(lane, text(3), 0, K),
                    lambda lane=lane: session.release(lane),
                    lambda lane=lane: session.set_aside(lane),
                ):
                    with pytest.raises(InputError, match=f"{backend.name}.*lane {lane} {why}"):
                        call()
        with pytest.raises(InputError, match=f"{backend.name}.*lanes"):
            backend.open(0)

    def test_closing(self, backend: Backend) -> None:
        session = backend.open(2)
        session.ask({0: text(9)}, K).wait()
        session.close()
        session.close()
        assert sum(session.bytes_held.values()) == 0
        with pytest.raises(InputError, match=backend.name):
            session.ask({0: text(9)}, K)


class TestErrors:
    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([], "nothing to feed"),
            ([3, VOCAB], rf"0\.\.{VOCAB - 1}"),
            ([-1], rf"0\.\.{VOCAB - 1}"),
            (text(CONTEXT + 1), f"{CONTEXT + 1} tokens exceed its context of {CONTEXT}"),
        ],
    )
    def test_wrong_ids(self, subject: Subject, ids: list[int], message: str) -> None:
        """Said with the member's name, early: no lane has changed."""
        with opened(subject.backend, 3) as session:
            held = {lane: text(8 + lane, lane) for lane in range(3)}
            ask_and_compare(subject, session, held)
            with pytest.raises(InputError, match=f"{subject.backend.name}.*{message}"):
                session.ask({0: [*held[0], 5], 2: ids}, K)
            with pytest.raises(InputError, match=f"{subject.backend.name}.*{message}"):
                session.read(1, ids, 0, K)
            ask_and_compare(subject, session, {lane: [*ids, 6] for lane, ids in held.items()})

    def test_a_forward_that_fails(self, subject: Subject, lanes: int) -> None:
        """An error with the member's name, and the session goes on."""
        held = {lane: text(20 + lane, lane) for lane in range(lanes)}
        more = {lane: [*ids[:-2], 4, 5, 6] for lane, ids in held.items()}
        with opened(subject.backend, lanes) as session:
            ask_and_compare(subject, session, held)
            with subject.breaks(), pytest.raises(ModelError, match=f"{subject.backend.name}.*out of luck"):
                session.ask(more, K).wait()
            ask_and_compare(subject, session, more)
            with subject.breaks(), pytest.raises(ModelError, match=f"{subject.backend.name}.*out of luck"):
                list(session.read(0, text(30, 9), 3, K))
            ask_and_compare(subject, session, held)

    def test_what_it_lacks_is_refused_by_name(self, backend: Backend) -> None:
        if backend.capabilities.logits:
            require(backend, "logits", "this")
            return
        with pytest.raises(InputError, match=rf"{backend.name}: .*this.*'logits'"):
            require(backend, "logits", "this")


class TestMemory:
    def test_more_lanes_and_tokens_take_more(self, backend: Backend) -> None:
        one = sum(backend.bytes_needed(1, 100).values())
        assert one > 0
        assert sum(backend.bytes_needed(4, 100).values()) > one
        assert sum(backend.bytes_needed(1, CONTEXT * 9).values()) > one

    def test_what_a_session_holds(self, backend: Backend) -> None:
        with opened(backend, 2) as session:
            session.ask({0: text(60), 1: text(50)}, K).wait()
            held = session.bytes_held
            assert 0 < sum(held.values()) <= sum(backend.bytes_needed(2, 60).values())
            assert set(held) <= set(backend.bytes_needed(2, 60))

    def test_closing_the_backend(self, subject: Subject) -> None:
        subject.backend.close()
        ask_and_compare(subject, subject.backend.open(), {0: text(5)})


class TestFingerprint:
    def test_other_weights_tell(self, subject: Subject) -> None:
        changed, coarse = subject.other_weights()
        assert subject.backend.fingerprint() == subject.backend.fingerprint()
        assert subject.backend.fingerprint() != changed.fingerprint()
        assert subject.backend.fingerprint(torch.bfloat16) == coarse.fingerprint(torch.bfloat16)
        assert changed.fingerprint(torch.bfloat16) != coarse.fingerprint(torch.bfloat16)
