"""`inverse_search`, `fuse` and the whole fusion step on CUDA against their CPU twins."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from golden_cases import golden_case, golden_names
from library_cases import chooser
from oracle import random_embedding, random_logits
from test_fuse import VOCABS, members
from test_inverse_search import SETTINGS, problem

from deepen_ext import InputError, RelativeMap, fuse_logits
from deepen_ext.fusers import DeepenFuser, reference
from deepen_ext.ops import FuseInput, fuse, inverse_search, topk_softmax
from deepen_ext.space.row_sources import SparseRows
from deepen_ext.space.row_table import RowTable

# Real vocabularies need more anchors than test_fuse's: rows that name many of them, in many buckets.
PAIRS = [(32_000, 32_000), (49_152, 262_144), (128_256, 151_936)]


# Made once in a process, and only read: the same vocabularies come with every dtype and batch.
@cache
def random_map(vocab: int, anchors: int, entries: int, seed: int) -> RelativeMap:
    """Rows of a real shape: random columns, falling values, some rows short, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(anchors - entries, (vocab, 1), generator=generator) + torch.arange(entries)
    values = torch.rand(vocab, entries, generator=generator).sort(dim=1, descending=True).values ** 4
    values *= 0.9 / values.sum(dim=1, keepdim=True)
    rest = torch.full((vocab,), 0.1)
    short = torch.arange(0, vocab, 3)  # like byte-prefix rows: one column, nothing left
    columns[short, 1:] = -1
    values[short, 0] = 1.0
    values[short, 1:] = 0.0
    rest[short] = 0.0
    table = RowTable.empty(vocab, anchors, entries)
    table.keep(torch.arange(vocab), SparseRows(columns.int(), values, rest))
    relative = RelativeMap(table)
    relative.fill()
    return relative


shared_logits = cache(random_logits)  # likewise


@pytest.mark.parametrize("entries", [None, 7, 1, 60])
@pytest.mark.parametrize(("learning_rate", "steps"), SETTINGS)
def test_search_over_the_whole_vocabulary(device, entries, learning_rate, steps):
    relative, whole, target = problem(240, 60, entries)
    logits = random_logits(3, 240, seed=4)
    ids = torch.arange(240, dtype=torch.int32).expand(3, -1).contiguous()
    nothing = torch.full((3,), float("-inf"))
    given = [one.to(device) for one in (logits, ids, nothing, target.float())]
    rows = (relative.fill(), relative.to(device).rows)[1]
    found = inverse_search(*given, rows, learning_rate=learning_rate, steps=steps).cpu()
    want = reference.inverse_search(logits.double(), whole, target, learning_rate=learning_rate, steps=steps)
    assert (want - logits).abs().max() > learning_rate / 2, "the search moves nothing"
    torch.testing.assert_close(found.double(), want, atol=1e-3 * steps * learning_rate, rtol=0)


@pytest.mark.parametrize("candidates", [1, 2, 31, 128, 129, 1000])
@pytest.mark.parametrize("entries", [None, 1, 7, 60])
def test_search_like_the_twin(device, candidates, entries):
    """Few and many candidates: those that fit shared memory, and those that do not."""
    relative, _, target = problem(1200, 60, entries)
    relative.fill()
    logits = random_logits(5, 1200, seed=4)
    target = target.repeat(2, 1)[:5].float()
    top = logits.topk(candidates, dim=1)
    tail = logits.scatter(1, top.indices, float("-inf")).logsumexp(dim=1)
    given = (top.values.contiguous(), top.indices.int(), tail, target)
    want = inverse_search(*given, relative.rows, learning_rate=0.2)
    there = [one.to(device) for one in given]
    rows = relative.to(device).rows
    found = inverse_search(*there, rows, learning_rate=0.2)
    torch.testing.assert_close(found.cpu(), want, atol=1e-3, rtol=0)
    assert torch.equal(found, inverse_search(*there, rows, learning_rate=0.2))
    unmoved = inverse_search(*there, rows, learning_rate=0.2, steps=0)
    assert torch.equal(unmoved, there[0])
    empty = [one[:0] for one in there]
    assert inverse_search(*empty, rows, learning_rate=0.2).shape == (0, candidates)


def step_on(logits, maps, weights, *, candidates, **settings):
    inputs = [
        FuseInput(topk_softmax(one, min(candidates, one.shape[1])), relative.rows)
        for one, relative in zip(logits, maps, strict=True)
    ]
    main = logits[0].clone()
    share = torch.tensor([weights]).repeat(len(main), 1).to(main.device)
    fused, chosen = fuse(main, inputs, share, **settings)
    return main, fused, chosen, inputs


def assert_step_like_the_twin(device, logits, maps, weights, *, tolerance=1e-3, **settings):
    for one in maps:
        one.fill()
    want = step_on(logits, maps, weights, **settings)
    moved = (want[0].float() - logits[0].float()).abs()
    assert moved[moved.isfinite()].max() > 0.01, "the step moves nothing"
    fused = assert_step_in_order(device, logits, maps, weights, **settings)
    torch.testing.assert_close(fused.cpu(), want[1], atol=tolerance, rtol=0)


def assert_step_in_order(device, logits, maps, weights, **settings):
    """What is written is what is returned, nothing else is, and again the same bits. Returns `fused`."""
    there = [one.to(device) for one in logits]
    on_device = [one.to(device) for one in maps]
    main, fused, chosen, inputs = step_on(there, on_device, weights, **settings)
    written = main.gather(1, inputs[0].topk.ids.long())
    assert torch.equal(written, fused.to(main.dtype))
    assert torch.equal(chosen.long(), main.float().argmax(dim=1))
    others = torch.ones_like(main, dtype=torch.bool).scatter(1, inputs[0].topk.ids.long(), False)
    assert torch.equal(main[others], there[0][others])
    for _ in range(5):
        again = step_on(there, on_device, weights, **settings)
        assert all(torch.equal(a, b) for a, b in zip((main, fused, chosen), again[:3], strict=True))
    return fused


CANDIDATES = [(1000, 0.0), (40, 0.0), (40, 1e-3), (3, 0.0)]


@pytest.mark.parametrize("entries", [None, 9, 1, 120])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.3, 0.2]])
@pytest.mark.parametrize(("candidates", "min_probability"), CANDIDATES)
def test_fuse_like_the_twin(device, entries, weights, candidates, min_probability):
    logits = [random_logits(4, vocab, seed=i) for i, vocab in enumerate(VOCABS[: len(weights)])]
    settings = {"learning_rate": 0.2, "candidates": candidates, "min_probability": min_probability}
    assert_step_like_the_twin(device, logits, members(entries, len(weights)), weights, **settings)


# One member is its own target: the gradient is 0, and AdamW makes whole steps of whatever rounding leaves of
# it. No two implementations agree, so there is nothing to compare with.
@pytest.mark.parametrize("entries", [None, 9, 1, 120])
@pytest.mark.parametrize(("candidates", "min_probability"), CANDIDATES)
def test_one_member_alone(device, entries, candidates, min_probability):
    logits = [random_logits(4, VOCABS[0], seed=0)]
    maps = members(entries, 1)
    maps[0].fill()
    settings = {"learning_rate": 0.2, "candidates": candidates, "min_probability": min_probability}
    fused = assert_step_in_order(device, logits, maps, [1.0], **settings).cpu()
    moved = fused - logits[0].topk(fused.shape[1], dim=1).values
    assert moved.abs().max() < 2 * 5 * 0.2  # NaN fails too; five steps of the learning rate, and the decay


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 8, 33])
@pytest.mark.parametrize("vocabs", PAIRS)
def test_fuse_on_real_shapes(device, dtype, batch, vocabs):
    logits = [shared_logits(batch, vocab, seed=i).to(dtype) for i, vocab in enumerate(vocabs)]
    maps = [random_map(vocab, 30_001, 32, seed=i) for i, vocab in enumerate(vocabs)]
    settings = {"learning_rate": 0.15, "candidates": 128, "min_probability": 1e-4}
    assert_step_like_the_twin(device, logits, maps, [0.5, 0.5], **settings)


@pytest.mark.parametrize(("k", "entries"), [(512, 32), (2048, 32), (128, 300), (4000, 64)])
def test_fuse_beyond_shared_memory(device, k, entries):
    """State that fits no shared memory goes another way, with the same result."""
    logits = [random_logits(3, vocab, seed=i) for i, vocab in enumerate((5000, 7001))]
    maps = [random_map(vocab, 4001, entries, seed=i) for i, vocab in enumerate((5000, 7001))]
    assert_step_like_the_twin(device, logits, maps, [0.5, 0.5], candidates=k, learning_rate=0.2)


def test_sixteen_members(device):
    logits = [random_logits(2, 400, seed=i) for i in range(16)]
    maps = [random_map(400, 200, 9, seed=i) for i in range(16)]
    settings = {"learning_rate": 0.2, "candidates": 40}
    assert_step_like_the_twin(device, logits, maps, [1 / 16] * 16, **settings)


def test_weights_by_row_and_members_left_out(device):
    """At least two speak for each row, or the main model is not among them: see `test_one_member_alone`."""
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.0, 0.8], [0.0, 0.4, 0.6]])
    logits = [random_logits(3, vocab, seed=i) for i, vocab in enumerate(VOCABS)]
    maps = [random_map(vocab, 200, 9, seed=i) for i, vocab in enumerate(VOCABS)]
    results = []
    for where in ("cpu", device):
        main = logits[0].to(where, copy=True)
        inputs = [
            FuseInput(topk_softmax(one.to(where), 40), relative.to(where).rows)
            for one, relative in zip(logits, maps, strict=True)
        ]
        fuse(main, inputs, weights.to(where), learning_rate=0.2)
        results.append(main.cpu())
    torch.testing.assert_close(*results, atol=1e-3, rtol=0)


def test_rows_of_a_batch_are_independent(device):
    logits = [random_logits(9, vocab, seed=i).to(device) for i, vocab in enumerate((5000, 7001))]
    maps = [random_map(vocab, 4001, 32, seed=i).to(device) for i, vocab in enumerate((5000, 7001))]
    settings = {"candidates": 128, "learning_rate": 0.2}
    together = step_on(logits, maps, [0.6, 0.4], **settings)[0]
    for b in range(9):
        alone = step_on([one[b : b + 1].contiguous() for one in logits], maps, [0.6, 0.4], **settings)[0]
        torch.testing.assert_close(alone, together[b : b + 1], atol=1e-5, rtol=0)


def test_ties_after_fusion_go_to_the_lower_id(device):
    embedding = random_embedding(200, 8, seed=1)
    embedding[150] = embedding[20]
    relative = RelativeMap.from_embedding(embedding, torch.arange(100, 200), entries=5)
    relative.fill()
    logits = torch.zeros(1, 200)
    logits[0, [20, 150]] = 6.0
    given, there = logits.to(device), relative.to(device)
    settings = {"candidates": 50, "learning_rate": 0.1}
    chosen = step_on([given, given.clone()], [there, there], [0.5, 0.5], **settings)[2]
    assert chosen.tolist() == [20]


def test_the_argmax_may_leave_the_candidates(device):
    logits = random_logits(1, VOCABS[0], seed=0)
    first, second = logits.topk(2).indices[0].tolist()
    logits[0, first], logits[0, second] = 20.0, 19.99
    given = [logits.to(device), random_logits(1, VOCABS[1], seed=1).to(device)]
    maps = members(9)
    there = [(one.fill(), one.to(device))[1] for one in maps]
    settings = {"candidates": 1, "learning_rate": 5.0, "steps": 3}
    _, fused, chosen, _ = step_on(given, there, [0.5, 0.5], **settings)
    assert float(fused[0, 0]) < 19.99
    assert chosen.tolist() == [second]


def test_empty_batch(device):
    logits = [torch.empty(0, vocab, device=device) for vocab in VOCABS[:2]]
    maps = [random_map(vocab, 200, 9, seed=0).to(device) for vocab in VOCABS[:2]]
    main, fused, chosen, _ = step_on(logits, maps, [0.5, 0.5], candidates=40, learning_rate=0.2)
    assert main.shape == (0, VOCABS[0])
    assert fused.shape == (0, 40)
    assert chosen.shape == (0,)


@pytest.mark.parametrize("name", golden_names())
def test_golden(device, name):
    """The authors' own outputs, with dense maps on the device."""
    case = golden_case(name)
    maps = [RelativeMap.from_dense(matrix.to(device)) for matrix in case.each("relative")]
    logits = [one.to(device) for one in case.each("logits")]
    fused = fuse_logits(
        logits,
        maps,
        case.weights,
        learning_rate=case.learning_rate,
        steps=case.steps,
        candidates=max(one.shape[1] for one in logits),
    )
    torch.testing.assert_close(fused.cpu(), case.tensors["fused_logits"], atol=1e-3, rtol=0)


class TestFuser:
    @pytest.fixture
    def pair(self, device):
        logits = [random_logits(2, vocab, seed=i).to(device) for i, vocab in enumerate((3000, 4001))]
        maps = [
            RelativeMap.from_embedding(random_embedding(vocab, 32, seed=i).to(device), torch.arange(1200))
            for i, vocab in enumerate((3000, 4001))
        ]
        return logits, maps

    @pytest.mark.parametrize(
        "sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 1}]
    )
    def test_a_step_waits_for_nothing(self, device, no_waiting, pair, sampling):
        logits, maps = pair
        fuser = DeepenFuser(maps, learning_rate=0.2, min_probability=1e-4)
        choose = chooser(rows=2, vocab_size=fuser.maps[0].vocab_size, device=device, **sampling)
        choose(fuser.step(logits, [0.5, 0.5]).logits)  # fills the maps
        with no_waiting():
            fused = fuser.step(logits, [0.5, 0.5])
            tokens = choose(fused.logits, fused.chosen)
        chosen, main = fused.read(tokens)
        assert main == logits[0].argmax(dim=1).tolist()
        if not sampling:
            assert chosen == fused.logits.argmax(dim=1).tolist()

    def test_like_on_the_cpu(self, pair):
        logits, maps = pair
        for one in maps:
            one.fill()
        here = DeepenFuser([one.to("cpu") for one in maps], learning_rate=0.2, min_probability=1e-4)
        there = DeepenFuser(maps, learning_rate=0.2, min_probability=1e-4)
        want = here.step([one.cpu() for one in logits], [0.5, 0.5])
        found = there.step(logits, [0.5, 0.5])
        torch.testing.assert_close(found.logits.cpu(), want.logits, atol=1e-3, rtol=0)
        assert torch.equal(found.main_choice.cpu(), want.main_choice)

    def test_a_member_may_sit_out(self, pair):
        logits, maps = pair
        three = DeepenFuser([*maps, maps[1]], learning_rate=0.2)
        two = fuse_logits(logits, maps, [0.625, 0.375], learning_rate=0.2)
        assert torch.equal(three.step([*logits, None], [0.5, 0.3, 0.2]).logits, two)

    def test_nan_is_reported_when_the_token_is_read(self, pair):
        logits, maps = pair
        logits[1][1, 7] = float("nan")
        fused = DeepenFuser(maps, learning_rate=0.2, names=["smollm2", "gemma"]).step(logits, [0.5, 0.5])
        with pytest.raises(InputError, match=r"logits of gemma: row 1 has no softmax.*NaN"):
            fused.read(fused.chosen)
        good = logits[1][:1].nan_to_num(), logits[0][:1]
        clean = fuse_logits([good[1].clone(), good[0].clone()], maps, [0.5, 0.5], learning_rate=0.2)
        torch.testing.assert_close(fused.logits[:1], clean, atol=1e-5, rtol=0)

    def test_sampling_from_nan_does_not_end_the_process(self, device, pair):
        logits, maps = pair
        logits[0][0] = float("nan")
        fused = DeepenFuser(maps, learning_rate=0.2).step(logits, [0.5, 0.5])
        choose = chooser(rows=2, vocab_size=3000, do_sample=True, seed=0, device=device)
        tokens = choose(fused.logits)
        with pytest.raises(InputError, match="row 0 has no softmax"):
            fused.read(tokens)
        torch.cuda.synchronize()

    def test_logits_on_another_device(self, pair):
        """Only an assistant's top-k crosses over; the main model's logits are written where the maps are."""
        logits, maps = pair
        here = fuse_logits(logits, maps, [0.5, 0.5], learning_rate=0.2)
        mixed = fuse_logits([logits[0], logits[1].cpu()], maps, [0.5, 0.5], learning_rate=0.2)
        torch.testing.assert_close(mixed, here, atol=1e-4, rtol=0)
        with pytest.raises(InputError, match="is on c"):
            fuse_logits([logits[0].cpu(), logits[1]], maps, [0.5, 0.5], learning_rate=0.2)
