"""`Fuser.likelihoods`: each fuser's short way gives what the softmax of its whole logits gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracle import random_embedding, random_logits

from deepen_ext import Ensemble, RelativeMap
from deepen_ext.fusers import FUSERS, AverageFuser, DeepenFuser, Fuser, Part, TokenBridge
from deepen_ext.members.distribution import Distribution, forbid
from deepen_ext.members.member import Member

# Those with a way of their own, and one without. What "draw" gives is union-vocab's, and takes no confidence.
EVERY = [
    name
    for name, one in FUSERS.items()
    if (one.logprobs is not Fuser.logprobs and not one.draws) or name == "single"
]
ROWS = 6


def parts_of(
    fuser: Fuser, logits: Sequence[torch.Tensor | None], rows: Sequence[Sequence[int] | None]
) -> list[Part]:
    """What members say; None: sits out, as all assistants of `single` do."""
    asked: list[tuple[int, Distribution, Sequence[int]]] = []
    for i, one in enumerate(logits):
        if one is not None and i < len(fuser.vocab_sizes):
            own = rows[i]
            spoken = range(ROWS) if own is None else own
            asked.append((i, Distribution(f"member {i}", one.shape[1], fuser.candidates, one), spoken))
    return fuser.parts(asked)


def likelihoods(
    fuser: Fuser, parts: list[Part], weights: Sequence[Sequence[float]], tokens: Sequence[int]
) -> torch.Tensor:
    return fuser.likelihoods(parts, weights, torch.tensor(tokens))


def whole(
    fuser: Fuser,
    logits: Sequence[torch.Tensor | None],
    rows: Sequence[Sequence[int] | None],
    weights: Sequence[Sequence[float]],
) -> torch.Tensor:
    """Of every token, [ROWS, V]: the softmax of the logits fused from float32 copies of the members'."""
    copies = [None if one is None else one.float() for one in logits]
    fused = fuser.step_parts(parts_of(fuser, copies, rows), weights).logits
    return fused.double().log_softmax(-1)


def peaked(vocab: int, tops: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
    """Logits [ROWS, vocab]: of each row some tokens that matter, and others well below them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, vocab, generator=generator)
    for row, top in zip(logits, tops, strict=True):
        row[torch.tensor(top)] += 9 + 9 * torch.rand(len(top), generator=generator)
    return logits


WORDS = [
    "",
    "the",
    "a",
    "Paris",
    "London",
    "Antarctica",
    "strawberries",
    "is",
    "was",
    "1",
    "2",
    ".",
    ",",
    "\n",
    "and",
    "or",
    "not",
    "café",
]


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def said(request: pytest.FixtureRequest, smollm2: Member, gemma: Member) -> list[torch.Tensor]:
    """Six positions of both real vocabularies; texts in common are likely, the last row ends the text."""
    found = []
    for seed, member in enumerate((smollm2, gemma), start=1):
        generator = torch.Generator().manual_seed(seed)
        words = [member.vocabulary.encode(" " + word)[0] for word in WORDS]
        others = torch.randint(member.vocab_size, (ROWS, 30), generator=generator).tolist()
        one = peaked(member.vocab_size, [words[row:] + own for row, own in enumerate(others)], seed)
        one[5, member.eos_ids[0]] = 22.0
        found.append(one.to(request.param))
    found[0] = forbid(found[0], smollm2.unwritable([]))
    return found


@pytest.fixture(scope="module")
def ensembles(smollm2: Member, gemma: Member) -> dict[str, Ensemble]:
    return {
        name: Ensemble([smollm2, gemma], fuser=name, recipe="bytes", cache=False, candidates=24)
        for name in EVERY
    }


# The whole logits of union-vocab are thousands of small numbers added up in float32.
TOLERANCE = {"union-vocab": 3e-4, "follow": 3e-4}
WEIGHTS = [[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [1.0, 0.0], [0.0, 1.0], [0.6, 0.4]]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("confidence", [0.0, 0.5])
class TestRealVocabularies:
    @pytest.mark.parametrize("speaks", [None, [0, 2, 5], [4], []], ids=["all", "some", "one", "none"])
    def test_equals_the_whole_logits(
        self,
        ensembles: dict[str, Ensemble],
        said: list[torch.Tensor],
        smollm2: Member,
        name: str,
        confidence: float,
        speaks: list[int] | None,
    ) -> None:
        fuser = ensembles[name].variant(confidence=confidence).fuser
        logits = [said[0], said[1] if speaks is None else said[1][speaks]]
        rows = [None, speaks]
        order = said[0].float().sort(dim=1, descending=True, stable=True).indices
        every = whole(fuser, logits, rows, WEIGHTS)
        tried = 0
        for nth in (0, 1, 5, 20, 23, 24, 200, 3000):  # the best, candidates, and tokens far outside
            tokens = order[:, nth].tolist()
            got = likelihoods(fuser, parts_of(fuser, logits, rows), WEIGHTS, tokens)
            want = every[torch.arange(ROWS), tokens]
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want, atol=TOLERANCE.get(name, 1e-5), rtol=0)
            tried += int((want.exp() > 1e-4).sum())
        assert tried > ROWS
        for token in (smollm2.eos_ids[0], *(smollm2.vocabulary.encode(" " + word)[0] for word in WORDS)):
            got = likelihoods(fuser, parts_of(fuser, logits, rows), WEIGHTS, [token] * ROWS)
            torch.testing.assert_close(got, every[:, token], atol=TOLERANCE.get(name, 1e-5), rtol=0)

    def test_what_cannot_be_written(
        self,
        ensembles: dict[str, Ensemble],
        said: list[torch.Tensor],
        smollm2: Member,
        name: str,
        confidence: float,
    ) -> None:
        fuser = ensembles[name].variant(confidence=confidence).fuser
        token = int(smollm2.unwritable([])[0])
        got = likelihoods(fuser, parts_of(fuser, said, [None, None]), WEIGHTS, [token] * ROWS)
        assert torch.equal(got, whole(fuser, said, [None, None], WEIGHTS)[:, token])
        assert bool((got == -torch.inf).all())


def test_union_vocab_in_float64(
    ensembles: dict[str, Ensemble], said: list[torch.Tensor], smollm2: Member, gemma: Member
) -> None:
    """Its definition, with a tolerance that the whole logits do not reach."""
    fuser = ensembles["union-vocab"].fuser
    bridge = TokenBridge([smollm2.vocabulary, gemma.vocabulary], [smollm2.eos_ids, gemma.eos_ids])
    table, weights = bridge.table(1, 0), torch.tensor(WEIGHTS, dtype=torch.float64)
    q = said[0].double().softmax(-1) * weights[:, :1]
    heard = said[1].double().softmax(-1) * weights[:, 1:]
    q.index_add_(1, table[table >= 0], heard[:, table >= 0])
    q /= q.sum(dim=1, keepdim=True)
    order = said[0].float().sort(dim=1, descending=True, stable=True).indices
    for nth in (0, 1, 5, 20, 200, 3000):
        got = likelihoods(fuser, parts_of(fuser, said, [None, None]), WEIGHTS, order[:, nth].tolist())
        torch.testing.assert_close(got, q.log().gather(1, order[:, nth : nth + 1])[:, 0], atol=2e-6, rtol=0)


def tiny_fusers(candidates: int) -> list[Fuser]:
    """Of three vocabularies of some hundred tokens, in relative maps with rows for all."""
    maps = [
        RelativeMap.from_embedding(
            random_embedding(v, 16, seed=v), torch.arange(120), temperature=4, entries=12
        )
        for v in (300, 400, 350)
    ]
    dense = [RelativeMap.from_dense(one.to_dense()) for one in maps]
    anchor_ids = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:120]
    return [
        AverageFuser(maps, anchor_ids, candidates=candidates),
        AverageFuser(maps, anchor_ids, candidates=candidates, min_probability=0.01),
        DeepenFuser(maps, learning_rate=0.3, candidates=candidates),
        DeepenFuser(maps, learning_rate=0.3, candidates=candidates, min_probability=0.01),
        DeepenFuser(maps, learning_rate=0.3, candidates=candidates, log_probs=False),
        DeepenFuser(dense, learning_rate=0.3, candidates=candidates),
    ]


@pytest.mark.parametrize("candidates", [1, 16, 300])
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["flat", "peaked"])
def test_three_members_in_relative_space(candidates: int, scale: float) -> None:
    """Some sit out of some rows; with every token a candidate there is no tail."""
    logits = [random_logits(ROWS, v, seed=v) * scale for v in (300, 400, 350)]
    logits[0][:, 7] = -torch.inf
    logits[1], logits[2] = logits[1][[1, 2, 5]], logits[2][[2, 3]]
    rows = [None, [1, 2, 5], [2, 3]]
    weights = [[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0, 1, 0]]
    for fuser in tiny_fusers(candidates):
        every = whole(fuser, logits, rows, weights)
        tried = 0
        for seed in range(20):
            tokens = torch.randint(300, (ROWS,), generator=torch.Generator().manual_seed(seed)).tolist()
            got = likelihoods(fuser, parts_of(fuser, logits, rows), weights, tokens)
            want = every[torch.arange(ROWS), tokens]
            known = want > -60  # below it the whole logits are logarithms of what float32 has no room for
            torch.testing.assert_close(got[known], want[known], atol=1e-5, rtol=0)
            assert bool((got[~known] < -59).all())
            tried += int(known.sum())
        assert tried > 30
        tokens = [7] * ROWS
        got = likelihoods(fuser, parts_of(fuser, logits, rows), weights, tokens)
        torch.testing.assert_close(got, every[:, 7], atol=1e-5, rtol=0)
