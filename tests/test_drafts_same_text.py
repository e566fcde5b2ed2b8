"""The text is the same with and without drafts, whatever is asked for: generations at random.

    DEEPEN_DRAFT_CYCLES=10000 DEEPEN_DRAFT_SEED=1 python -m pytest -n 0 -s tests/test_drafts_same_text.py

writes more of them, from another seed, and prints what they were. A cycle here is a draft of one text that
was verified. The texts without drafts, which they are held against, are not counted.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from draft_cases import Cases, differences, drafts_of
from far_backend import FarBackend, far, some_elsewhere
from tiny_models import AWKWARD, PROSE, tiny_of_tokenizer, tiny_reader
from transformers import Qwen2Config

from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.members.member import Member

CYCLES = int(os.environ.get("DEEPEN_DRAFT_CYCLES", "100"))
CASES = 14  # fewer may not have every way to end a text; how many cycles they are depends on the clock
SEED = int(os.environ.get("DEEPEN_DRAFT_SEED", "0"))


@pytest.fixture(scope="module")
def members(
    tiny_smollm2: Member,
    tiny_gemma: Member,
    qwen_tokenizer_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Member]:
    """Each has read another part of the same text."""
    qwen = tiny_of_tokenizer(tmp_path_factory.mktemp("qwen"), qwen_tokenizer_dir, Qwen2Config)
    layers = ["sliding_attention", "full_attention"]
    two = {"num_hidden_layers": 2, "layer_types": layers}
    one = {"num_hidden_layers": 1}
    read = [
        tiny_reader(tiny_smollm2, "smollm2", PROSE + AWKWARD, seed=1, **one),
        tiny_reader(tiny_gemma, "gemma", AWKWARD + PROSE[1200:], seed=2, **two),
        tiny_reader(qwen, "qwen", PROSE[:3000] + AWKWARD * 2, seed=3, layer_types=layers[1:], **one),
    ]
    return {member.name: far(member) for member in read}


@pytest.mark.slow
def test_the_same_with_and_without_drafts(members: dict[str, Member]) -> None:
    cases = Cases(members)
    seen: Counter[str] = Counter()
    faults = []
    number = 0
    while seen["cycles"] < CYCLES or number < CASES:
        rng = random.Random(f"{SEED} {number}")
        case = cases.draw(rng, number)
        number += 1
        ensemble = cases.ensemble(case)
        vocabulary = ensemble.members[0].vocabulary
        prompts = [vocabulary.prefix_ids + vocabulary.encode(one) for one in case.prompts]
        FarBackend.reset()
        with SharedForwards() as kept:
            shared = kept if rng.random() < 0.15 else None
            want = case.write(ensemble, shared, draft=0)
            if rng.random() < 0.6:
                cases.end_somewhere(rng, case, want.texts)
                want = case.write(ensemble, shared, draft=0)
            assert want.timings.drafted == 0
            for _ in range(2):
                drafts = drafts_of(rng, case, ensemble)
                some_elsewhere(rng, ensemble.names)
                got = case.write(ensemble, shared, **drafts)
                seen += _seen(got)
                if found := list(differences(want, got, prompts)):
                    found = [one[:400] for one in found[:4]]
                    faults.append("\n  ".join([f"seed {SEED}, case {number - 1}, {drafts}: {case}", *found]))
        assert len(faults) < 6, "\n\n".join(faults)
    print(dict(seen), number, "cases")
    assert not faults, "\n\n".join(faults)
    disagree = seen["replaced"] / (seen["stood"] + seen["replaced"])
    assert 0.25 < disagree < 0.75  # the test is about something
    assert seen["drafted"] > seen["cycles"] / 2
    for ending in ("eos", "length", "stop_string", "stopping_criteria", "context"):
        assert seen[f"ended by {ending}"] > 0
    for reason in ("settled", "gated", "boundary", "unfinished character"):
        assert seen[f"not asked: {reason}"] > 0


def _seen(got) -> Counter[str]:
    fates = Counter(one["draft"] or "not drafted" for one in got.records)
    ends = Counter(f"ended by {one.finish_reason}" for one in got.texts)
    reasons = Counter(f"not asked: {one['not_asked']}" for one in got.records if one["not_asked"])
    counts = {"cycles": got.cycles, "tokens": got.timings.tokens, "drafted": got.timings.drafted}
    return Counter(counts) + fates + ends + reasons
