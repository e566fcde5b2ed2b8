"""Relative maps: rows on demand, full rows, and what is written to disk."""

from __future__ import annotations

import pytest
import torch
from oracle import keep_entries, random_embedding, similarity_rows
from safetensors.torch import load_file, save_file

from deepen_ext import InputError, ModelError, RelativeMap
from deepen_ext.space.row_table import RowTable

ANCHOR_IDS = torch.arange(0, 300, 3)


@pytest.fixture
def embedding():
    return random_embedding(300, 20, seed=0)


@pytest.mark.parametrize(
    ("recipe", "temperature"), [("calibrated", 20.0), ("calibrated", None), ("paper", None)]
)
def test_similarity_rows_are_the_cut_rows(embedding, recipe, temperature):
    relative = RelativeMap.from_embedding(embedding, ANCHOR_IDS, recipe, temperature, entries=8)
    default = {"calibrated": 40.0, "paper": 100.0}[recipe]
    whole = similarity_rows(embedding, ANCHOR_IDS, recipe=recipe, temperature=temperature or default)
    torch.testing.assert_close(relative.to_dense().double(), keep_entries(whole, 8), rtol=1e-4, atol=1e-7)


def test_the_recipes_differ(embedding):
    calibrated = RelativeMap.from_embedding(embedding, ANCHOR_IDS, temperature=20).to_dense()
    paper = RelativeMap.from_embedding(embedding, ANCHOR_IDS, "paper").to_dense()
    assert (calibrated - paper).abs().max() > 0.1


def test_rows_are_computed_once_and_only_those_asked_for(embedding):
    relative = RelativeMap.from_embedding(embedding, ANCHOR_IDS)
    assert relative.rows_known == 0
    assert relative.ensure(torch.tensor([[5, 9], [5, 250]], dtype=torch.int32)) == 3
    assert relative.ensure(torch.tensor([9, 250, 11])) == 1
    assert relative.rows_known == relative.rows_computed == 4


def test_rows_do_not_depend_on_what_they_were_computed_with(embedding):
    one_by_one = RelativeMap.from_embedding(embedding, ANCHOR_IDS)
    for token in range(300):
        one_by_one.ensure(torch.tensor([token]))
    assert torch.equal(one_by_one.to_dense(), RelativeMap.from_embedding(embedding, ANCHOR_IDS).to_dense())


def test_entries_beyond_the_anchors_keep_the_whole_row(embedding):
    relative = RelativeMap.from_embedding(embedding, ANCHOR_IDS, temperature=20, entries=1000)
    whole = similarity_rows(embedding, ANCHOR_IDS, recipe="calibrated", temperature=20)
    torch.testing.assert_close(relative.to_dense().double(), whole, rtol=1e-4, atol=1e-8)


def test_a_large_map_reserves_memory_but_does_not_take_it():
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss
    maps = [RelativeMap(RowTable.empty(262_144, 50_000, 32)) for _ in range(4)]  # 4 x 68 MB reserved
    taken = psutil.Process().memory_info().rss - before
    assert len(maps) == 4
    assert taken < 32e6


class TestDense:
    def test_is_what_was_given(self):
        matrix = torch.softmax(torch.randn(30, 12), dim=1)
        relative = RelativeMap.from_dense(matrix)
        assert relative.is_dense
        assert relative.is_complete
        assert (relative.vocab_size, relative.anchors, relative.rows_known) == (30, 12, 30)
        assert torch.equal(relative.to_dense(), matrix)

    @pytest.mark.parametrize(
        ("matrix", "message"),
        [
            (torch.ones(4), "shape"),
            (torch.empty(0, 5), "shape"),
            (torch.ones(4, 5, dtype=torch.float64) / 5, r"matrix.float\(\)"),
            (torch.ones(4, 5), "sum to 1; one is off by 4"),
            (torch.full((4, 5), 0.2003), "sum to 1; one is off by 0.0015"),
            (torch.full((4, 5), float("nan")), "non-finite"),
            (torch.tensor([[1.5, -0.5]]), "negative"),
        ],
    )
    def test_bad_input(self, matrix, message):
        with pytest.raises(InputError, match=message):
            RelativeMap.from_dense(matrix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "bytes"}, "recipe 'bytes' has no similarity rows"),
        ({"recipe": "papers"}, "use 'paper' or 'calibrated'"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"entries": 0}, "entries is 0"),
        ({"anchor_ids": torch.tensor([0, 300])}, "outside the embedding's 300 rows"),
        ({"anchor_ids": torch.tensor([-1])}, "outside the embedding's 300 rows"),
        ({"anchor_ids": torch.tensor([], dtype=torch.int64)}, "no anchors"),
        ({"embedding": torch.zeros(5)}, "shape"),
    ],
)
def test_bad_input(embedding, arguments, message):
    with pytest.raises(InputError, match=message):
        RelativeMap.from_embedding(**({"embedding": embedding, "anchor_ids": ANCHOR_IDS} | arguments))


class TestFile:
    @pytest.fixture
    def saved(self, embedding, tmp_path):
        relative = RelativeMap.from_embedding(embedding, ANCHOR_IDS, "paper", entries=8)
        relative.ensure(torch.arange(40))
        relative.save(tmp_path / "map.safetensors")
        return relative, tmp_path / "map.safetensors"

    def test_rows_come_back_to_the_bit(self, saved, embedding):
        relative, path = saved
        loaded = RelativeMap.load(path, embedding=embedding, anchor_ids=ANCHOR_IDS)
        assert loaded.rows_known == 40
        assert loaded.ensure(torch.arange(40)) == 0
        assert torch.equal(loaded.to_dense(), relative.to_dense())
        assert loaded.rows_computed == 260

    def test_without_an_embedding_it_has_what_was_saved(self, saved):
        loaded = RelativeMap.load(saved[1])
        assert loaded.ensure(torch.arange(40)) == 0
        with pytest.raises(InputError, match=r"no row for token 41.*embedding"):
            loaded.ensure(torch.tensor([3, 41]))

    def test_dense(self, tmp_path):
        matrix = torch.softmax(torch.randn(30, 12), dim=1)
        RelativeMap.from_dense(matrix).save(tmp_path / "dense.safetensors")
        assert torch.equal(RelativeMap.load(tmp_path / "dense.safetensors").to_dense(), matrix)

    def test_of_another_model(self, saved, embedding):
        other = embedding.clone()
        other[299, 3] += 1e-3
        with pytest.raises(InputError, match="saved for another model"):
            RelativeMap.load(saved[1], embedding=other, anchor_ids=ANCHOR_IDS)
        with pytest.raises(InputError, match="saved for another model"):
            RelativeMap.load(saved[1], embedding=embedding, anchor_ids=ANCHOR_IDS + 1)
        settings = RelativeMap.from_embedding(embedding, ANCHOR_IDS, "paper", entries=9)
        with pytest.raises(InputError, match="saved for another model"):
            settings.read(saved[1])

    def test_half_of_the_arguments(self, saved, embedding):
        with pytest.raises(InputError, match="both embedding and anchor_ids"):
            RelativeMap.load(saved[1], embedding=embedding)

    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match="no relative map at"):
            RelativeMap.load(tmp_path / "nowhere.safetensors")

    @pytest.mark.parametrize("kept", [0, 7, 200, -1])
    def test_truncated(self, saved, kept):
        path = saved[1]
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ModelError, match=r"map\.safetensors"):
            RelativeMap.load(path)

    def test_every_flipped_byte_is_found(self, saved):
        path = saved[1]
        good = path.read_bytes()
        for position in range(0, len(good), 97):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises(ModelError):
                RelativeMap.load(path)

    def test_some_other_safetensors_file(self, tmp_path):
        save_file({"tokens": torch.arange(3)}, tmp_path / "other.safetensors")
        with pytest.raises(ModelError, match="no relative map of this version"):
            RelativeMap.load(tmp_path / "other.safetensors")

    def test_saving_leaves_one_whole_file(self, saved):
        relative, path = saved
        relative.save(path)
        assert [file.name for file in path.parent.iterdir()] == ["map.safetensors"]
        assert len(load_file(path)["tokens"]) == 40


@pytest.mark.parametrize("token", [-1, 300])
def test_ids_outside_of_the_vocabulary(embedding, token):
    relative = RelativeMap.from_embedding(embedding, ANCHOR_IDS)
    with pytest.raises(InputError, match="ids lie outside the map's 300 tokens"):
        relative.ensure(torch.tensor([5, token]))
    assert relative.rows_known == 0
