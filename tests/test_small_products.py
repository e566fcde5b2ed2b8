"""Linear layers of a few rows, against torch's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from deepen_ext import _core
from deepen_ext.members.hf import small_products as module
from deepen_ext.members.hf.small_products import small_products

CPU = torch.device("cpu")
WIDE, SQUARE, DEEP = (2000, 48), (340, 200), (4200, 1024)


@pytest.fixture(autouse=True)
def maker(monkeypatch):
    """Not Intel, whatever this processor is."""
    monkeypatch.setattr(module, "_ON_INTEL", False)


@pytest.fixture
def products(monkeypatch):
    """The rows of each product that torch's own linear layer did not compute, with the way it went."""
    seen = []
    mm, onednn = torch.mm, torch.ops.mkldnn._linear_pointwise

    def turned(weight, columns):
        seen.append(("turned", columns.shape[1]))
        return mm(weight, columns)

    def by_onednn(rows, *others):
        seen.append(("oneDNN", len(rows)))
        return onednn(rows, *others)

    monkeypatch.setattr(torch, "mm", turned)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", by_onednn)
    return seen


def check(x, weight, offset=None):
    """What the products give is the linear layer's, computed in double precision."""
    want = linear(x.double(), weight.double(), None if offset is None else offset.double())
    with small_products(CPU, torch.float32, x.numel() // x.shape[-1]):
        found = linear(x, weight, offset)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "matrix", "way"),
    [
        ((), SQUARE, ("oneDNN", 1)),
        ((1, 1), WIDE, ("oneDNN", 1)),
        ((1, 2), SQUARE, ("turned", 2)),
        ((2, 1), DEEP, ("turned", 2)),
        ((3, 1), SQUARE, ("oneDNN", 3)),
        ((1, 3), WIDE, ("turned", 3)),
        ((4,), WIDE, ("turned", 4)),
        ((4,), DEEP, ("oneDNN", 4)),
        ((5,), WIDE, ("oneDNN", 5)),
        ((2, 4), SQUARE, ("oneDNN", 8)),
        ((3, 3), SQUARE, ("oneDNN", 16)),
        ((4, 4), SQUARE, ("oneDNN", 16)),
        ((1, 50), SQUARE, ("oneDNN", 56)),
        ((16, 4), WIDE, ("oneDNN", 64)),
    ],
)
def test_as_torch_does_it(products, shape, matrix, way, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, matrix[1], generator=generator)
    weight = torch.randn(*matrix, generator=generator)
    check(x, weight, torch.randn(matrix[0], generator=generator) if bias else None)
    assert products == [way]


@pytest.mark.parametrize(
    ("rows", "out", "taken"),
    [(1, DEEP[0], False), (3, DEEP[0], False), (4, DEEP[0], True), (64, DEEP[0], True), (64, 4000, False)],
)
def test_on_intels_processors(products, monkeypatch, rows, out, taken):
    """Where torch's own is the faster one for less than 4 rows, and for smaller matrices."""
    monkeypatch.setattr(module, "_ON_INTEL", True)
    check(torch.randn(rows, 1024), torch.randn(out, 1024))
    assert products == ([("oneDNN", rows)] if taken else [])


@pytest.mark.parametrize(("tokens", "of_use"), [(1, False), (3, False), (4, True), (64, True), (65, False)])
def test_on_intels_processors_nothing_looks_where_nothing_is_faster(monkeypatch, tokens, of_use):
    monkeypatch.setattr(module, "_ON_INTEL", True)
    with small_products(CPU, torch.float32, tokens) as products:
        assert (products is not None) == of_use


def test_who_made_the_processor():
    makers = re.findall(r"vendor_id\s*: (\w+)", Path("/proc/cpuinfo").read_text())
    assert _core.is_intel() == ("GenuineIntel" in makers)


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_operands_with_gaps(products, lanes):
    check(torch.randn(lanes, 4, 48)[:, ::2], torch.randn(48, 1400).t(), torch.randn(2800)[::2])
    check(torch.randn(lanes, 4, 48)[:, ::2], torch.randn(2800, 96)[::2, ::2], torch.randn(1400, 2)[:, 1])
    assert len(products) == 2


@pytest.mark.parametrize(("rows", "dtype"), [(65, torch.float32), (2, torch.bfloat16), (0, torch.float32)])
def test_the_rest_is_left_to_torch(products, rows, dtype):
    x, weight = torch.randn(rows, 48, dtype=dtype), torch.randn(1400, 48, dtype=dtype)
    with small_products(CPU, torch.float32, rows):
        found = linear(x, weight)
    assert products == []
    assert torch.equal(found, linear(x, weight))


def test_a_small_matrix_is_left_to_torch(products):
    check(torch.randn(5, 48), torch.randn(1300, 48))
    assert products == []


@pytest.mark.parametrize(
    "operands",
    [
        (torch.zeros(5, 40), torch.zeros(1400, 48)),
        (torch.zeros(5, 48), torch.zeros(1400, 48), torch.zeros(60)),
        (torch.zeros(5, 48), torch.zeros(1400, 48, dtype=torch.float64)),
    ],
)
def test_operands_that_do_not_fit_together_get_torchs_error(products, operands):
    with pytest.raises(RuntimeError) as ours, small_products(CPU, torch.float32, 5):
        linear(*operands)
    with pytest.raises(RuntimeError) as torchs:
        linear(*operands)
    assert products == []
    assert str(ours.value) == str(torchs.value)


def test_where_it_is_of_no_use(products, monkeypatch):
    x, weight = torch.randn(2, 48), torch.randn(1400, 48)

    def run(device, dtype):
        with small_products(device, dtype, 2):
            linear(x, weight)

    run(CPU, torch.bfloat16)
    run(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    run(CPU, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(module, "_ON_INTEL", False)
    with small_products(CPU, torch.float32, 2) as nothing:
        assert nothing is None
    assert products == []
