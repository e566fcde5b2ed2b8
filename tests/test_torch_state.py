"""Ensembles in a program that has set torch in its own way: default dtype, default device, inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from deepen_ext import Ensemble, RelativeMap
from deepen_ext.fusers import FUSERS
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.loading import load_members
from deepen_ext.members.member import Member
from deepen_ext.ops.topk_softmax import topk_softmax
from deepen_ext.space.row_table import RowTable

WRITTEN = {"max_new_tokens": 4, "draft": 0}


@pytest.fixture(scope="module")
def members(one_byte_folders: list[Path]) -> list[Member]:
    return load_members(one_byte_folders)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def text_and_logits(members: list[Member], fuser: str) -> tuple[list[int], torch.Tensor]:
    """What an ensemble writes, and what its fuser makes of given logits."""
    ensemble = Ensemble(members, fuser=fuser, cache=False)
    sampled = {"do_sample": True, "seed": 1} if fuser == "draw" else {}
    written = ensemble.generate("some words", **WRITTEN, **sampled).token_ids
    if fuser == "spans":
        return written, torch.empty(0, device="cpu")
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, size) for size in ensemble.fuser.vocab_sizes]
    logits = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]
    return written, ensemble.fuser.step(logits, [0.6, 0.4][: len(logits)]).logits


@pytest.mark.parametrize("fuser", FUSERS)
def test_the_default_dtype_changes_nothing(members: list[Member], fuser: str) -> None:
    text, logits = text_and_logits(members, fuser)
    for dtype in (torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            found = text_and_logits(members, fuser)
        assert found[0] == text
        assert torch.equal(found[1], logits.to(found[1].dtype))


def test_scores_of_a_member_without_logits_are_float32() -> None:
    topk = topk_softmax(torch.randn(2, 30), 5)
    said = Distribution("far", 30, 5, known_topk=topk)
    with default_dtype(torch.bfloat16):
        assert said.scores().dtype == torch.float32


@pytest.mark.parametrize("fuser", FUSERS)
def test_the_default_device_changes_nothing(members: list[Member], fuser: str) -> None:
    """A device on which nothing of ours may land: "meta" stands for one, and cannot be read."""
    text, logits = text_and_logits(members, fuser)
    with default_device("meta"):
        found = text_and_logits(members, fuser)
    assert found[0] == text
    assert torch.equal(found[1], logits)


def test_an_ensemble_made_in_inference_mode_writes_outside_of_it(members: list[Member]) -> None:
    settings = {"fuser": "deepen", "cache": False}
    expected = Ensemble(members, **settings).generate("other words", **WRITTEN).token_ids
    with torch.inference_mode():
        ensemble = Ensemble(members, **settings)
        ensemble.generate("some words", **WRITTEN)
    assert ensemble.generate("other words", **WRITTEN).token_ids == expected


def test_rows_moved_in_inference_mode_are_kept_outside_of_it() -> None:
    table = RowTable.empty(10, 5, 2)
    with torch.inference_mode():
        moved = RelativeMap(table).to("meta").table
    assert not any(one.is_inference() for one in (moved.rows.values, moved.rows.columns, moved.known))


def test_a_stream_read_in_and_out_of_inference_mode(members: list[Member]) -> None:
    """With a processor that looks at the ids: they are kept as a tensor, which grows."""
    ensemble = Ensemble(members, fuser="average")
    settings = {"max_new_tokens": 16, "repetition_penalty": 1.2, "draft": 0}
    with ensemble.stream("a", **settings) as stream:
        with torch.inference_mode():
            begin = next(stream)
        rest = list(stream)
    assert len(rest) > 2
    assert "".join([begin, *rest]) == ensemble.generate("a", **settings).text
