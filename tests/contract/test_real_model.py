"""One history of a real model, SmolLM2, with its logits and without, against its plain forward passes."""

from __future__ import annotations

import random

import pytest
import torch
from asking import K, ask, opened
from subjects import Subject, top_k_only

from deepen_ext.members.distribution import Distribution
from deepen_ext.members.member import Member

TEXTS = (
    "The Eiffel Tower is in the city of Paris, and so is the Louvre. Water boils at a hundred degrees.",
    "The Eiffel Tower is in the city of Lights: def fib(n):\n    return n if n < 2 else fib(n - 1)",
    "Il était une fois, dans une ville de France qui passait pour être la plus belle, un vieux roi.",
)


@pytest.fixture(scope="module")
def texts(smollm2: Member) -> list[list[int]]:
    return [smollm2.vocabulary.prefix_ids + smollm2.vocabulary.encode(one) for one in TEXTS]


@pytest.fixture(scope="module", params=["with its logits", "top-k only"])
def real(request: pytest.FixtureRequest, smollm2: Member, texts: list[list[int]]) -> Subject:
    """What it should say after every prefix of the texts is known."""
    backend = smollm2.backend
    full = Subject(
        backend,
        vocab_size=backend.vocab_size,
        context_length=backend.context_length,
        device=backend.device,
        dtype="float32",
        other_weights=lambda: (backend, backend),
        tolerance=1e-3,
    )
    subject = full if request.param == "with its logits" else top_k_only(full, K)
    for ids in texts:
        with torch.inference_mode():
            logits = smollm2.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for n in range(1, len(ids) + 1):
            subject.said[tuple(ids[:n])] = Distribution(
                backend.name, backend.vocab_size, K, logits[n - 1 : n]
            )
    return subject


@pytest.mark.slow
def test_a_history(real: Subject, texts: list[list[int]]) -> None:
    rng = random.Random(0)
    known = len(real.said)
    with opened(real.backend, 5, capacity=20) as session:
        for _ in range(8):
            asked = {lane: rng.choice(texts) for lane in rng.sample(range(5), rng.randint(1, 5))}
            asked = {lane: ids[: rng.randint(4, len(ids))] for lane, ids in asked.items()}
            ask(real, session, asked, rng.choice([1, 1, 3]))
        session.set_aside(1)
        session.release(3)
        ask(real, session, {4: texts[0], 0: texts[1][:9]}, 4)
        ask(real, session, {1: texts[2], 2: texts[1]})
    assert len(real.said) == known  # none of them was asked of a session
