"""`fuse` against the float64 oracle: sparse and whole rows, every dtype, tails, ties, and what it leaves
alone."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import random_embedding, random_logits

from deepen_ext import InputError, RelativeMap
from deepen_ext.ops import FuseInput, fuse, topk_softmax

VOCABS = (400, 520, 310)
ANCHORS = 120


def members(entries: int | None, count: int = 2, *, temperature: float = 20.0) -> list[RelativeMap]:
    maps = []
    for i, vocab in enumerate(VOCABS[:count]):
        embedding = random_embedding(vocab, 16 + 5 * i, seed=i)
        ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(i))[:ANCHORS]
        if entries is None:
            whole = oracle.similarity_rows(embedding, ids, recipe="calibrated", temperature=temperature)
            maps.append(RelativeMap.from_dense(whole.float()))
        else:
            maps.append(RelativeMap.from_embedding(embedding, ids, temperature=temperature, entries=entries))
    return maps


def run(logits, maps, weights, *, candidates, **settings):
    main = logits[0].clone()
    inputs = []
    for one, relative in zip(logits, maps, strict=True):
        topk = topk_softmax(one, min(candidates, one.shape[1]))
        relative.ensure(topk.ids)
        inputs.append(FuseInput(topk, relative.rows))
    share = torch.tensor([weights]).expand(len(main), -1).contiguous()
    fused, chosen = fuse(main, inputs, share, **settings)
    return main, fused, chosen, inputs


@pytest.mark.parametrize("entries", [None, 9, 1, ANCHORS])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("candidates", "min_probability", "log_probs"),
    [(1000, 0.0, True), (40, 0.0, True), (40, 1e-3, True), (40, 1e-3, False), (3, 0.0, True)],
)
def test_against_float64(entries, count, candidates, min_probability, log_probs):
    maps = members(entries, count)
    logits = [random_logits(2, vocab, seed=i) for i, vocab in enumerate(VOCABS[:count])]
    weights = [0.5, 0.5] if count == 2 else [0.5, 0.3, 0.2]
    settings = {
        "learning_rate": 0.2,
        "steps": 5,
        "min_probability": min_probability,
        "log_probs": log_probs,
    }
    main, fused, chosen, inputs = run(logits, maps, weights, candidates=candidates, **settings)
    want = oracle.fuse(logits, [one.to_dense() for one in maps], weights, candidates=candidates, **settings)
    assert (want - logits[0]).abs().max() > 0.1, "the step moves nothing"
    torch.testing.assert_close(main.double(), want, atol=2e-3, rtol=0)
    assert torch.equal(main.gather(1, inputs[0].topk.ids.long()), fused)
    assert torch.equal(chosen.long(), main.argmax(dim=1))


@pytest.mark.parametrize("entries", [None, 9])
@pytest.mark.parametrize("min_probability", [0.0, 1e-3])
@pytest.mark.parametrize("constant", [100.0, 1000.0, -100.0])
def test_a_constant_in_the_main_models_logits_changes_nothing(entries, min_probability, constant):
    """Multiples of 1/1024 are exact in float32 with the constant, so that the inputs are the same to the bit;
    near 1,000 the results are rounded to 3e-5."""
    maps = members(entries)
    logits = [(random_logits(4, vocab, seed=i) * 1024).round() / 1024 for i, vocab in enumerate(VOCABS[:2])]
    settings = {"learning_rate": 0.2, "candidates": 32, "min_probability": min_probability}
    plain, _, chosen, inputs = run(logits, maps, [0.5, 0.5], **settings)
    moved, fused, same, _ = run([logits[0] + constant, logits[1]], maps, [0.5, 0.5], **settings)
    assert torch.equal(same, chosen)
    torch.testing.assert_close(moved.softmax(1), plain.softmax(1), atol=1e-5, rtol=0)
    ids = inputs[0].topk.ids.long()
    torch.testing.assert_close(fused - constant, plain.gather(1, ids), atol=4e-5, rtol=0)
    _, _, other, _ = run([logits[0] + 1000, logits[1]], maps, [0.5, 0.5], log_probs=False, **settings)
    away = ~(other[:, None] == ids).any(dim=1)
    assert away.any(), "on logits as they are, decay lets tokens win that are no candidates"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_rounded_once(dtype):
    maps = members(9)
    logits = [random_logits(2, vocab, seed=i).to(dtype) for i, vocab in enumerate(VOCABS[:2])]
    main, fused, chosen, inputs = run(logits, maps, [0.5, 0.5], candidates=40, learning_rate=0.2)
    as_float = [one.float() for one in logits]
    _, exact, _, _ = run(as_float, maps, [0.5, 0.5], candidates=40, learning_rate=0.2)
    torch.testing.assert_close(fused, exact, atol=1e-5, rtol=0)
    assert torch.equal(main.gather(1, inputs[0].topk.ids.long()), fused.to(dtype))
    assert torch.equal(chosen.long(), main.float().argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_start_at_any_element(dtype):
    maps = members(9)
    logits = [random_logits(3, vocab, seed=i).to(dtype) for i, vocab in enumerate(VOCABS[:2])]
    want, *_, inputs = run(logits, maps, [0.5, 0.5], candidates=40, learning_rate=0.2)
    weights = torch.full((3, 2), 0.5)
    for offset in (1, 3):
        main = torch.zeros(offset + logits[0].numel(), dtype=dtype)[offset:].view_as(logits[0])
        main.copy_(logits[0])
        _, chosen = fuse(main, inputs, weights, learning_rate=0.2)
        assert torch.equal(main, want)
        assert torch.equal(chosen.long(), want.float().argmax(dim=1))


def test_only_candidates_move():
    logits = [random_logits(2, vocab, seed=i) for i, vocab in enumerate(VOCABS[:2])]
    main, _, _, inputs = run(logits, members(9), [0.5, 0.5], candidates=20, learning_rate=0.2)
    others = torch.ones_like(main, dtype=torch.bool).scatter(1, inputs[0].topk.ids.long(), False)
    assert torch.equal(main[others], logits[0][others])
    assert not torch.equal(main[~others], logits[0][~others])


def test_rows_of_a_batch_are_independent():
    maps = members(9)
    logits = [random_logits(7, vocab, seed=i) for i, vocab in enumerate(VOCABS[:2])]
    together, *_ = run(logits, maps, [0.6, 0.4], candidates=40, learning_rate=0.2)
    for b in range(7):
        alone, *_ = run(
            [one[b : b + 1] for one in logits], maps, [0.6, 0.4], candidates=40, learning_rate=0.2
        )
        assert torch.equal(together[b : b + 1], alone)


def test_weights_by_row():
    maps = members(9)
    logits = [random_logits(2, vocab, seed=i) for i, vocab in enumerate(VOCABS[:2])]
    inputs = []
    for one, relative in zip(logits, maps, strict=True):
        topk = topk_softmax(one, 40)
        relative.ensure(topk.ids)
        inputs.append(FuseInput(topk, relative.rows))
    by_row = logits[0].clone()
    fuse(by_row, inputs, torch.tensor([[0.9, 0.1], [0.2, 0.8]]), learning_rate=0.2)
    for b, weights in enumerate(([0.9, 0.1], [0.2, 0.8])):
        want, *_ = run(logits, maps, weights, candidates=40, learning_rate=0.2)
        assert torch.equal(by_row[b], want[b])


def test_the_argmax_may_leave_the_candidates():
    """With one candidate only, weight decay alone can bring it below a token that did not move."""
    logits = random_logits(1, VOCABS[0], seed=0)
    first, second = logits.topk(2).indices[0].tolist()
    logits[0, first], logits[0, second] = 20.0, 19.99
    other = random_logits(1, VOCABS[1], seed=1)
    _, fused, chosen, _ = run(
        [logits, other], members(9), [0.5, 0.5], candidates=1, learning_rate=5.0, steps=3
    )
    assert fused[0, 0] < 19.99
    assert chosen.tolist() == [second]


def test_ties_after_fusion_go_to_the_lower_id():
    """Two tokens with the same logit and the same row stay equal; the lower id is chosen."""
    embedding = random_embedding(200, 8, seed=1)
    embedding[150] = embedding[20]
    relative = RelativeMap.from_embedding(embedding, torch.arange(100, 200), entries=5)
    logits = torch.zeros(1, 200)
    logits[0, [20, 150]] = 6.0
    _, _, chosen, _ = run(
        [logits, logits.clone()], [relative, relative], [0.5, 0.5], candidates=50, learning_rate=0.1
    )
    assert chosen.tolist() == [20]


def test_repeats_to_the_bit_with_any_number_of_threads():
    maps = members(9)
    logits = [random_logits(6, vocab, seed=i) for i, vocab in enumerate(VOCABS[:2])]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4, 4):
            torch.set_num_threads(threads)
            results.append(run(logits, maps, [0.5, 0.5], candidates=40, learning_rate=0.2)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_batch():
    maps = members(9)
    logits = [torch.empty(0, vocab) for vocab in VOCABS[:2]]
    main, fused, chosen, _ = run(logits, maps, [0.5, 0.5], candidates=40, learning_rate=0.2)
    assert main.shape == (0, VOCABS[0])
    assert fused.shape == (0, 40)
    assert chosen.shape == (0,)


def test_bad_input():
    maps = members(9)
    logits = [random_logits(2, vocab, seed=i) for i, vocab in enumerate(VOCABS[:2])]
    _, _, _, inputs = run(logits, maps, [0.5, 0.5], candidates=40, learning_rate=0.2)
    weights = torch.full((2, 2), 0.5)
    settings = {"learning_rate": 0.2}
    with pytest.raises(InputError, match="no members"):
        fuse(logits[0], [], weights, **settings)
    with pytest.raises(InputError, match=r"logits has shape \[2, 520\]; expected \[2, 400\]"):
        fuse(logits[1], inputs, weights, **settings)
    with pytest.raises(InputError, match="logits is float64"):
        fuse(logits[0].double(), inputs, weights, **settings)
    with pytest.raises(InputError, match="logits is not contiguous"):
        fuse(logits[0].T.contiguous().T, inputs, weights, **settings)
    with pytest.raises(InputError, match="weights has shape"):
        fuse(logits[0], inputs, weights[:, :1], **settings)
    with pytest.raises(InputError, match="ids of member 1 has shape"):
        fuse(
            logits[0],
            [inputs[0], inputs[1]._replace(topk=topk_softmax(logits[1][:1], 40))],
            weights,
            **settings,
        )
    with pytest.raises(InputError, match="member 1 has 121 anchors, but the main model has 120"):
        fuse(
            logits[0],
            [inputs[0], inputs[1]._replace(rows=inputs[1].rows._replace(anchors=121))],
            weights,
            **settings,
        )
    for anchors in (torch.tensor([1.0, 2.0]), 120.0, None):  # of an assistant: the main model's come first
        rows = inputs[1].rows._replace(anchors=anchors)
        with pytest.raises(InputError, match=r"rows of member 1.anchors is .*; give a whole number"):
            fuse(logits[0], [inputs[0], inputs[1]._replace(rows=rows)], weights, **settings)
    with pytest.raises(InputError, match="mix dense and sparse"):
        fuse(logits[0], [inputs[0], FuseInput(inputs[1].topk, members(None)[1].rows)], weights, **settings)
    with pytest.raises(InputError, match="min_probability is 1"):
        fuse(logits[0], inputs, weights, min_probability=1.0, **settings)
    with pytest.raises(InputError, match="steps is 65"):
        fuse(logits[0], inputs, weights, steps=65, **settings)
    with pytest.raises(InputError, match="learning_rate is 89; choose above 0 to 10"):
        fuse(logits[0], inputs, weights, learning_rate=89.0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([math.nan, 1.0], "the weight of member 0 in row 1 is nan"),
        ([1.5, -0.5], "the weight of member 1 in row 1 is -0.5"),
        ([math.inf, 0.0], "the weight of member 0 in row 1 is inf"),
        ([0.0, 0.0], "the weights of row 1 sum to 0"),
        ([0.5, 0.6], "the weights of row 1 sum to 1.1"),
    ],
)
def test_weights_that_are_no_shares(row, said, backend):
    """Refused on the CPU. CUDA takes them as they are; there the rows beside stay as they would be."""
    logits = [random_logits(2, vocab, seed=i) for i, vocab in enumerate(VOCABS[:2])]
    sound, _, _, inputs = run(logits, members(9), [0.5, 0.5], candidates=40, learning_rate=0.2)
    given, weights = logits[0].clone(), torch.tensor([[0.5, 0.5], row])
    if backend.emulator is not None:
        fuse(given, inputs, weights, learning_rate=0.2)
        assert torch.equal(given[0], sound[0])
        return
    with pytest.raises(InputError, match=said):
        fuse(given, inputs, weights, learning_rate=0.2)
    assert torch.equal(given, logits[0])
