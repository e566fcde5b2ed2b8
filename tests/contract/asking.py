"""Asking sessions, and what they should say: what a fresh session of the backend says of the text at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from subjects import Subject

from deepen_ext.members.backend import Backend, Session
from deepen_ext.members.distribution import Distribution

K = 12


@contextmanager
def opened(backend: Backend, lanes: int = 1, capacity: int = 0) -> Iterator[Session]:
    session = backend.open(lanes, capacity)
    try:
        yield session
    finally:
        session.close()


def text(length: int, seed: float = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100) for _ in range(length)]


def fresh(subject: Subject, ids: Sequence[int]) -> Distribution:
    """What the backend says after these ids, asked of nothing else."""
    if (known := subject.said.get(tuple(ids))) is not None:
        return known
    with opened(subject.backend) as session:
        said = session.ask({0: ids}, K).wait().clone()
    if subject.plain is not None:
        logits = subject.plain(ids)[-1:].contiguous()
        plain = Distribution(said.name, subject.vocab_size, said.k, logits)
        loose = subject.plain_tolerance
        assert_same(subject if loose is None else replace(subject, tolerance=loose), said, [plain])
    subject.said[tuple(ids)] = said
    return said


def assert_same(subject: Subject, found: Distribution, wanted: Sequence[Distribution]) -> None:
    """Position by position the same log-probabilities, of the same tokens but for near-ties."""
    assert len(found) == len(wanted)
    for i, want in enumerate(wanted):
        got = found.at([i])
        assert_same_top(subject, got, want)
        if got.logits is not None and want.logits is not None:
            close(subject, got.logits.float().log_softmax(-1), want.logits.float().log_softmax(-1))


def assert_same_top(subject: Subject, found: Distribution, wanted: Distribution) -> None:
    got, want = found.topk, wanted.topk
    assert got.status.tolist() == want.status.tolist() == [0]
    close(subject, got.probs.log(), want.probs.log())
    close(subject, got.tail, want.tail)
    # A token that only one of the two has is about as probable as the last one of the other.
    tokens = [dict(zip(one.ids[0].tolist(), one.probs[0].log().tolist(), strict=True)) for one in (got, want)]
    last = [min(one.values()) for one in tokens]
    for token in tokens[0] | tokens[1]:
        here, there = (one.get(token, end) for one, end in zip(tokens, last, strict=True))
        assert abs(here - there) <= subject.tolerance, (token, tokens)


def close(subject: Subject, found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=subject.tolerance, rtol=0)


def compare(
    subject: Subject,
    found: Distribution,
    targets: Mapping[int, Sequence[int]],
    positions: int | Mapping[int, int] = 1,
) -> None:
    """The answer for these targets: lane after lane in their order, each position in the order of the ids."""
    counts = positions if isinstance(positions, Mapping) else dict.fromkeys(targets, positions)
    texts = [ids[: len(ids) - n] for lane, ids in targets.items() for n in reversed(range(counts[lane]))]
    assert_same(subject, found, [fresh(subject, ids) for ids in texts])


def ask(
    subject: Subject,
    session: Session,
    targets: Mapping[int, Sequence[int]],
    positions: int | Mapping[int, int] = 1,
) -> None:
    """Ask, and compare."""
    compare(subject, session.ask(targets, K, positions).wait(), targets, positions)
