"""`inverse_search` against autograd in float64, with whole and with sparse rows."""

from __future__ import annotations

import pytest
import torch
from oracle import random_embedding, random_logits, similarity_rows

from deepen_ext import InputError, RelativeMap
from deepen_ext.fusers import reference
from deepen_ext.ops import RelativeRows, inverse_search

SETTINGS = [(0.1, 3), (0.15, 5), (0.5, 10), (2.0, 1), (0.3, 64), (10.0, 5)]


def problem(vocab: int, anchors: int, entries: int | None, *, temperature: float = 20.0):
    """Rows of a vocabulary, as a map and whole in float64, and a target another member would give."""
    embedding = random_embedding(vocab, 24, seed=vocab)
    ids = torch.arange(0, vocab, max(vocab // anchors, 1))[:anchors]
    if entries is None:
        whole = similarity_rows(embedding, ids, recipe="calibrated", temperature=temperature)
        relative = RelativeMap.from_dense(whole.float())
    else:
        relative = RelativeMap.from_embedding(embedding, ids, temperature=temperature, entries=entries)
        whole = relative.to_dense().double()
    target = torch.softmax(random_logits(3, vocab, seed=9).double(), dim=-1) @ whole
    return relative, whole, target


@pytest.mark.parametrize("entries", [None, 7, 1, 60])
@pytest.mark.parametrize(("learning_rate", "steps"), SETTINGS)
def test_whole_vocabulary(entries, learning_rate, steps):
    relative, whole, target = problem(240, 60, entries)
    logits = random_logits(3, 240, seed=4)
    ids = torch.arange(240, dtype=torch.int32).expand(3, -1).contiguous()
    nothing = torch.full((3,), float("-inf"))
    found = inverse_search(
        logits, ids, nothing, target.float(), relative.rows, learning_rate=learning_rate, steps=steps
    )
    want = reference.inverse_search(logits.double(), whole, target, learning_rate=learning_rate, steps=steps)
    assert (want - logits).abs().max() > learning_rate / 2, "the search moves nothing"
    torch.testing.assert_close(found.double(), want, atol=1e-3 * steps * learning_rate, rtol=0)


@pytest.mark.parametrize("entries", [None, 7])
def test_candidates_and_tail(entries):
    """The tail takes part in the softmax with a uniform row, and does not move."""
    relative, whole, target = problem(240, 60, entries)
    logits = random_logits(3, 240, seed=4)
    ids = logits.topk(30, dim=1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    tail = logits.masked_fill(chosen, float("-inf")).logsumexp(dim=1)
    found = inverse_search(
        logits.gather(1, ids).contiguous(), ids.int(), tail, target.float(), relative.rows, learning_rate=0.2
    )
    for b in range(3):
        rows = torch.where(chosen[b][:, None], whole, 1 / 60)
        want = reference.inverse_search(
            logits[b : b + 1].double(), rows, target[b : b + 1], learning_rate=0.2, fixed=~chosen[b : b + 1]
        )
        torch.testing.assert_close(found[b].double(), want[0, ids[b]], atol=1e-3, rtol=0)


def test_a_target_already_met_decays_only():
    relative, whole, _ = problem(240, 60, None)
    logits = random_logits(1, 240, seed=4)
    target = torch.softmax(logits.double(), dim=-1) @ whole
    ids = torch.arange(240, dtype=torch.int32)[None]
    found = inverse_search(
        logits, ids, torch.tensor([float("-inf")]), target.float(), relative.rows, learning_rate=0.1, steps=1
    )
    torch.testing.assert_close(found, logits * (1 - 0.1 * 0.01), atol=2e-2, rtol=0)


def test_no_steps_and_empty_batch():
    relative, _, target = problem(240, 60, 7)
    logits = torch.randn(3, 4)
    ids = torch.arange(4, dtype=torch.int32).expand(3, -1).contiguous()
    arguments = (torch.zeros(3), target.float(), relative.rows)
    assert torch.equal(inverse_search(logits, ids, *arguments, learning_rate=0.1, steps=0), logits)
    empty = inverse_search(
        logits[:0], ids[:0], torch.zeros(0), target[:0].float(), relative.rows, learning_rate=0.1
    )
    assert empty.shape == (0, 4)


@pytest.mark.parametrize("scale", [1.0, 1 - 1e-6, 1 - 1e-4])
def test_candidates_that_name_every_anchor(scale):
    """What the target's sum lacks of 1 is then rounding, not the mass of other anchors."""
    anchors = 200
    columns = torch.cat([torch.arange(anchors), torch.tensor([0])]).int()[:, None].contiguous()
    values, rest = torch.ones(anchors + 1, 1), torch.zeros(anchors + 1)
    values[-1] = rest[-1] = 0.5  # only this row gives the other anchors anything
    logits, target = random_logits(1, anchors + 1, seed=0), torch.softmax(random_logits(1, anchors, 1), dim=1)
    logits[0, -1] = logits.min() - 5
    target *= scale
    found = inverse_search(
        logits,
        torch.arange(anchors + 1, dtype=torch.int32)[None],
        torch.tensor([float("-inf")]),
        target,
        RelativeRows(columns, values, rest, anchors),
        learning_rate=0.2,
    )
    last = torch.full((1, anchors), 0.5 / (anchors - 1)).double()
    last[0, 0] = 0.5
    whole = torch.cat([torch.eye(anchors).double(), last])
    want = reference.inverse_search(logits.double(), whole, target.double(), learning_rate=0.2)
    assert (want - logits).abs().max() > 0.1, "the search moves nothing"
    torch.testing.assert_close(found.double(), want, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3, 5, dtype=torch.int32)}, r"ids has shape \[3, 5\]; expected \[3, 4\]"),
        ({"ids": torch.zeros(3, 4, dtype=torch.int64)}, "ids is int64; expected int32"),
        ({"tail_logit": torch.zeros(2)}, "tail_logit has shape"),
        ({"target": torch.ones(3, 61) / 61}, "target has shape"),
        ({"logits": torch.zeros(3, 4).half()}, "logits is float16"),
        ({"logits": torch.zeros(4, 3).T}, "logits is not contiguous"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": 10.1}, "learning_rate is 10.1; choose above 0 to 10"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 65}, "steps is 65"),
    ],
)
def test_bad_input(changes, message):
    relative, _, target = problem(240, 60, 7)
    arguments = {
        "logits": torch.zeros(3, 4),
        "ids": torch.zeros(3, 4, dtype=torch.int32),
        "tail_logit": torch.zeros(3),
        "target": target.float(),
        "rows": relative.rows,
        "learning_rate": 0.1,
    } | changes
    with pytest.raises(InputError, match=message):
        inverse_search(**arguments)
