"""`fuse` and `inverse_search` at the default size (k 128, m 32) and beyond a warp's width, with rows that end
early, on devices with more and less shared memory: the same bits, and right."""

from __future__ import annotations

import oracle
import pytest
import torch
from oracle import random_logits

from deepen_ext.fusers import reference
from deepen_ext.ops import FuseInput, RelativeRows, fuse, inverse_search, topk_softmax

VOCABS, ANCHORS, BATCH = (700, 800), 500, 2
SHARED = (232_448, 166_912, 101_376)  # bytes a block may have on 90, 80 and 86


def random_rows(vocab: int, entries: int, seed: int) -> RelativeRows:
    """Rows of 0 to `entries` anchors; some anchors are in most rows, as the hubs of real embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    popular = torch.rand(ANCHORS, generator=generator) ** 4 + 1e-3
    columns = torch.multinomial(popular.expand(vocab, -1), entries, generator=generator).int()
    values = torch.rand(vocab, entries, generator=generator).sort(dim=1, descending=True).values ** 2
    length = torch.randint(entries + 1, (vocab, 1), generator=generator)
    length[::3] = entries
    ended = torch.arange(entries) >= length
    columns, values = columns.masked_fill(ended, -1), values.masked_fill(ended, 0)
    rest = torch.where(length[:, 0] == 0, 1.0, torch.rand(vocab, generator=generator))
    values *= ((1 - rest) / values.sum(dim=1).clamp(min=1e-6))[:, None]
    return RelativeRows(columns, values, rest, ANCHORS)


def whole(rows: RelativeRows) -> torch.Tensor:
    """[V, A] in float64."""
    named = rows.columns >= 0
    share = rows.rest.double() / (ANCHORS - named.sum(dim=1))
    columns = torch.where(named, rows.columns, ANCHORS).long()  # one column more, for what is not named
    dense = share[:, None].repeat(1, ANCHORS + 1)
    return dense.scatter(1, columns, rows.values.double())[:, :ANCHORS]


def on_each_device(backend, operation):
    """What `operation` gives: to the bit the same with any amount of shared memory."""
    found = operation()
    if backend.emulator is not None:
        for size in SHARED:
            backend.emulator.set_max_shared_bytes(size)
            for one, other in zip(found, operation(), strict=True):
                assert torch.equal(one, other), size
    return found


@pytest.mark.parametrize(("candidates", "entries"), [(128, 32), (150, 40), (128, 1)])
def test_fuse(backend, candidates, entries):
    maps = [random_rows(vocab, entries, seed=i) for i, vocab in enumerate(VOCABS)]
    logits = [random_logits(BATCH, vocab, seed=i) for i, vocab in enumerate(VOCABS)]
    weights = torch.tensor([0.6, 0.4]).expand(BATCH, -1).contiguous()
    inputs = [FuseInput(topk_softmax(one, candidates), rows) for one, rows in zip(logits, maps, strict=True)]

    def operation():
        main = logits[0].clone()
        return [*fuse(main, inputs, weights, learning_rate=0.2), main]

    _, chosen, main = on_each_device(backend, operation)
    want = oracle.fuse(
        logits,
        [whole(rows) for rows in maps],
        [0.6, 0.4],
        candidates=candidates,
        learning_rate=0.2,
        steps=5,
    )
    assert (want - logits[0]).abs().max() > 0.1, "the step moves nothing"
    torch.testing.assert_close(main.double(), want, atol=2e-3, rtol=0)
    assert torch.equal(chosen.long(), main.argmax(dim=1))


@pytest.mark.parametrize("entries", [32, 40])
def test_inverse_search(backend, entries):
    rows, logits = random_rows(VOCABS[0], entries, seed=0), random_logits(BATCH, VOCABS[0], seed=0)
    ids = logits.topk(128, dim=1).indices
    candidate = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    tail = logits.masked_fill(candidate, float("-inf")).logsumexp(dim=1)
    target = torch.softmax(random_logits(BATCH, VOCABS[0], seed=9).double(), dim=1) @ whole(rows)
    arguments = (logits.gather(1, ids), ids.int(), tail, target.float(), rows)
    (found,) = on_each_device(backend, lambda: [inverse_search(*arguments, learning_rate=0.2)])
    for b in range(BATCH):
        mapped = torch.where(candidate[b][:, None], whole(rows), 1 / ANCHORS)
        want = reference.inverse_search(
            logits[b : b + 1].double(),
            mapped,
            target[b : b + 1],
            learning_rate=0.2,
            fixed=~candidate[b][None],
        )
        torch.testing.assert_close(found[b].double(), want[0, ids[b]], atol=1e-3, rtol=0)


def test_a_row_whose_topk_failed_harms_no_other(backend):
    """Nobody waits for its status on a device: its ids and probabilities may be anything."""
    if backend.emulator is None:
        pytest.skip("on the CPU the status is checked first")
    maps = [random_rows(vocab, 32, seed=i) for i, vocab in enumerate(VOCABS)]
    logits = [random_logits(BATCH, vocab, seed=i) for i, vocab in enumerate(VOCABS)]
    weights = torch.tensor([0.6, 0.4]).expand(BATCH, -1).contiguous()
    inputs = [FuseInput(topk_softmax(one, 128), rows) for one, rows in zip(logits, maps, strict=True)]
    settings = {"learning_rate": 0.2, "min_probability": 1e-4}
    want = logits[0].clone()
    fuse(want, inputs, weights, **settings)
    for topk, _ in inputs:
        topk.ids[0], topk.probs[0], topk.tail[0] = 0x7FE1DEAD, float("nan"), float("nan")
        topk.ids[0, ::2] = -5
    main = logits[0].clone()
    _, chosen = fuse(main, inputs, weights, **settings)
    assert torch.equal(main[0], logits[0][0]), "no candidate is in the vocabulary"
    assert torch.equal(main[1], want[1])
    assert 0 <= chosen[0] < VOCABS[0]
