"""`relative_rows` and whole maps on CUDA against float64 and against the CPU twin."""

from __future__ import annotations

import pytest
import torch
from oracle import random_embedding, similarity_rows

from deepen_ext import InputError, RelativeMap
from deepen_ext.ops import Similarity, relative_rows
from deepen_ext.space.row_sources import SimilarityRows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RECIPES = [("paper", 100.0), ("calibrated", 20.0), ("calibrated", 40.0)]
SHAPES = [
    *[(700, 64, 333, 32), (90, 37, 41, 41), (50, 5, 16, 1), (3000, 640, 2049, 32)],
    *[(2000, 129, 1000, 300), (400, 16, 1, 1), (5000, 896, 4097, 32), (300, 1, 7, 3)],
    *[(2000, 24, 1500, 256), (2000, 24, 1500, 257)],  # what the kernel's lists hold at most, and one more
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("recipe", "temperature"), RECIPES)
@pytest.mark.parametrize(("vocab", "dim", "anchors", "entries"), SHAPES)
def test_against_float64(device, dtype, recipe, temperature, vocab, dim, anchors, entries):
    embedding = random_embedding(vocab, dim, seed=dim).to(dtype)
    anchor_ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:anchors]
    settings = {"recipe": recipe, "temperature": temperature}
    source = SimilarityRows(embedding.to(device), anchor_ids, entries=entries, **settings)
    tokens = torch.randint(vocab, (133,), generator=torch.Generator().manual_seed(2))
    columns, values, rest = (one.cpu() for one in source.compute(tokens))

    assert bool((values[:, :-1] >= values[:, 1:]).all())
    want = similarity_rows(embedding, anchor_ids, **settings, tokens=tokens)
    rtol = 2e-5 if dim < 100 else 1e-4  # the rounding of a cosine of `dim` terms, times the temperature
    torch.testing.assert_close(values.double(), want.topk(entries, dim=1).values, rtol=rtol, atol=1e-8)
    # Near ties may swap columns; the value at a named column is right all the same.
    torch.testing.assert_close(values.double(), want.gather(1, columns.long()), rtol=rtol, atol=1e-8)
    assert all(len(row.unique()) == entries for row in columns)
    left = 1 - want.topk(entries, dim=1).values.sum(dim=1)
    torch.testing.assert_close(rest.double(), left, rtol=0, atol=rtol)


def test_ties_go_to_the_lower_column(device):
    embedding = torch.eye(4).repeat(3, 1).to(device)  # tokens 0, 4 and 8 are the same
    columns, values, _ = SimilarityRows(embedding, torch.arange(12), entries=5).compute(torch.tensor([4]))
    assert columns[0, :3].tolist() == [0, 4, 8]
    assert values[0, 0] == values[0, 2]


def test_many_ties_at_the_last_entry(device):
    directions = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    embedding = directions[torch.randint(4, (9000,), generator=torch.Generator().manual_seed(5))]
    ids, tokens = torch.arange(9000), torch.arange(200)
    settings = {"recipe": "calibrated", "temperature": 40.0}
    whole = similarity_rows(embedding, ids, **settings, tokens=tokens)
    assert all(len(row.unique()) == 4 for row in whole), "these are no ties"
    want = whole.sort(dim=1, descending=True, stable=True).indices
    for entries in (1, 31, 250):
        source = SimilarityRows(embedding.to(device), ids, entries=entries)
        assert torch.equal(source.compute(tokens).columns.cpu().long(), want[:, :entries])


@pytest.mark.parametrize("rising", [True, False])
def test_scores_that_rise_or_fall(device, rising):
    """Every anchor is better than those before, so that the lists are cut all the time; or none is."""
    angles = torch.linspace(1.5, 0.1, 9000, dtype=torch.float64)
    angles = torch.cat([angles if rising else angles.flip(0), torch.linspace(-0.05, 0.05, 70).double()])
    embedding = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    source = SimilarityRows(embedding.to(device), torch.arange(9000))
    tokens, settings = torch.arange(9000, 9070), {"recipe": "calibrated", "temperature": 40.0}
    values = source.compute(tokens).values.cpu().double()
    want = similarity_rows(embedding, torch.arange(9000), **settings, tokens=tokens)
    torch.testing.assert_close(values, want.topk(32, dim=1).values, rtol=2e-5, atol=1e-8)


def test_a_token_without_direction_is_uniform(device):
    embedding = random_embedding(30, 8, seed=3)
    embedding[7] = 0
    source = SimilarityRows(embedding.to(device), torch.arange(10), recipe="paper", entries=10)
    torch.testing.assert_close(source.compute(torch.tensor([7])).values.cpu(), torch.full((1, 10), 0.1))


def test_no_tokens(device):
    source = SimilarityRows(torch.randn(20, 4, device=device), torch.arange(6))
    columns, values, rest = source.compute(torch.tensor([], dtype=torch.int64))
    assert columns.shape == values.shape == (0, 6)
    assert rest.shape == (0,)


def test_the_same_bits_every_time_and_with_any_company(device):
    source = SimilarityRows(random_embedding(9000, 96, seed=5).to(device), torch.arange(0, 9000, 2))
    together = source.compute(torch.arange(200))
    for _ in range(5):
        again = source.compute(torch.arange(200))
        assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    alone = source.compute(torch.arange(70, 71))
    assert all(torch.equal(a, b[70:71]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [9]}, "token 9 is outside the embedding's 9 rows"),
        ({"tokens": [-1]}, "token -1 is outside"),
        ({"anchor_ids": [0, 1, 2, 3, 9]}, "anchor token 9 is outside"),
    ],
)
def test_ids_outside_the_embedding(device, changes, message):
    ids = {"tokens": [1], "anchor_ids": [0, 1, 2, 3, 4]} | changes
    with pytest.raises(InputError, match=message):
        relative_rows(
            torch.tensor(ids["tokens"], device=device),
            Similarity(
                torch.randn(9, 4, device=device),
                torch.tensor(ids["anchor_ids"], device=device),
                torch.ones(5, device=device),
                mean=None,
                temperature=20.0,
                normalise=False,
                entries=3,
            ),
        )


@pytest.mark.parametrize("where", ["token", "anchor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite(device, where, value):
    embedding = random_embedding(40, 8, seed=3)
    embedding[30 if where == "token" else 5, 2] = value
    source = SimilarityRows(embedding.to(device), torch.arange(5, 10), recipe="paper")
    with pytest.raises(InputError, match="the embedding of token 30 or of an anchor has NaN or infinite"):
        source.compute(torch.tensor([30]))


class TestMap:
    def test_filled_like_on_the_cpu(self, device):
        embedding, ids = random_embedding(6000, 48, seed=0), torch.arange(0, 6000, 5)
        here = RelativeMap.from_embedding(embedding, ids)
        there = RelativeMap.from_embedding(embedding.to(device), ids)
        assert there.device == torch.device(device)
        assert there.fill() == 6000
        torch.testing.assert_close(there.to_dense().cpu(), here.to_dense(), rtol=2e-4, atol=1e-7)

    def test_saved_and_loaded_on_either_device(self, device, tmp_path):
        embedding, ids = random_embedding(700, 24, seed=0), torch.arange(0, 700, 5)
        there = RelativeMap.from_embedding(embedding.to(device), ids)
        there.fill()
        there.save(tmp_path / "map.safetensors")
        here = RelativeMap.load(tmp_path / "map.safetensors", embedding=embedding, anchor_ids=ids)
        back = RelativeMap.load(tmp_path / "map.safetensors", device=device)
        assert here.device.type == "cpu"
        assert here.fill() == back.fill() == 0
        assert torch.equal(here.rows.values, there.rows.values.cpu())
        assert torch.equal(back.rows.values, there.rows.values)
        assert torch.equal(here.to(device).rows.columns, there.rows.columns)

    def test_dense(self, device, tmp_path):
        matrix = torch.softmax(torch.randn(300, 40, device=device), dim=1)
        whole = RelativeMap.from_dense(matrix)
        whole.save(tmp_path / "dense.safetensors")
        assert torch.equal(RelativeMap.load(tmp_path / "dense.safetensors", device=device).to_dense(), matrix)
