"""`relative_rows` against the same rows in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import random_embedding, similarity_rows

from deepen_ext import InputError
from deepen_ext.ops import Similarity, relative_rows
from deepen_ext.space.row_sources import SimilarityRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("recipe", "temperature"), [("paper", 100.0), ("calibrated", 20.0), ("calibrated", 40.0)]
)
@pytest.mark.parametrize(
    ("vocab", "dim", "anchors", "entries"), [(700, 64, 333, 32), (90, 37, 41, 41), (50, 5, 16, 1)]
)
def test_against_float64(dtype, recipe, temperature, vocab, dim, anchors, entries):
    embedding = random_embedding(vocab, dim, seed=dim).to(dtype)
    anchor_ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:anchors]
    whole = similarity_rows(embedding, anchor_ids, recipe=recipe, temperature=temperature)
    assert whole.max() > 3 / anchors, "the rows are uniform: the input is trivial"

    source = SimilarityRows(embedding, anchor_ids, recipe=recipe, temperature=temperature, entries=entries)
    tokens = torch.randint(vocab, (13,), generator=torch.Generator().manual_seed(2))
    assert_rows(source.compute(tokens), whole[tokens])


def assert_rows(found, want):
    columns, values, rest = found
    entries = columns.shape[1]
    assert (values[:, :-1] >= values[:, 1:]).all()
    torch.testing.assert_close(values.double(), want.topk(entries, dim=1).values, rtol=2e-5, atol=1e-8)
    # Near ties may swap columns; the value at a named column is right all the same.
    torch.testing.assert_close(values.double(), want.gather(1, columns.long()), rtol=2e-5, atol=1e-8)
    assert all(len(row.unique()) == entries for row in columns)
    torch.testing.assert_close(
        rest.double(), 1 - want.topk(entries, dim=1).values.sum(dim=1), rtol=0, atol=2e-6
    )


# On CUDA: lists that are cut again and again; entries that lists can just hold, and that they cannot; tokens
# for several blocks, and in 16s.
@pytest.mark.parametrize("recipe", ["paper", "calibrated"])
@pytest.mark.parametrize(
    ("count", "anchors", "entries"), [(5, 700, 3), (70, 300, 40), (17, 400, 256), (3, 400, 257)]
)
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_scores_in_any_order(recipe, count, anchors, entries, order):
    angles = torch.linspace(1.5, 0.1, anchors, dtype=torch.float64)  # to the tokens, which lie at about 0
    if order == "falling":
        angles = angles.flip(0)
    elif order == "mixed":
        angles = angles[torch.randperm(anchors, generator=torch.Generator().manual_seed(3))]
    angles = torch.cat([angles, torch.linspace(-0.05, 0.05, count, dtype=torch.float64)])
    embedding = torch.stack([angles.cos(), angles.sin(), 0.1 * angles.cos()], dim=1).float()
    ids, tokens = torch.arange(anchors), torch.arange(anchors, anchors + count)
    settings = {"recipe": recipe, "temperature": 40.0}
    found = SimilarityRows(embedding, ids, entries=entries, **settings).compute(tokens)
    assert_rows(found, similarity_rows(embedding, ids, **settings)[tokens])


@pytest.mark.parametrize("entries", [1, 31, 64, 97])
def test_many_ties_at_the_last_entry(entries):
    directions = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    which = torch.randint(4, (400,), generator=torch.Generator().manual_seed(5))
    embedding = directions[which]
    tokens = torch.arange(20)
    columns, values, _ = SimilarityRows(embedding, torch.arange(400), entries=entries).compute(tokens)
    whole = similarity_rows(embedding, torch.arange(400), recipe="calibrated", temperature=40.0)[tokens]
    assert all(len(row.unique()) == 4 for row in whole), "these are no ties"
    want = whole.sort(dim=1, descending=True, stable=True).indices[:, :entries]
    assert torch.equal(columns.long(), want)
    torch.testing.assert_close(values.double(), whole.gather(1, want), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("recipe", ["paper", "calibrated"])
def test_company_does_not_change_a_bit(recipe):
    source = SimilarityRows(random_embedding(400, 19, seed=7), torch.arange(0, 400, 2), recipe=recipe)
    together = source.compute(torch.arange(83))
    for first, last in ((0, 1), (60, 70), (3, 83)):
        some = source.compute(torch.arange(first, last))
        assert all(torch.equal(a, b[first:last]) for a, b in zip(some, together, strict=True))


def test_ties_go_to_the_lower_column():
    embedding = torch.eye(4).repeat(3, 1)  # tokens 0, 4 and 8 are the same
    columns, values, _ = SimilarityRows(embedding, torch.arange(12), entries=5).compute(torch.tensor([4]))
    assert columns[0, :3].tolist() == [0, 4, 8]
    assert values[0, 0] == values[0, 2]


def test_a_token_without_direction_is_uniform():
    embedding = random_embedding(30, 8, seed=3)
    embedding[7] = 0
    source = SimilarityRows(embedding, torch.arange(10), recipe="paper", entries=10)
    _, values, _ = source.compute(torch.tensor([7]))
    torch.testing.assert_close(values, torch.full((1, 10), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 24, 33])
def test_an_embedding_that_starts_at_any_element(dtype, dim):
    embedding = random_embedding(60, dim, seed=dim).to(dtype)
    anchor_ids = torch.arange(0, 60, 3)
    want = SimilarityRows(embedding, anchor_ids, entries=4).compute(torch.arange(60))
    moved = torch.zeros(1 + embedding.numel(), dtype=dtype)[1:].view_as(embedding)
    moved.copy_(embedding)
    for one, other in zip(
        SimilarityRows(moved, anchor_ids, entries=4).compute(torch.arange(60)), want, strict=True
    ):
        assert torch.equal(one, other)


def test_no_tokens():
    columns, values, rest = SimilarityRows(torch.randn(20, 4), torch.arange(6)).compute(
        torch.tensor([], dtype=torch.int64)
    )
    assert columns.shape == values.shape == (0, 6)
    assert rest.shape == (0,)


def test_threads_do_not_change_a_bit():
    source = SimilarityRows(random_embedding(900, 48, seed=5), torch.arange(0, 900, 2))
    tokens = torch.arange(37)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = source.compute(tokens)
        torch.set_num_threads(3)
        three = source.compute(tokens)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def _call(**changes):
    arguments = {
        "tokens": torch.tensor([1]),
        "embedding": torch.randn(9, 4),
        "anchor_ids": torch.arange(5),
        "anchor_inverse_norm": torch.ones(5),
        "mean": None,
        "temperature": 20.0,
        "normalise": False,
        "entries": 3,
    } | changes
    return relative_rows(arguments.pop("tokens"), Similarity(**arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.tensor([9])}, "token 9 is outside the embedding's 9 rows"),
        ({"tokens": torch.tensor([-1])}, "token -1 is outside"),
        ({"tokens": torch.tensor([1], dtype=torch.int32)}, "tokens is int32; expected int64"),
        ({"anchor_ids": torch.tensor([0, 1, 2, 3, 9])}, "anchor token 9 is outside"),
        ({"anchor_inverse_norm": torch.ones(4)}, "anchor_inverse_norm has shape"),
        ({"mean": torch.zeros(5)}, "mean has shape"),
        ({"embedding": torch.randn(4, 9).T}, "embedding is not contiguous"),
        ({"embedding": torch.randn(9, 4).double()}, "embedding is float64"),
        ({"entries": 6}, "entries is 6"),
        ({"entries": 0}, "entries is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_bad_input(changes, message, backend):
    if backend.emulator is not None and "outside" in message:
        pytest.skip("the kernel's caller looks at the ids: on CUDA the host reads nothing (tests/gpu)")
    with pytest.raises(InputError, match=message):
        _call(**changes)


@pytest.mark.parametrize("where", ["token", "anchor"])
def test_nan_in_the_embedding(where):
    embedding = random_embedding(40, 8, seed=3)
    embedding[30 if where == "token" else 5, 2] = float("nan")
    with pytest.raises(InputError, match="the embedding of token 30 or of an anchor has NaN"):
        _call(embedding=embedding, tokens=torch.tensor([30]), anchor_ids=torch.arange(5, 10))
